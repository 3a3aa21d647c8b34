"""Build kits: lowering on one machine, compiling on the other.

TensorRT builds on the GPU that will run the engine, and graphs are lowered with onnx-ir, which boards as a rule have
not. So ``lehr build`` for such a target does its own half where it is asked and leaves a kit in the bundle
(:mod:`lehr.runtime.kits`), and the same command on the device finishes it. Which version of the library the device has
is not known beforehand: each graph stands there as it is and with attention in pieces, over the same weights.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lehr.engines.builders import TargetBuilder, candidates
from lehr.engines.ranges import Sized, input_ranges
from lehr.engines.settings import Settings, Weights
from lehr.engines.target import Target
from lehr.engines.tensorrt_family import TENSORRT, TensorRtBuilder
from lehr.runtime import host
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import STEP, rebuild_words
from lehr.runtime.errors import BuildFailed, BundleError, InvalidInput, MissingExtra
from lehr.runtime.kits import RECORD, KitRecord, find_kit, kit_folder
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.precision_schedule import graph_of
from lehr.runtime.recipe import Recipe

VARIANTS: tuple[frozenset[str], ...] = (frozenset(), frozenset({"Attention"}))  # operators in pieces

Lowered = Callable[[str, Path], Path]  # a plan's name and a scratch folder -> its graph in the recipe's format


def elsewhere(target: Target, recipe: Recipe, library: str = "auto") -> bool:
    """Whether an engine for ``target`` must be finished on another machine than this one.

    Raises:
        InvalidInput: the target cannot run the recipe, or has no such library.
    """
    target.check(recipe)
    if TENSORRT.module not in target.libraries or candidates(target, recipe, library)[0] != TENSORRT.module:
        return False
    right_kind = sys.platform in target.os and platform.machine() in target.arch
    return not right_kind or host.gpu_compute_capability() not in target.sm


def check_options(target: Target, recipe: Recipe, library: str, settings: Settings) -> None:
    """Raise InvalidInput for settings that the device would refuse, before it is asked."""
    candidates(target, recipe, library, settings)
    if settings.weights is Weights.STRIPPED:
        raise InvalidInput(
            "a stripped engine is refitted from a bundle's weights file, and a kit has weights of its own. Leave out "
            "--weights stripped."
        )


# ------------------------------------------------------------------------------------------------------- making one


def make(
    bundle: Bundle,
    target: Target,
    recipe: Recipe,
    *,
    plans: Mapping[str, GraphEntry],
    spec: Sized,
    lowered: Lowered,
    sources: Mapping[str, str],
    options: Sequence[str],
    stage: str | None = None,
) -> KitRecord:
    """Write a kit into the bundle; an older one of this target and recipe is replaced.

    Args:
        bundle: with weights.
        target: that builds with TensorRT.
        recipe: that it runs.
        plans: of the engine: name -> the graph that it comes from.
        spec: that the graphs' sizes follow from.
        lowered: makes a plan's graph in the recipe's format.
        sources: what the graphs are made of, by SHA-256.
        options: of the command line, which the device must be given as well.
        stage: that the engine will compute; None for the denoiser.

    Raises:
        BundleError: the bundle holds no weights.
        BuildFailed: a graph cannot be lowered.
        MissingExtra: onnx-ir is not installed.
    """
    try:
        import onnx_ir as ir

        from lehr.engines.graph.lowering.save import write_graph
        from lehr.engines.graph.weights import WEIGHTS_NAME
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    graphs: dict[str, dict[str, str]] = {}
    profiles: dict[str, Any] = {}
    with bundle.edit() as edit, tempfile.TemporaryDirectory(prefix="lehr-kit-") as scratch:
        into = edit.folder(kit_folder(target.name, recipe.name, stage))
        for name, graph in plans.items():
            if graph.weights is None:
                raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it with them.")
            bundle.path(graph.weights)  # checks the hash: the weights are read through the graph
            ranges = input_ranges(graph.signature, spec)
            profiles[name] = {key: given.to_json() for key, given in ranges.items()}
            graphs[name] = {}
            work = Path(scratch) / name
            work.mkdir()
            given = lowered(name, work)
            for pieces in VARIANTS:
                key = "+".join(sorted(pieces))
                read, made = work / f"read-{key}", work / f"made-{key}"
                for folder in (read, made):
                    folder.mkdir()
                readable = TENSORRT.readable(given, target, read, pieces)
                file = write_graph(ir.load(readable), made, f"{name}-in-pieces.onnx" if pieces else f"{name}.onnx")
                graphs[name][key] = _place(file, made / WEIGHTS_NAME, into / name).relative_to(into).as_posix()
            shutil.rmtree(work)
        record = KitRecord(
            target=target.name,
            recipe=recipe.name,
            recipe_version=recipe.version,
            library=TENSORRT.module,
            library_versions=target.versions.get(TENSORRT.module, ""),
            sources=dict(sources),
            graphs=graphs,
            profiles=profiles,
            command=(*rebuild_words(bundle, target.name, recipe.name, stage), *options),
            stage=stage,
        )
        edit.add_json(f"{record.folder}/{RECORD}", record.to_json())
    return record


def _place(graph: Path, weights: Path, folder: Path) -> Path:
    """Move a graph into ``folder``, beside weights that are there already if its own are the same."""
    number = 1
    place = folder
    while (place / weights.name).exists() and not _equal(place / weights.name, weights):
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    place.mkdir(exist_ok=True)
    if not (place / weights.name).exists():
        shutil.move(weights, place / weights.name)
    return Path(shutil.move(graph, place / graph.name))


def _equal(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as first, b.open("rb") as second:
        while chunk := first.read(1 << 20):
            if chunk != second.read(1 << 20):
                return False
    return True


# ---------------------------------------------------------------------------------------------------- finishing one


@dataclass(frozen=True, slots=True, kw_only=True)
class KitBuilder(TensorRtBuilder):
    """TensorRT's builder where every graph was lowered beforehand.

    Attributes:
        variants: path of a graph as it is -> its paths by the operators that are in pieces.
    """

    variants: Mapping[Path, Mapping[str, Path]]

    def readable(self, graph: Path, target: Target, scratch: Path, pieces: frozenset[str]) -> Path:
        """The kit's own copy; there is nothing to lower here."""
        found = self.variants[graph].get("+".join(sorted(pieces)))
        if found is None:
            raise BuildFailed(
                f"{self.title} needs {' and '.join(sorted(pieces))} of {graph.name} in pieces, and the kit for "
                f"{target.name} has no such graph. Make the kit again with a newer Lehr."
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """A kit to build from: the graphs, by name, and the builder that reads them."""

    record: KitRecord
    graphs: Mapping[str, Path]
    builder: TargetBuilder


def open_kit(bundle: Bundle, target: str, recipe: str, library: str, stage: str | None = None) -> Kit | None:
    """The bundle's kit for an engine of ``library``, its files checked; None if there is none.

    Raises:
        BundleError: a damaged kit, or one of other graphs or weights.
    """
    record = find_kit(bundle, target, recipe, stage)
    if record is None or record.library != library:
        return None
    for name in bundle.names(f"{record.folder}/"):
        bundle.path(name)  # weights are read by the library, so their hashes are checked here
    paths = {
        name: {key: bundle.path(f"{record.folder}/{file}") for key, file in files.items()}
        for name, files in record.graphs.items()
    }
    wanted = set(bundle.manifest.graphs) if stage is None else {STEP}
    bare = sorted(name for name in paths if "" not in paths[name])
    if absent := sorted(wanted ^ set(map(graph_of, paths))) or bare:
        raise BundleError(f"the build kit in {record.folder} has no graph {absent[0]!r}. Make it again.")
    builder = KitBuilder(
        module=TENSORRT.module,
        title=TENSORRT.title,
        extra=TENSORRT.extra,
        HEEDS=TENSORRT.HEEDS,
        CACHED=TENSORRT.CACHED,
        variants={files[""]: files for files in paths.values()},
    )
    return Kit(
        record=record,
        graphs={name: files[""] for name, files in paths.items()},
        builder=cast("TargetBuilder", builder),  # frozen, which the protocol's attributes are not
    )
