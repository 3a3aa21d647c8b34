"""``lehr calibrate``: from a recipe's name to its quantised step graph in the bundle.

Everything lands in ``calibration/<recipe>/`` (:mod:`lehr.runtime.calibrated`). The same bundle, data and settings give
the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lehr.calibration.collected import Trajectories
from lehr.calibration.configs import Config, config_to_json
from lehr.calibration.ends import EndAsked, sources_of_ends, with_ends
from lehr.calibration.layers import layers
from lehr.calibration.observers import Statistics, observe
from lehr.calibration.quantize import CHOICES, quantize
from lehr.calibration.recipes import needs_grams, plan_of, renamed, resting_in
from lehr.calibration.recorded import recorded
from lehr.calibration.trajectories import SAMPLES, collect
from lehr.engines.graph.lowering.save import write_graph
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import CALIBRATED_VERSION, GRAPH, RECORD, calibrated_folder
from lehr.runtime.errors import BundleError
from lehr.runtime.hoisted import STEP
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.recipe import Format, Recipe, recipe

OnStep = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Where calibration data comes from.

    Attributes:
        path: recorded inputs, an ``.npz`` or a folder of them; None to draw samples.
        num, steps, seed: of the samples that are drawn; see :func:`lehr.calibration.trajectories.collect`.
        folder: where the data is kept between runs; by default the user's cache.
        threads: of ONNX Runtime; 0 is one a core.
    """

    path: Path | None = None
    num: int = SAMPLES
    steps: int | None = None
    seed: int = 0
    folder: Path | None = None
    threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was calibrated.

    Attributes:
        recipe: its name is that of the folder in the bundle.
        plan: layer -> configuration.
        layers: how many layers the graph has.
        weight_bytes: of the quantised step graph, and ``portable_bytes`` of the portable one.
        files: name -> SHA-256, in the bundle.
        digest: of the statistics.
    """

    recipe: Recipe
    plan: Mapping[str, Config]
    layers: int
    weight_bytes: int
    portable_bytes: int
    files: Mapping[str, str]
    digest: str


def calibrate(
    bundle: Bundle,
    name: str,
    *,
    data: Data | None = None,
    rest: Format | None = None,
    stored_as: str | None = None,
    ends: Mapping[str, EndAsked] | None = None,
    on_step: OnStep | None = None,
) -> Calibration:
    """Calibrate a bundle for a shipped recipe.

    Args:
        bundle: holds weights.
        name: of the recipe.
        data: where calibration data comes from.
        rest: arithmetic of what is not quantised; by default the recipe's own.
        stored_as: another name for the result, for a variation of a recipe beside the recipe itself.
        ends: other recipes for the first or last steps of a loop; a recipe that needs no calibration may have them,
            too, and then nothing is drawn.
        on_step: told how far it is.

    Raises:
        UnknownName: no such recipe.
        InvalidInput: a recipe that needs no calibration, data that does not fit, or a name that is taken.
        BundleError: structure only, or damaged files.
        RunFailed: the float32 graph fails, or is not finite.
    """
    data = data or Data()
    shipped = recipe(name)
    if ends and not shipped.calibrated:
        return store_schedule(bundle, with_ends(bundle, shipped, ends, stored_as))
    step = step_graph(bundle)
    found = layers(step, sample=bundle.manifest.model.sample.name)
    plan = plan_of(name, found)
    chosen = shipped if rest is None else resting_in(shipped, rest)
    if stored_as is not None:
        chosen = renamed(chosen, stored_as)
    if ends:
        chosen = with_ends(bundle, chosen, ends, stored_as)
    trajectories = gather(bundle, data, on_step)
    statistics = observe(
        bundle, trajectories, grams=needs_grams(plan), threads=data.threads, on_step=_told(on_step, "observing")
    )
    return store(bundle, chosen, plan, statistics, provenance=provenance(trajectories))


def step_graph(bundle: Bundle) -> ir.Model:
    """The portable step graph, its weights' hash checked.

    Raises:
        BundleError: structure only, or damaged files.
    """
    entry = bundle.manifest.graphs[STEP]
    if entry.weights is None:
        raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only.")
    bundle.path(entry.weights)
    return ir.load(bundle.path(entry.file))


def gather(bundle: Bundle, data: Data, on_step: OnStep | None = None) -> Trajectories:
    """Calibration data: recorded by the user, or drawn; raises as :func:`.collect` and :func:`.recorded` do."""
    if data.path is not None:
        return recorded(bundle, data.path, folder=data.folder)
    return collect(
        bundle,
        num=data.num,
        steps=data.steps,
        seed=data.seed,
        threads=data.threads,
        folder=data.folder,
        on_step=_told(on_step, "drawing"),
    )


def provenance(trajectories: Trajectories) -> dict[str, Any]:
    """Where the data came from, for the record."""
    return {
        "source": trajectories.source,
        "samples": trajectories.samples,
        "evaluations": len(trajectories.timesteps),
        "conditions": trajectories.conditions,
        "digest": trajectories.digest,
    }


def store(
    bundle: Bundle,
    chosen: Recipe,
    plan: Mapping[str, Config],
    statistics: Statistics,
    *,
    provenance: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Calibration:
    """Quantise a bundle's step graph by a plan and keep it under the recipe's name.

    Args:
        bundle: the result replaces one of the same recipe.
        chosen: the recipe; its formats say what an engine library must know.
        plan: layer -> configuration.
        statistics: of the bundle's step graph.
        provenance: where the data came from (:func:`provenance`).
        more: further fields of ``recipe.json``, of a search for instance.

    Raises:
        InvalidInput: the plan does not fit the graph, or another process is writing to the bundle.
        RunFailed: the disk is full.
    """
    model = step_graph(bundle)
    count = len(layers(model, sample=bundle.manifest.model.sample.name))
    quantize(model, plan, statistics)
    files = write_quantised(
        bundle,
        chosen,
        model,
        plan,
        bundle.manifest.graphs[STEP],
        more={
            **(more or {}),
            "sources": sources_of_ends(bundle, chosen),
            "data": dict(provenance),
            "statistics": statistics.digest,
        },
    )
    return Calibration(
        recipe=chosen,
        plan=dict(plan),
        layers=count,
        weight_bytes=weight_bytes_of(bundle, files),
        portable_bytes=_portable_bytes(bundle),
        files=files,
        digest=statistics.digest,
    )


def write_quantised(
    bundle: Bundle,
    chosen: Recipe,
    model: ir.Model,
    plan: Mapping[str, Config],
    entry: GraphEntry,
    *,
    more: Mapping[str, Any],
    stage: str | None = None,
) -> dict[str, str]:
    """Keep a quantised graph under the recipe's name, of the denoiser or of a stage.

    Args:
        bundle: the result replaces one of the same recipe.
        chosen: the recipe.
        model: as :func:`.quantize` left it.
        plan: layer -> configuration.
        entry: the portable graph that it was made from.
        more: further fields of ``recipe.json``; ``sources`` beside the graph's own.
        stage: whose graph it is; None for the denoiser's.

    Returns:
        The files in the bundle, with their SHA-256.

    Raises:
        InvalidInput: another process is writing to the bundle.
        RunFailed: the disk is full.
    """
    names = [name for name in (entry.file, entry.weights) if name is not None]
    own = {name: bundle.manifest.files[name].sha256 for name in names}
    folder = calibrated_folder(chosen.name, stage)
    record: dict[str, Any] = {
        **more,
        "version": CALIBRATED_VERSION,
        "recipe": chosen.to_json(),
        "sources": own | dict(more.get("sources", {})),
        "plan": {name: config_to_json(config) for name, config in plan.items()},
        "choices": json.loads(model.metadata_props.pop(CHOICES)),
    }
    with bundle.edit() as edit:
        place = edit.folder(folder)
        write_graph(model, place, GRAPH)
        edit.add_json(f"{folder}/{RECORD}", record)
    return {name: bundle.manifest.files[name].sha256 for name in bundle.names(f"{folder}/")}


def weight_bytes_of(bundle: Bundle, files: Iterable[str]) -> int:
    """Size of the weights among files of a bundle."""
    return sum(bundle.manifest.files[name].bytes for name in files if name.endswith(".safetensors"))


def store_schedule(bundle: Bundle, chosen: Recipe) -> Calibration:
    """Keep a recipe whose own graph is the portable one: its precision schedule is all there is to keep.

    Raises:
        InvalidInput: another process is writing to the bundle.
        RunFailed: the disk is full.
    """
    entry = bundle.manifest.graphs[STEP]
    names = [name for name in (entry.file, entry.weights) if name is not None]
    record = {
        "version": CALIBRATED_VERSION,
        "recipe": chosen.to_json(),
        "sources": {name: bundle.manifest.files[name].sha256 for name in names} | sources_of_ends(bundle, chosen),
    }
    folder, portable = calibrated_folder(chosen.name), _portable_bytes(bundle)
    with bundle.edit() as edit:
        for old in bundle.names(f"{folder}/"):
            edit.remove(old)
        edit.add_json(f"{folder}/{RECORD}", record)
    return Calibration(
        recipe=chosen,
        plan={},
        layers=len(layers(step_graph(bundle), sample=bundle.manifest.model.sample.name)),
        weight_bytes=portable,
        portable_bytes=portable,
        files={name: bundle.manifest.files[name].sha256 for name in bundle.names(f"{folder}/")},
        digest="",
    )


def _portable_bytes(bundle: Bundle) -> int:
    from lehr.engines.graph.weights import weight_bytes

    return weight_bytes(step_graph(bundle))


def _told(on_step: OnStep | None, what: str) -> Callable[[int, int], None] | None:
    return None if on_step is None else lambda done, total: on_step(what, done, total)
