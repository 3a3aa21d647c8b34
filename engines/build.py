"""``lehr build``: from the portable graphs in a bundle to an engine in the same bundle."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.engines.audit import AUDIT, audited
from lehr.engines.builders import builder_for, candidates
from lehr.engines.choose import measure, with_spinning
from lehr.engines.compiling import remembered
from lehr.engines.job import Job
from lehr.engines.kit import make, open_kit
from lehr.engines.making import Work, make_engine
from lehr.engines.plans import asked_for
from lehr.engines.quantised import calibrated_files, check_achieved, lower_calibrated
from lehr.engines.ranges import input_ranges, narrow_ranges, narrow_sizes
from lehr.engines.settings import DEFAULT, Settings, Spinning, StoredWeights
from lehr.engines.target import Target
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.engine import STEP, EngineRecord, Plan
from lehr.runtime.errors import BundleError, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.hoisted import SHAPE_SUFFIX
from lehr.runtime.host import cpu_features
from lehr.runtime.kits import KitRecord, find_kit
from lehr.runtime.noise import batch_normal, standard_normal
from lehr.runtime.recipe import Format, Recipe, Scope
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

    Where "auto" leaves several libraries, or one whose threads may spin or sleep, all are tried and the fastest that
    meets parity stays (:mod:`lehr.engines.choose`); a library that cannot build is passed over as long as another can.

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
    versions = ready(target, recipe, library, threads, settings)
    bundle = Bundle.open(root)
    narrow_sizes(bundle.manifest.model, settings)  # raises before the work

    def compiled(name: str, folder: Path) -> dict[str, Plan]:
        return build_plans(bundle, target, name, recipe, folder, threads=threads, progress=progress, settings=settings)

    work = Work(
        stage=None,
        compile=compiled,
        measure=lambda built: measure(bundle, recipe, built, example_inputs(bundle.manifest.model)),
        sources=lambda name: _sources(bundle, target, name, recipe),
        variants=lambda built: with_spinning(built) if library == "auto" and settings.spinning is Spinning.AUTO else (),
    )
    return make_engine(bundle, work, target, recipe, versions)


def ready(target: Target, recipe: Recipe, library: str, threads: int, settings: Settings) -> dict[str, str]:
    """The versions of the libraries that will build, best first; raises what :func:`build` does before any work."""
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
    versions = {name: builder_for(target, name).version() for name in libraries}
    for name, version in versions.items():
        target.check_version(name, version)
    return versions


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
    for asked in asked_for(bundle.manifest.graphs, recipe):
        name, graph = asked.graph, bundle.manifest.graphs[asked.graph]
        if graph.weights is None:
            raise BundleError(
                f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only."
            )
        if kit is None:
            bundle.path(graph.weights)  # checks the hash: the library reads the file by itself
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lowered-") as scratch:
            lowered = (
                _lowered(bundle, target, library, name, asked.recipe, made.LOWERED, Path(scratch))
                if kit is None
                else kit.graphs[asked.plan]
            )
            job = Job(
                name=asked.plan,
                graph=lowered,
                recipe=asked.recipe,
                target=target,
                library=library,
                ranges=input_ranges(graph.signature, model, narrow),
                narrow=tuple(narrow_ranges(graph.signature, model, narrow)) if name in (STEP, LOOP) else (),
                feeds=feeds[name],
                threads=threads,
                settings=settings,
                stored=None if kit is not None else _stored(bundle, name),
            )
            plans[asked.plan] = remembered(bundle, made, job, folder, progress)
        if name == STEP:
            check_achieved(bundle, asked.recipe, library, plans[asked.plan].operators)
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
    matrices = recipe.scope is Scope.MATRICES
    no_fp32 = Format.FP32 not in target.formats  # no products in fp32, that is: SM 7.5 does the rest in it
    if recipe.arithmetic not in formats and not no_fp32 and not matrices:
        return graph
    try:
        import onnx_ir as ir

        from lehr.engines.graph.lowering.half import write_half
        from lehr.engines.graph.lowering.products import (
            all_but_matrices,
            all_but_products,
            high_in_copies,
            refuse_large_products,
        )
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    dtype = ir.DataType.BFLOAT16 if recipe.arithmetic is Format.BF16 else ir.DataType.FLOAT16
    if name not in (STEP, LOOP):
        return write_half(graph, scratch, keep_high=all_but_products(graph), dtype=dtype)
    step = bundle.path(bundle.manifest.graphs[STEP].file)
    keep_high = all_but_matrices(step) if matrices else audited(bundle, recipe.arithmetic.value)
    copied = step if name != STEP else None
    if no_fp32:
        refuse_large_products(bundle, recipe.arithmetic.value, target.name)
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
            tensor.name: known[tensor.name] if tensor.name in known else stand_in(tensor, sizes)
            for tensor in graph.signature.inputs
        }
        for name, graph in bundle.manifest.graphs.items()
    }


def stand_in(tensor: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """Numbers of no meaning for an input: for what another graph computes, and for a stage without golden data."""
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

    asked = asked_for(bundle.manifest.graphs, recipe)

    def lowered(plan: str, scratch: Path) -> Path:
        chosen = next(one for one in asked if one.plan == plan)
        formats = builder_for(target, library).LOWERED
        return _lowered(bundle, target, library, chosen.graph, chosen.recipe, formats, scratch)

    names = {name for graph in bundle.manifest.graphs.values() for name in (graph.file, graph.weights) if name}
    names |= calibrated_files(bundle, recipe, builder_for(target, library).LOWERED)  # raises before the work
    if AUDIT in names:
        for one in (recipe, *recipe.parts.values()):
            if AUDIT in calibrated_files(bundle, one, builder_for(target, library).LOWERED):
                audited(bundle, (one.rest if one.calibrated else one.arithmetic).value)
    sources = {name: bundle.manifest.known_files[name].sha256 for name in sorted(names)}
    return make(
        bundle,
        target,
        recipe,
        plans={one.plan: bundle.manifest.graphs[one.graph] for one in asked},
        spec=bundle.manifest.model,
        lowered=lowered,
        sources=sources,
        options=options,
    )
