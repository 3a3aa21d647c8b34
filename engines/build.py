"""``lehr build``: from the portable graph in a bundle to an engine in the same bundle."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

from lehr.engines.target import Target
from lehr.runtime.backends import backend
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import BundleError, IncompatibleEngine, InvalidInput, UnknownName
from lehr.runtime.host import host, peak_rss_mb
from lehr.runtime.recipe import Recipe

GRAPH = "step"


def build(root: Path, target: Target, recipe: Recipe, *, library: str = "auto", threads: int = 0) -> EngineRecord:
    """Build an engine and record it; an older engine of the same name is replaced.

    Args:
        root: the bundle.
        target: the class of machine.
        recipe: how numbers are represented; checked against the target first.
        library: an engine library of the target, or "auto" for its first.
        threads: of the engine on CPUs; 0 is one a core.

    Raises:
        InvalidInput: the target has not the recipe's formats, or not the library.
        IncompatibleEngine: this machine is not of the target's kind.
        BundleError: the bundle holds no weights.
        BuildFailed: the engine library refuses the graph.
    """
    target.check(recipe)
    if threads < 0:
        raise InvalidInput(f"threads must be 0 (one a core) or more, got {threads}.")
    chosen = target.libraries[0] if library == "auto" else library
    if chosen not in target.libraries:
        raise UnknownName(f"engine library for target {target.name!r}", chosen, target.libraries)
    if sys.platform not in target.os or platform.machine() not in target.arch:
        raise IncompatibleEngine(
            f"this machine is {sys.platform} {platform.machine()}; target {target.name!r} is built on "
            f"{'/'.join(target.os)} {'/'.join(target.arch)}. Run lehr build on such a machine."
        )
    bundle = Bundle.open(root)
    graph = bundle.manifest.graphs[GRAPH]
    if graph.weights is None:
        raise BundleError(f"{root.name} holds structure only, no weights. Export it without --structure-only.")
    sources = [name for name in (graph.file, graph.weights) if bundle.path(name)]
    started = time.monotonic()
    version = backend(chosen).version()  # before the import below: raises MissingExtra with the pip line
    from lehr.engines import onnxruntime_cpu

    with bundle.edit() as edit:
        folder = f"engines/{target.name}--{recipe.name}--{chosen}-{version}"
        edit.remove(folder)
        directory = edit.folder(folder)
        built = onnxruntime_cpu.build(bundle.path(graph.file), bundle.manifest.model, directory, threads=threads)
        record = EngineRecord(
            target=target.name,
            recipe=recipe.name,
            recipe_version=recipe.version,
            library=chosen,
            library_version=version,
            host=host(),
            sources={name: bundle.manifest.files[name].sha256 for name in sources},
            plans={GRAPH: built.plan},
            options=built.options,
            achieved_precision=built.achieved_precision,
            operators=built.operators,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_mb=round(peak_rss_mb(), 1),
        )
        edit.add_json(f"{folder}/build.json", record.to_json())
    return record
