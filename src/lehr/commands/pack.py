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

    It holds no weights beside the engine's own. Where there is no engine but a build kit, that goes along in its place,
    and the device makes the engine of it. lehr unpack makes a bundle of the archive, which runs and verifies there; so
    does any unzip, without the checks.

    \b
    Examples:
      lehr pack d.lehr --target cpu
      lehr pack d.lehr --target cpu --recipe bf16 --golden -o device.zip
      lehr pack d.lehr --target orin-agx --recipe fp16 --golden
    """
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import engine_folders, find
    from lehr.runtime.kits import find_kit
    from lehr.runtime.pack import pack

    opened = Bundle.open(bundle)
    kit = None if engine_folders(opened, target, recipe) else find_kit(opened, target, recipe)
    record = find(opened, target, recipe) if kit is None else kit
    packed = pack(opened, record, output or Path(f"{opened.root.stem}-{target}-{recipe}.zip"), golden=golden)
    data = {
        "archive": str(packed.path),
        "bytes": packed.bytes,
        "files": list(packed.files),
        "engine": record.folder if kit is None else None,
        "kit": None if kit is None else kit.folder,
    }
    then = "" if kit is None else f", then there: {' '.join(kit.command)}"
    emit(
        as_json,
        data,
        f"{packed.path}: {len(packed.files)} files, {packed.bytes / 1e6:,.1f} MB"
        f"{'' if kit is None else ', a build kit and no engine yet'}\n"
        f"Next, on the device: lehr unpack {packed.path.name} -o {opened.root.name}{then}",
    )
