"""``lehr build``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._build_settings import settings, settings_options
from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option, table
from lehr.commands._stages import chosen_stages, stage_option, stage_recipe_option, stage_recipes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lehr.engines.settings import Settings
    from lehr.engines.target import Target
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import EngineRecord
    from lehr.runtime.kits import KitRecord
    from lehr.runtime.recipe import Recipe
    from lehr.runtime.verify import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What became of the denoiser or of one stage, for scripts and for people."""

    data: dict[str, Any]
    prose: str
    passed: bool = True


@click.command("build")
@bundle_argument
@engine_options
@stage_option
@stage_recipe_option
@click.option("--library", default="auto", show_default=True, help="Engine library; auto measures those installed.")
@click.option(
    "--threads",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Of the engine or, for GPUs, of its build; 0: one a core.",
)
@settings_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    target: str,
    recipe: str,
    stages: tuple[str, ...],
    stage_recipe: tuple[str, ...],
    library: str,
    threads: int,
    batch: str,
    sizes: str,
    workspace: int,
    tactic_memory: int,
    effort: int | None,
    compatible: str,
    weights: str,
    mode: str,
    spinning: str,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Build engines for a target into a bundle: of the denoiser, and of every stage beside it.

    Engines for RTX GPUs are built ahead of time, on any Linux x86-64 machine with the extra trt-rtx. For targets that
    build on themselves, such as Jetson, a build kit is written into the bundle elsewhere; the same command finishes it
    there, without ONNX, and verifies it.

    Where several engine libraries are installed that can build the recipe, all are tried on the golden inputs and
    the fastest that meets parity is kept. The engine replaces those of the same target and recipe.

    A stage is built in fp32 for processors, for GPUs in the denoiser's recipe or, where that is quantised, in fp16;
    --stage-recipe says otherwise. A quantised recipe needs lehr calibrate --stage first.

    \b
    Examples:
      lehr build d.lehr --target cpu
      lehr build d.lehr --target cpu --recipe bf16 --library openvino
      lehr build d.lehr --target cpu --threads 4 --json
      lehr build d.lehr --target rtx-40 --recipe fp16
      lehr build d.lehr --target rtx-40 --recipe fp16 --batch 1,2,8
      lehr build p.lehr --target rtx-40 --recipe fp16 --stage-recipe vae_decoder=bf16
      lehr build p.lehr --stage vae_decoder
      lehr build p.lehr --stage text_encoder --stage-recipe text_encoder=int8-weight
      lehr build d.lehr --target orin-agx --recipe fp16      # here a kit, on the Jetson the engine
    """
    from lehr.engines import target as targets
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.calibrated import recipe_of

    opened, facts = Bundle.open(bundle), targets.target(target)
    denoiser, names = chosen_stages(opened.manifest.stages, stages)
    given = stage_recipes(opened.manifest.stages, stage_recipe)
    wanted = recipe_of(opened, recipe)
    asked = _Asked(
        bundle=bundle,
        target=facts,
        library=library,
        threads=threads,
        settings=settings(
            batch=batch,
            sizes=sizes,
            workspace=workspace,
            tactic_memory=tactic_memory,
            effort=effort,
            compatible=compatible,
            weights=weights,
            mode=mode,
            spinning=spinning,
            no_cache=no_cache,
        ),
        options=_options(ctx),
    )
    progress = Progress()
    recipes = {name: _stage_recipe(opened, name, asked.target, wanted, given) for name in names}
    whole = asked.make(None, wanted, progress) if denoiser else None
    made = [asked.make(name, recipes[name], progress) for name in names]
    if whole is not None:
        data = {**whole.data, **({"stages": [one.data for one in made]} if opened.manifest.stages else {})}
    else:
        data = {"target": target, "recipe": recipe, "engine": None, "stages": [one.data for one in made]}
    everything = [one for one in (whole, *made) if one is not None]
    emit(as_json, data, "\n\n".join(one.prose for one in everything))
    if not all(one.passed for one in everything):
        raise click.exceptions.Exit(1)


def _stage_recipe(bundle: Bundle, name: str, target: Target, recipe: Recipe, given: dict[str, str]) -> Recipe:
    from lehr.engines.stages import check_recipe, default_recipe
    from lehr.runtime.calibrated import recipe_of

    if name not in given:
        return default_recipe(bundle, name, target, recipe)
    named = recipe_of(bundle, given[name], name)
    check_recipe(bundle, name, named)
    target.check(named)
    return named


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What was asked for, whatever part of the bundle is built."""

    bundle: Path
    target: Target
    library: str
    threads: int
    settings: Settings
    options: list[str]

    def make(self, stage: str | None, recipe: Recipe, progress: Progress) -> _Made:
        """An engine of the denoiser or of a stage; or, where the target builds on its own machine, a kit."""
        from lehr.engines.build import build
        from lehr.engines.kit import check_options, elsewhere
        from lehr.engines.stages import build_stage

        what = f"{self.bundle}" if stage is None else f"stage {stage} of {self.bundle}"
        if elsewhere(self.target, recipe, self.library):
            progress(f"{self.target.name} builds on its own machine: preparing a build kit of {what}")
            check_options(self.target, recipe, self.library, self.settings)
            return _made_kit(self.bundle, self._kit(stage, recipe), stage)
        progress(f"building {what} for {self.target.name} in {recipe.name}")
        if stage is None:
            record = build(
                self.bundle,
                self.target,
                recipe,
                library=self.library,
                threads=self.threads,
                progress=progress,
                settings=self.settings,
            )
        else:
            record = build_stage(
                self.bundle,
                stage,
                self.target,
                recipe,
                library=self.library,
                threads=self.threads,
                progress=progress,
                settings=self.settings,
            )
        return _made_engine(self.bundle, record)

    def _kit(self, stage: str | None, recipe: Recipe) -> KitRecord:
        from lehr.engines.build import build_kit
        from lehr.engines.stages import build_stage_kit

        if stage is None:
            return build_kit(self.bundle, self.target, recipe, options=self.options)
        return build_stage_kit(self.bundle, stage, self.target, recipe)


def _made_engine(bundle: Path, record: EngineRecord) -> _Made:
    data = {
        "target": record.target,
        "recipe": record.recipe,
        "library": record.library,
        "seconds": record.seconds,
        "peak_rss_mb": record.peak_rss_mb,
        "engine": record.folder,
        "achieved_precision": dict(record.achieved_precision),
        "candidates": [dict(row) for row in record.candidates],
    }
    if record.stage is not None:
        data = {"stage": record.stage, **data}
    verdict = _verified(bundle, record)
    if verdict is not None:
        data["verified"] = verdict.to_json()
    tried = ""
    if record.candidates:
        tried = table(("library", "step, ms", "error", "verdict"), _rows(record)) + "\n\n"
    return _Made(
        data=data,
        prose=f"{tried}{bundle}/{record.folder}: {_contents(record)}, {record.seconds:.1f} s\n"
        f"{_next(bundle, record, verdict)}",
        passed=verdict is None or verdict.passed,
    )


def _options(ctx: click.Context) -> list[str]:
    """What was asked for beside target and recipe, as it is to be asked for on the device again."""
    given = []
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in ("bundle", "target", "recipe", "as_json"):
            continue
        if ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            continue
        value = ctx.params[name]
        if isinstance(value, bool):
            given.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, tuple) else (value,):
            given += [parameter.opts[0], str(one)]
    return given


def _made_kit(bundle: Path, record: KitRecord, stage: str | None) -> _Made:
    """A build kit instead of an engine, and who must finish it."""
    from lehr.runtime.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    size = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(f"{record.folder}/"))
    data = {
        **({} if stage is None else {"stage": stage}),
        "target": record.target,
        "recipe": record.recipe,
        "library": record.library,
        "engine": None,
        "kit": record.folder,
        "bytes": size,
        "command": list(record.command),
    }
    versions = f" {record.library_versions}" if record.library_versions else ""
    told = f"{bundle}/{record.folder}: a build kit, {size / 1e6:,.1f} MB."
    if stage is None:
        told += (
            f" It is no engine yet: the {record.target} must finish it with {record.library}{versions}.\n"
            f"Next: lehr pack {bundle} --target {record.target} --recipe {record.recipe} --golden, copy and unpack it "
            f"there, and run there: {' '.join(record.command)}"
        )
    return _Made(data=data, prose=told)


def _verified(bundle: Path, record: EngineRecord) -> Verdict | None:
    """An engine that was finished from a kit, held against the golden data; None for others, or where there is none."""
    from lehr.runtime.backends import backends
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.kits import find_kit
    from lehr.runtime.verify import record_parity, verify
    from lehr.runtime.verify_stage import verify_stage

    opened = Bundle.open(bundle)
    kit = find_kit(opened, record.target, record.recipe, record.stage)
    if kit is None or kit.library != record.library or record.library not in backends():
        return None
    if record.stage is not None:
        if opened.manifest.stage(record.stage).golden not in opened.manifest.files:
            return None
        verdict = verify_stage(opened, record)
    elif opened.manifest.golden_tier == "none":
        return None
    else:
        verdict = verify(opened, record)
    record_parity(opened, verdict)
    return verdict


def _contents(record: EngineRecord) -> str:
    """What the engine consists of, as far as that can be known here."""
    if not record.operators:
        graphs = "one graph" if len(record.plans) == 1 else f"{len(record.plans)} graphs"
        return f"{graphs}, precision unknown (only the target itself could tell)"
    shares = ", ".join(f"{share:.0%} {name}" for name, share in record.achieved_precision.items())
    return f"{sum(record.operators.values())} operators, {shares}"


def _next(bundle: Path, record: EngineRecord, verdict: Verdict | None) -> str:
    from lehr.runtime.backends import backends

    if record.library not in backends():
        return (
            f"Lehr has no runtime backend for {record.library} yet: it builds this engine and cannot run or verify it."
        )
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import differences

    if wrong := differences(Bundle.open(bundle), record):
        return f"This machine cannot run or verify it: {'; '.join(wrong)}."
    if verdict is not None:
        reasons = "; ".join(f"{name} {level.reason}" for name, level in verdict.levels.items())
        return f"{'verified' if verdict.passed else 'NOT within parity'}: {reasons}"
    if record.stage is not None:
        which = f"--stage {record.stage}"
        if record.recipe != "fp32":
            which += f" --stage-recipe {record.stage}={record.recipe}"
        return f"Next: lehr verify {bundle} --target {record.target} {which}"
    return f"Next: lehr verify {bundle} --target {record.target} --recipe {record.recipe}"


def _kept(record: EngineRecord, row: Mapping[str, Any]) -> bool:
    """Whether a row of what was tried is the engine that was kept."""
    spinning = any(plan.options.get("spinning", False) for plan in record.plans.values())
    return bool(row["library"] == record.library and row.get("spinning", False) == spinning)


def _rows(record: EngineRecord) -> list[tuple[str, str, str, str]]:
    """What was tried, for people."""
    from lehr.engines.choose import named

    return [
        (
            named(row["library"], row.get("spinning", False)),
            "-" if row["step_ms"] is None else f"{row['step_ms']:.2f}",
            "-" if row["max_rel_error"] is None else f"{row['max_rel_error']:.1e}",
            "kept" if _kept(record, row) else "slower" if row["passed"] else row["reason"] or "no parity",
        )
        for row in record.candidates
    ]
