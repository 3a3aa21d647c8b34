"""``lehr verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import bundle_argument, emit, engine_options, json_option, table
from lehr.commands._stages import chosen_stages, stage_option, stage_recipe_option, stage_recipes

if TYPE_CHECKING:
    from lehr.runtime.bundle import Bundle


def rows(levels: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(level, verdict, reason) of every rung, for people."""
    words = {True: "pass", False: "FAIL", None: "-"}
    return [(name, words[level["passed"]], level["reason"]) for name, level in levels.items()]


@click.command("verify")
@bundle_argument
@engine_options
@stage_option
@stage_recipe_option
@json_option
def command(
    bundle: Path,
    target: str,
    recipe: str,
    stages: tuple[str, ...],
    stage_recipe: tuple[str, ...],
    as_json: bool,
) -> None:
    """Hold engines against eager PyTorch's recorded results; exit 1 if one differs.

    L0 is structure, L1 one evaluation at several timesteps (score error), L2 whole loops on the same noise. A stage
    beside the denoiser has L0 and L1, of the engine that the pipeline would run: in --stage-recipe, else in --recipe if
    it was built in that, else in fp32. One that has no engine for the target or no golden data is not judged, unless
    --stage names it. Where the export recorded whole pictures of a pipeline, these are drawn again, too.

    \b
    Examples:
      lehr verify d.lehr
      lehr verify d.lehr --target cpu --recipe fp32 --json
      lehr verify p.lehr --stage vae_decoder --stage-recipe vae_decoder=fp16
    """
    from lehr.runtime import engine as engines
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.picture_golden import verify_pictures
    from lehr.runtime.verify import record_parity, verify

    opened = Bundle.open(bundle)
    denoiser, names = chosen_stages(opened.manifest.stages, stages)
    given = stage_recipes(opened.manifest.stages, stage_recipe)
    recipes = {"denoiser": recipe, **given}
    data: dict[str, Any] = {"passed": True, "engine": None, "levels": {}}
    prose = []
    if denoiser:
        verdict = verify(opened, engines.find(opened, target, recipe))
        record_parity(opened, verdict)
        data = verdict.to_json()
        result = "passed" if verdict.passed else "FAILED"
        prose.append(table(("level", "verdict", "reason"), rows(data["levels"])) + f"\n{verdict.engine} {result}")
    if opened.manifest.stages:
        data["stages"] = {name: _stage(opened, name, target, recipes, asked=name in stages) for name in names}
        data["passed"] = data["passed"] and not any(one["passed"] is False for one in data["stages"].values())
        prose += [_told(name, one) for name, one in data["stages"].items()]
    if denoiser and names and (level := verify_pictures(opened, target, recipe, given)) is not None:
        data["picture"] = level.to_json()
        data["passed"] = data["passed"] and level.passed is not False
        prose.append(table(("level", "verdict", "reason"), rows({"picture": data["picture"]})))
    emit(as_json, data, "\n\n".join(prose))
    if not data["passed"]:
        raise click.exceptions.Exit(1)


def _stage(bundle: Bundle, name: str, target: str, recipes: Mapping[str, str], *, asked: bool) -> dict[str, Any]:
    """One stage's verdict; of one that cannot be judged, why, unless it was asked for by name."""
    from lehr.runtime.engine import engines
    from lehr.runtime.stages import stage_engine
    from lehr.runtime.verify import record_parity
    from lehr.runtime.verify_stage import verify_stage

    built = any(record.target == target for record in engines(bundle, name))
    if not asked and name not in recipes and not built:
        return {"passed": None, "engine": None, "reason": f"no engine for target {target!r}", "levels": {}}
    record = stage_engine(bundle, name, target, recipes)
    if not asked and bundle.manifest.stage(name).golden not in bundle.manifest.files:
        return {"passed": None, "engine": record.folder, "reason": "no golden data", "levels": {}}
    verdict = verify_stage(bundle, record)
    record_parity(bundle, verdict)
    return verdict.to_json()


def _told(name: str, one: Mapping[str, Any]) -> str:
    if one["passed"] is None:
        return f"stage {name}: not judged, {one['reason']}"
    result = "passed" if one["passed"] else "FAILED"
    return table((f"stage {name}", "verdict", "reason"), rows(one["levels"])) + f"\n{one['engine']} {result}"
