"""``lehr unpack``."""

from __future__ import annotations

from pathlib import Path

import click

from lehr.commands._output import emit, json_option


@click.command("unpack")
@click.argument("archive", type=click.Path(path_type=Path), metavar="ARCHIVE.zip")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to make.  [default: ARCHIVE.lehr]")
@json_option
def command(archive: Path, output: Path | None, as_json: bool) -> None:
    """Make a bundle of an archive that lehr pack wrote, after checking every file in it.

    \b
    Examples:
      lehr unpack d-cpu-fp32.zip
      lehr unpack device.zip -o d.lehr --json
    """
    from lehr.runtime.engine import engines
    from lehr.runtime.kits import kits
    from lehr.runtime.pack import unpack

    bundle = unpack(archive, output or Path(f"{archive.stem}.lehr"))
    names = [record.folder for record in engines(bundle)]
    found = kits(bundle)
    data = {
        "bundle": str(bundle.root),
        "files": bundle.names(),
        "engines": names,
        "kits": [kit.folder for kit in found],
    }
    commands = [f"Next: lehr run {bundle.root.name} -o out.png"] if names else []
    for kit in found:
        words = [bundle.root.name if word.endswith(".lehr") else word for word in kit.command]
        commands.append(f"Next, to make the engine: {' '.join(words)}")
    emit(as_json, data, "\n".join([f"{bundle.root}: {', '.join([*names, *data['kits']])}", *commands]))
