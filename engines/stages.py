"""Engines of the stages beside the denoiser: built as the denoiser's are, from one graph each.

A stage has no schedule and no loop. Its graph runs once a picture, a ControlNet's once an evaluation, and all of it
computes in the recipe's format but for what its range audit keeps in float32. A quantised recipe is what the stage
itself was calibrated for, whatever the denoiser's is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lehr.engines.build import Progress, ready, silent, stand_in
from lehr.engines.builders import builder_for, candidates
from lehr.engines.choose import Candidate, Measured, interleaved
from lehr.engines.compiling import remembered
from lehr.engines.job import Job
from lehr.engines.kit import make, open_kit
from lehr.engines.making import Work, make_engine
from lehr.engines.quantised import calibrated_files, check_achieved, lower_calibrated
from lehr.engines.ranges import input_ranges
from lehr.engines.settings import DEFAULT, Settings, StoredWeights
from lehr.engines.stage_audit import audit_file, audited_stage, overflowing
from lehr.engines.target import Target
from lehr.runtime.backends import backend
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import calibrated_names, check_current, read_calibrated
from lehr.runtime.engine import STEP, EngineRecord, Plan
from lehr.runtime.errors import BundleError, InvalidInput, MissingExtra, RunFailed
from lehr.runtime.kits import KitRecord, find_kit
from lehr.runtime.recipe import RECIPES, Format, Recipe, Scope
from lehr.runtime.stage_golden import read_stage_golden
from lehr.runtime.stages import StageRunner
from lehr.runtime.verify_stage import stage_errors, worst_output


def default_recipe(bundle: Bundle, stage: str, target: Target, recipe: Recipe) -> Recipe:
    """What a stage is built in beside a denoiser in ``recipe``, where nobody says.

    fp32 on processors, where half precision is emulated or coarser; elsewhere the denoiser's recipe, or in place of one
    that needs calibration fp16. A stage that was not audited cannot be built in fp16: bf16 takes its place, or fp32.
    """
    bundle.manifest.stage(stage)
    if not target.sm:
        return RECIPES["fp32"]
    plain = not recipe.calibrated and recipe.schedule is None and recipe.scope is Scope.GRAPH
    chosen = recipe if plain else RECIPES["fp16"]
    if chosen.arithmetic is Format.FP16 and audit_file(bundle.manifest.stage(stage)) not in bundle.manifest.known_files:
        chosen = RECIPES["bf16"]
    return chosen if not target.missing(chosen) else RECIPES["fp32"]


def build_stage(
    root: Path,
    stage: str,
    target: Target,
    recipe: Recipe,
    *,
    library: str = "auto",
    threads: int = 0,
    progress: Progress = silent,
    settings: Settings = DEFAULT,
) -> EngineRecord:
    """Build an engine for one stage; see :func:`lehr.engines.build.build`.

    Args:
        root: the bundle.
        stage: its name.
        target: the class of machine.
        recipe: fp32, fp16, bf16, or one that the stage was calibrated for.
        library: an engine library of the target, or "auto".
        threads: of the engine on CPUs, of the build elsewhere; 0 is one a core.
        progress: takes a line of text now and then.
        settings: batches and sizes in them are the denoiser's and not heeded here.

    Raises:
        UnknownName: no such stage.
        InvalidInput, IncompatibleEngine, BundleError, BuildFailed: as there; and a recipe for loops only.
    """
    bundle = Bundle.open(root)
    check_recipe(bundle, stage, recipe)
    settings = replace(settings, batches=(), sizes=())
    versions = ready(target, recipe, library, threads, settings)

    def compiled(name: str, folder: Path) -> dict[str, Plan]:
        return _plans(bundle, stage, target, name, recipe, folder, threads, progress, settings)

    work = Work(
        stage=stage,
        compile=compiled,
        measure=partial(_measured, bundle, stage, recipe),
        sources=lambda name: _sources(bundle, stage, target, recipe, name),
    )
    return make_engine(bundle, work, target, recipe, versions)


def build_stage_kit(
    root: Path, stage: str, target: Target, recipe: Recipe, *, options: Sequence[str] = ()
) -> KitRecord:
    """The half of a stage's build that needs no GPU; see :func:`lehr.engines.build.build_kit`."""
    bundle = Bundle.open(root)
    check_recipe(bundle, stage, recipe)
    entry, library = bundle.manifest.stage(stage), candidates(target, recipe)[0]
    formats = builder_for(target, library).LOWERED
    return make(
        bundle,
        target,
        recipe,
        plans={STEP: entry.graph},
        spec=entry.spec,
        lowered=lambda _, scratch: _lowered(bundle, stage, target, library, recipe, formats, scratch),
        sources=_made_from(bundle, stage, recipe, formats),
        options=options,
        stage=stage,
    )


def check_recipe(bundle: Bundle, stage: str, recipe: Recipe) -> None:
    """Refuse a recipe that a stage cannot be built in.

    Raises:
        UnknownName: no such stage.
        InvalidInput: a recipe for loops, or one that the stage was not calibrated for, or for other weights; with the
            command that does.
        BundleError: what was calibrated is damaged.
    """
    bundle.manifest.stage(stage)
    if recipe.schedule is not None or recipe.scope is not Scope.GRAPH:
        known = ", ".join(("fp32", "fp16", "bf16", *calibrated_names(bundle, stage)))
        raise InvalidInput(
            f"stage {stage!r} cannot be built in {recipe.name!r}, which is for a denoiser's loop. It can in {known}: "
            f"--stage-recipe {stage}=fp16."
        )
    if recipe.calibrated:
        check_current(bundle, read_calibrated(bundle, recipe.name, stage))


def _plans(
    bundle: Bundle,
    stage: str,
    target: Target,
    library: str,
    recipe: Recipe,
    folder: Path,
    threads: int,
    progress: Progress,
    settings: Settings,
) -> dict[str, Plan]:
    entry, kit = bundle.manifest.stage(stage), open_kit(bundle, target.name, recipe.name, library, stage)
    spec, graph, made = entry.spec, entry.graph, builder_for(target, library) if kit is None else kit.builder
    if graph.weights is None:
        raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only.")
    if kit is None:
        bundle.path(graph.weights)  # checks the hash: the library reads the file by itself
    stored = StoredWeights(name=graph.weights, path=bundle.root / graph.weights, bytes=graph.weight_bytes)
    if entry.golden in bundle.manifest.files:
        feeds = dict(read_stage_golden(bundle, stage).inputs)
    else:
        feeds = {tensor.name: stand_in(tensor, spec.default_sizes()) for tensor in spec.inputs}
    progress(f"stage {stage} with {library} in {recipe.name}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lowered-") as scratch:
        lowered = (
            _lowered(bundle, stage, target, library, recipe, made.LOWERED, Path(scratch))
            if kit is None
            else kit.graphs[STEP]
        )
        job = Job(
            name=STEP,
            graph=lowered,
            recipe=recipe,
            target=target,
            library=library,
            ranges=input_ranges(graph.signature, spec),
            narrow=(),
            feeds=feeds,
            threads=threads,
            settings=settings,
            stored=stored if kit is None else None,
        )
        plan = remembered(bundle, made, job, folder, progress)
    check_achieved(bundle, recipe, library, plan.operators, stage)
    return {STEP: plan}


def _lowered(
    bundle: Bundle,
    stage: str,
    target: Target,
    library: str,
    recipe: Recipe,
    formats: Collection[Format],
    scratch: Path,
) -> Path:
    """The stage's graph in the recipe's format: itself where the library converts it, else one in ``scratch``."""
    if recipe.calibrated:
        return lower_calibrated(bundle, target, library, recipe, STEP, formats, scratch, stage=stage)
    graph = bundle.path(bundle.manifest.stage(stage).graph.file)
    if recipe.arithmetic not in formats:
        return graph
    try:
        import onnx_ir as ir

        from lehr.engines.graph.lowering.half import write_half
        from lehr.engines.graph.lowering.products import all_but_products
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    keep_high = audited_stage(bundle, stage, recipe.arithmetic)
    if Format.FP32 not in target.formats:  # no products in fp32: SM 7.5
        able = all_but_products(graph)
        if large := sorted(overflowing(bundle, stage, recipe.arithmetic) - able):
            raise InvalidInput(
                f"target {target.name!r} multiplies matrices in {recipe.arithmetic.value} only, and {len(large)} "
                f"products of stage {stage!r} leave its range, {large[0]!r} first. Choose a target that has fp32."
            )
        keep_high &= able
    dtype = ir.DataType.BFLOAT16 if recipe.arithmetic is Format.BF16 else ir.DataType.FLOAT16
    return write_half(graph, scratch, keep_high=keep_high, dtype=dtype)


def _sources(bundle: Bundle, stage: str, target: Target, recipe: Recipe, library: str) -> dict[str, str]:
    """SHA-256 of what an engine is made from; where it is finished from a kit, of what that was made from."""
    kit = find_kit(bundle, target.name, recipe.name, stage)
    if kit is not None and kit.library == library:
        return dict(kit.sources)
    return _made_from(bundle, stage, recipe, builder_for(target, library).LOWERED)


def _made_from(bundle: Bundle, stage: str, recipe: Recipe, formats: Collection[Format]) -> dict[str, str]:
    entry = bundle.manifest.stage(stage)
    names = {entry.graph.file, entry.graph.weights, *calibrated_files(bundle, recipe, formats, stage)}
    return {name: bundle.manifest.files[name].sha256 for name in sorted(filter(None, names))}


def _measured(bundle: Bundle, stage: str, recipe: Recipe, candidates: list[Candidate]) -> list[Measured]:
    """Engines of a stage against each other, on its golden inputs."""
    entry = bundle.manifest.stage(stage)
    golden = read_stage_golden(bundle, stage) if entry.golden in bundle.manifest.files else None
    sizes = entry.spec.default_sizes()
    feeds = golden.inputs if golden else {tensor.name: stand_in(tensor, sizes) for tensor in entry.spec.inputs}
    rows: dict[str, Measured] = {}
    running: dict[str, StageRunner] = {}

    def judge(candidate: Candidate) -> None:
        library, plan = candidate.library, candidate.plans[STEP]
        try:
            runner = StageRunner(entry.spec, backend(library).load(candidate.folder / plan.file, plan.options))
            runner(feeds)
            rows[library] = Measured(library=library)
            if golden is not None:
                errors = stage_errors(runner, golden)
                worst, limit = worst_output(errors, golden, recipe)
                rows[library] = Measured(library=library, max_rel_error=errors[worst], limit=limit)
        except (RunFailed, BundleError) as e:
            rows[library] = Measured(library=library, reason=str(e))
        else:
            running[library] = runner

    for candidate in candidates:
        judge(candidate)
    times = interleaved({name: partial(runner, feeds) for name, runner in running.items()})
    return [replace(rows[c.library], step_ms=times.get(c.library)) for c in candidates]
