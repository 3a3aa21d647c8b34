"""``lehr build``: from the portable graphs in a bundle to an engine in the same bundle."""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.engines.audit import AUDIT, audited
from lehr.engines.builders import builder_for, candidates
from lehr.engines.choose import Candidate, Measured, fastest, measure
from lehr.engines.compiling import Job, remembered
from lehr.engines.kit import make, open_kit
from lehr.engines.quantised import calibrated_files, check_achieved, lower_calibrated
from lehr.engines.ranges import input_ranges, narrow_ranges, narrow_sizes
from lehr.engines.settings import DEFAULT, Settings, StoredWeights
from lehr.engines.target import Target
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.engine import STEP, EngineRecord, Plan, engine_folder, engine_folders
from lehr.runtime.errors import BuildFailed, BundleError, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.hoisted import SHAPE_SUFFIX
from lehr.runtime.host import cpu_features, host, peak_rss_mb
from lehr.runtime.kits import KitRecord, find_kit
from lehr.runtime.noise import batch_normal, standard_normal
from lehr.runtime.recipe import RECIPES, Format, Recipe
from lehr.runtime.spec import DType, ModelSpec, TensorSpec
from lehr.runtime.whole_loop import LOOP, WITHOUT

Array = npt.NDArray[Any]

EXAMPLE_BATCH = 2

Progress = Callable[[str], None]


def silent(_: str) -> None:
    """Progress that nobody watches."""


def build(
    root: Path,
    target: Target,
    recipe: Recipe,
    *,
    library: str = "auto",
    threads: int = 0,
    progress: Progress = silent,
    settings: Settings = DEFAULT,
) -> EngineRecord:
    """Build an engine and record it; older engines of this target and recipe are replaced.

    Where "auto" leaves several libraries, all of them build and the fastest that meets parity stays
    (:mod:`lehr.engines.choose`); one that cannot build is passed over as long as another can.

    Args:
        root: the bundle.
        target: the class of machine.
        recipe: how numbers are represented; checked against the target first.
        library: an engine library of the target, or "auto".
        threads: of the engine on CPUs, of the build elsewhere; 0 is one a core.
        progress: takes a line of text now and then, from libraries whose builds take long.
        settings: what else may be decided; a library that has no use for one of them is not taken.

    Raises:
        InvalidInput: the target, its library or this processor has not the recipe's formats, or Lehr has no builder
            for the target, or the library's version is out of the target's range, or a setting does not fit.
        IncompatibleEngine: this machine is not of the target's kind.
        BundleError: the bundle holds no weights.
        BuildFailed: the engine library refuses a graph, or no library meets parity.
    """
    target.check(recipe)
    if threads < 0:
        raise InvalidInput(f"threads must be 0 (one a core) or more, got {threads}.")
    libraries = candidates(target, recipe, library, settings)
    if sys.platform not in target.os or platform.machine() not in target.arch:
        raise IncompatibleEngine(
            f"this machine is {sys.platform} {platform.machine()}; target {target.name!r} is built on "
            f"{'/'.join(target.os)} {'/'.join(target.arch)}. Run lehr build on such a machine."
        )
    target.check_machine(recipe, cpu_features())
    bundle = Bundle.open(root)
    started = time.monotonic()
    narrow_sizes(bundle.manifest.model, settings)  # raises before the work
    versions = {name: builder_for(target, name).version() for name in libraries}
    for name, version in versions.items():
        target.check_version(name, version)
    with bundle.edit() as edit:
        replaced = set(engine_folders(bundle, target.name, recipe.name))
        for old in replaced:
            edit.remove(old)
        edit.set_manifest(parity={k: v for k, v in bundle.manifest.parity.items() if k not in replaced})
        folders = {name: engine_folder(target.name, recipe.name, name, versions[name]) for name in libraries}
        into = {name: edit.folder(folder) for name, folder in folders.items()}
        built, failed = _build_all(bundle, target, recipe, into, threads, progress, settings)
        chosen, rows = _chosen(bundle, recipe, built, failed)
        for name in libraries:
            if name != chosen.library:
                edit.remove(folders[name])
        record = EngineRecord(
            target=target.name,
            recipe=recipe.name,
            recipe_version=recipe.version,
            library=chosen.library,
            library_version=versions[chosen.library],
            host=_host(target),
            sources=_sources(bundle, target, chosen.library, recipe),
            plans=chosen.plans,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_mb=round(max(peak_rss_mb(), *(_peak(plan) for plan in chosen.plans.values())), 1),
            candidates=tuple(row.to_json() for row in rows),
        )
        edit.add_json(f"{record.folder}/build.json", record.to_json())
    return record


def _host(target: Target) -> dict[str, Any]:
    """What an engine depends on of the machine that built it; one for a GPU does not depend on the processor's."""
    return {key: value for key, value in host().items() if not target.sm or key in ("os", "arch")}


def _peak(plan: Plan) -> float:
    """Memory of a plan's build in MB, where it had a process of its own; else 0."""
    return float(plan.options.get("build_peak_mb", 0))


def _build_all(
    bundle: Bundle,
    target: Target,
    recipe: Recipe,
    folders: Mapping[str, Path],
    threads: int,
    progress: Progress,
    settings: Settings,
) -> tuple[list[Candidate], dict[str, BuildFailed]]:
    """Engines by the libraries that can build one, and what stopped the others."""
    built: list[Candidate] = []
    failed: dict[str, BuildFailed] = {}

    def attempt(name: str, folder: Path) -> None:
        try:
            plans = build_plans(
                bundle, target, name, recipe, folder, threads=threads, progress=progress, settings=settings
            )
        except BuildFailed as e:
            failed[name] = e
        else:
            built.append(Candidate(library=name, folder=folder, plans=plans))

    for name, folder in folders.items():
        attempt(name, folder)
    return built, failed


def _chosen(
    bundle: Bundle, recipe: Recipe, built: list[Candidate], failed: Mapping[str, BuildFailed]
) -> tuple[Candidate, list[Measured]]:
    """The engine to keep, and the table of what was tried; the table is empty if there was one library."""
    if not built:
        raise next(iter(failed.values()))
    if len(built) == 1 and not failed:
        return built[0], []
    rows = measure(bundle, recipe, built, example_inputs(bundle.manifest.model))
    rows += [Measured(library=name, reason=str(error)) for name, error in failed.items()]
    best = fastest(rows)
    if best is None:
        tried = "; ".join(
            f"{r.library}: {r.reason or f'score error {r.max_rel_error:.2e}, limit {r.limit:.2e}'}" for r in rows
        )
        raise BuildFailed(f"no library's {recipe.name} engine meets parity ({tried}). Choose one with --library.")
    return next(c for c in built if c.library == best), rows


def build_plans(
    bundle: Bundle,
    target: Target,
    library: str,
    recipe: Recipe,
    folder: Path,
    *,
    threads: int,
    progress: Progress = silent,
    settings: Settings = DEFAULT,
) -> dict[str, Plan]:
    """Compile every graph of a bundle with one library; all but "step" run rarely and compute in fp32."""
    kit = open_kit(bundle, target.name, recipe.name, library)
    made, feeds, plans = builder_for(target, library) if kit is None else kit.builder, example_feeds(bundle), {}
    model = bundle.manifest.model
    narrow = narrow_sizes(model, settings)
    for name, graph in bundle.manifest.graphs.items():
        if graph.weights is None:
            raise BundleError(
                f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only."
            )
        if kit is None:
            bundle.path(graph.weights)  # checks the hash: the library reads the file by itself
        chosen = recipe if name in (STEP, LOOP) else RECIPES["fp32"]
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lowered-") as scratch:
            lowered = (
                _lowered(bundle, target, library, name, chosen, made.LOWERED, Path(scratch))
                if kit is None
                else kit.graphs[name]
            )
            job = Job(
                name=name,
                graph=lowered,
                recipe=chosen,
                target=target,
                library=library,
                ranges=input_ranges(graph.signature, model, narrow),
                narrow=tuple(narrow_ranges(graph.signature, model, narrow)) if name in (STEP, LOOP) else (),
                feeds=feeds[name],
                threads=threads,
                settings=settings,
                stored=None if kit is not None else _stored(bundle, name),
            )
            plans[name] = remembered(bundle, made, job, folder, progress)
    check_achieved(bundle, recipe, library, plans[STEP].operators)
    return plans


def _stored(bundle: Bundle, name: str) -> StoredWeights | None:
    graph = bundle.manifest.graphs[name]
    if graph.weights is None:
        return None
    return StoredWeights(name=graph.weights, path=bundle.root / graph.weights, bytes=graph.weight_bytes)


def _lowered(
    bundle: Bundle, target: Target, library: str, name: str, recipe: Recipe, formats: Collection[Format], scratch: Path
) -> Path:
    """A graph in the recipe's format: itself where the library converts it, else one of its own in ``scratch``."""
    if recipe.calibrated:
        return lower_calibrated(bundle, target, library, recipe, name, formats, scratch)
    graph = bundle.path(bundle.manifest.graphs[name].file)
    no_fp32 = Format.FP32 not in target.formats  # no products in fp32, that is: SM 7.5 does the rest in it
    if recipe.arithmetic not in formats and not no_fp32:
        return graph
    try:
        import onnx_ir as ir

        from lehr.engines.graph.lowering.half import write_half
        from lehr.engines.graph.lowering.products import all_but_products, high_in_copies, refuse_large_products
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    dtype = ir.DataType.BFLOAT16 if recipe.arithmetic is Format.BF16 else ir.DataType.FLOAT16
    if name not in (STEP, LOOP):
        return write_half(graph, scratch, keep_high=all_but_products(graph), dtype=dtype)
    keep_high = audited(bundle, recipe.name)
    copied = bundle.path(bundle.manifest.graphs[STEP].file) if name != STEP else None
    if no_fp32:
        refuse_large_products(bundle, recipe.name, target.name)
        if copied is not None:
            keep_high, copied = high_in_copies(graph, copied, keep_high), None
        keep_high &= all_but_products(graph)
    return write_half(graph, scratch, keep_high=keep_high, dtype=dtype, copied=copied)


def example_inputs(spec: ModelSpec) -> dict[str, Array]:
    """Inputs of the whole model: batch 2, the middle of the path, noise for the rest."""
    sample = batch_normal(0, range(EXAMPLE_BATCH), spec.sample_shape(EXAMPLE_BATCH)[1:])
    middle = spec.path.timestep_of([1.0]).astype(spec.timestep.dtype.numpy)
    return {
        spec.sample.name: sample.astype(spec.sample.dtype.numpy),
        spec.timestep.name: middle.repeat(EXAMPLE_BATCH),
        **synthetic_conditions(spec, EXAMPLE_BATCH, seed=0),
    }


def example_feeds(bundle: Bundle) -> dict[str, dict[str, Array]]:
    """Inputs to look at each graph with, by the graph's name."""
    spec = bundle.manifest.model
    sizes = spec.default_sizes(batch=EXAMPLE_BATCH)
    known = example_inputs(spec)
    known[spec.sample.name + SHAPE_SUFFIX] = np.array(known[spec.sample.name].shape)
    known |= {name + WITHOUT: value for name, value in known.items()}  # a whole loop's second half of guidance
    return {
        name: {
            tensor.name: known[tensor.name] if tensor.name in known else _handed_over(tensor, sizes)
            for tensor in graph.signature.inputs
        }
        for name, graph in bundle.manifest.graphs.items()
    }


def _handed_over(tensor: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """A stand-in for what another graph computes."""
    shape = tensor.sizes(sizes)
    if tensor.dtype in (DType.FLOAT32, DType.FLOAT16):
        return standard_normal(0, 0, shape).astype(tensor.dtype.numpy)
    return np.ones(shape, dtype=tensor.dtype.numpy)


def _sources(bundle: Bundle, target: Target, library: str, recipe: Recipe) -> dict[str, str]:
    """SHA-256 of every graph and weights file, and of the audit that lowering reads, as the manifest has it."""
    kit = find_kit(bundle, target.name, recipe.name)
    if kit is not None and kit.library == library:
        return dict(kit.sources)
    names = {name for graph in bundle.manifest.graphs.values() for name in (graph.file, graph.weights) if name}
    names |= calibrated_files(bundle, recipe, builder_for(target, library).LOWERED)
    return {name: bundle.manifest.files[name].sha256 for name in sorted(names)}


def build_kit(root: Path, target: Target, recipe: Recipe, *, options: Sequence[str] = ()) -> KitRecord:
    """Do the half of a build that needs no GPU, and leave the rest in the bundle for the machine that has it.

    Args:
        root: the bundle.
        target: that builds on its own machine (:func:`lehr.engines.kit.elsewhere`).
        recipe: that it runs.
        options: of the command line, which the other machine must be given as well.

    Raises:
        BundleError: the bundle holds no weights, or was packed without its graphs.
        InvalidInput: the recipe needs an audit that the bundle has not.
        BuildFailed: a graph cannot be lowered.
    """
    bundle = Bundle.open(root)
    library = candidates(target, recipe)[0]

    def lowered(name: str, scratch: Path) -> Path:
        chosen = recipe if name in (STEP, LOOP) else RECIPES["fp32"]
        return _lowered(bundle, target, library, name, chosen, builder_for(target, library).LOWERED, scratch)

    names = {name for graph in bundle.manifest.graphs.values() for name in (graph.file, graph.weights) if name}
    names |= calibrated_files(bundle, recipe, builder_for(target, library).LOWERED)  # raises before the work
    if AUDIT in names:
        audited(bundle, recipe.rest.value if recipe.calibrated else recipe.name)
    sources = {name: bundle.manifest.known_files[name].sha256 for name in sorted(names)}
    return make(bundle, target, recipe, lowered=lowered, sources=sources, options=options)
