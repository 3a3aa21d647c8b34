"""``lehr pack``."""

from __future__ import annotations

from pathlib import Path

import click

from lehr.commands._output import bundle_argument, emit, engine_options, json_option


@click.command("pack")
@bundle_argument
@engine_options
@click.option("--golden", is_flag=True, help="Take the golden data along, so that the device can verify itself.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The archive.  [default: NAME-TARGET-RECIPE.zip]")
@json_option
def command(bundle: Path, target: str, recipe: str, golden: bool, output: Path | None, as_json: bool) -> None:
    """Write one archive with what a device needs: an engine, its tables, and golden data if asked for.

    It holds no weights beside the engine's own. lehr unpack makes a bundle of it, which runs and verifies there; so
    does any unzip, without the checks.

    \b
    Examples:
      lehr pack d.lehr --target cpu
      lehr pack d.lehr --target cpu --recipe bf16 --golden -o device.zip
    """
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import find
    from lehr.runtime.pack import pack

    opened = Bundle.open(bundle)
    record = find(opened, target, recipe)
    packed = pack(opened, record, output or Path(f"{opened.root.stem}-{target}-{recipe}.zip"), golden=golden)
    data = {"archive": str(packed.path), "bytes": packed.bytes, "files": list(packed.files), "engine": record.folder}
    emit(
        as_json,
        data,
        f"{packed.path}: {len(packed.files)} files, {packed.bytes / 1e6:,.1f} MB\n"
        f"Next, on the device: lehr unpack {packed.path.name}",
    )
