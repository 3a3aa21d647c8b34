"""``lehr pack``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lehr.commands._output import bundle_argument, emit, engine_options, json_option
from lehr.commands._stages import stage_recipe_option, stage_recipes

if TYPE_CHECKING:
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.pack import Part


@click.command("pack")
@bundle_argument
@engine_options
@stage_recipe_option
@click.option("--golden", is_flag=True, help="Take the golden data along, so that the device can verify itself.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The archive.  [default: NAME-TARGET-RECIPE.zip]")
@json_option
def command(
    bundle: Path,
    target: str,
    recipe: str,
    stage_recipe: tuple[str, ...],
    golden: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write one archive with what a device needs: engines, tables, tokenizers, and golden data if asked for.

    It holds no weights beside the engine's own. Where there is no engine but a build kit, that goes along in its place,
    and the device makes the engine of it. Stages go along as far as they were built for the target. lehr unpack makes a
    bundle of the archive, which runs and verifies there; so does any unzip, without the checks.

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
    recipes = {"denoiser": recipe, **stage_recipes(opened.manifest.stages, stage_recipe)}
    parts = {name: _stage(opened, name, target, recipes) for name in opened.manifest.stages}
    packed = pack(
        opened,
        record,
        output or Path(f"{opened.root.stem}-{target}-{recipe}.zip"),
        golden=golden,
        stages=[part for part in parts.values() if part is not None],
    )
    data = {
        "archive": str(packed.path),
        "bytes": packed.bytes,
        "files": list(packed.files),
        "engine": record.folder if kit is None else None,
        "kit": None if kit is None else kit.folder,
    }
    if parts:
        data["stages"] = {name: None if part is None else part.folder for name, part in parts.items()}
    absent = ", ".join(name for name, part in parts.items() if part is None)
    then = "" if kit is None else f", then there: {' '.join(kit.command)}"
    emit(
        as_json,
        data,
        f"{packed.path}: {len(packed.files)} files, {packed.bytes / 1e6:,.1f} MB"
        f"{'' if kit is None else ', a build kit and no engine yet'}\n"
        + (f"not built for {target}, so not in it: {absent}\n" if absent else "")
        + f"Next, on the device: lehr unpack {packed.path.name} -o {opened.root.name}{then}",
    )


def _stage(bundle: Bundle, name: str, target: str, recipes: dict[str, str]) -> Part | None:
    """A stage's engine for the target, or the kit of one; None where it has neither."""
    from lehr.runtime.engine import engines
    from lehr.runtime.kits import kits
    from lehr.runtime.stages import stage_engine

    wanted = recipes.get(name)
    built = [record for record in engines(bundle, name) if record.target == target]
    waiting = {kit.recipe: kit for kit in kits(bundle, name) if kit.target == target}
    if any(wanted in (None, record.recipe) for record in built) or (wanted and wanted not in waiting):
        return stage_engine(bundle, name, target, recipes)
    return waiting.get(wanted or recipes["denoiser"]) or next(iter(waiting.values()), None)
