"""``lehr calibrate``: from a recipe's name to its quantised step graph in the bundle.

Everything lands in ``calibration/<recipe>/`` (:mod:`lehr.runtime.calibrated`). The same bundle, data and settings give
the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lehr.calibration.configs import Config, config_to_json
from lehr.calibration.layers import layers
from lehr.calibration.observers import Statistics, observe
from lehr.calibration.quantize import CHOICES, quantize
from lehr.calibration.recipes import needs_grams, plan_of, resting_in
from lehr.calibration.trajectories import SAMPLES, Trajectories, collect, recorded
from lehr.engines.graph.lowering.save import write_graph
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import CALIBRATED_VERSION, GRAPH, RECORD, calibrated_folder
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.hoisted import STEP
from lehr.runtime.names import name_problem
from lehr.runtime.recipe import RECIPES, Format, Recipe, recipe

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
    on_step: OnStep | None = None,
) -> Calibration:
    """Calibrate a bundle for a shipped recipe.

    Args:
        bundle: holds weights.
        name: of the recipe.
        data: where calibration data comes from.
        rest: arithmetic of what is not quantised; by default the recipe's own.
        stored_as: another name for the result, for a variation of a recipe beside the recipe itself.
        on_step: told how far it is.

    Raises:
        UnknownName: no such recipe.
        InvalidInput: a recipe that needs no calibration, data that does not fit, or a name that is taken.
        BundleError: structure only, or damaged files.
        RunFailed: the float32 graph fails, or is not finite.
    """
    data = data or Data()
    shipped = recipe(name)
    step = step_graph(bundle)
    found = layers(step, sample=bundle.manifest.model.sample.name)
    plan = plan_of(name, found)
    chosen = shipped if rest is None else resting_in(shipped, rest)
    if stored_as is not None:
        chosen = renamed(chosen, stored_as)
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


def renamed(chosen: Recipe, name: str) -> Recipe:
    """The recipe under another name.

    Raises:
        InvalidInput: a shipped recipe's name, or one that is no folder's.
    """
    if name in RECIPES and name != chosen.name:
        raise InvalidInput(f"{name!r} is a shipped recipe. Choose a name of your own.")
    problem = name_problem(f"calibration/{name}") or ("it holds a slash" if "/" in name or "--" in name else None)
    if problem:
        raise InvalidInput(f"{name!r} cannot name a recipe: {problem}. Use letters, digits and single hyphens.")
    fields = {key: getattr(chosen, key) for key in chosen.__dataclass_fields__}
    return Recipe(**{**fields, "name": name})


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
    entry = bundle.manifest.graphs[STEP]
    names = [name for name in (entry.file, entry.weights) if name is not None]
    model = step_graph(bundle)
    count = len(layers(model, sample=bundle.manifest.model.sample.name))
    quantize(model, plan, statistics)
    choices = json.loads(model.metadata_props.pop(CHOICES))
    folder = calibrated_folder(chosen.name)
    record: dict[str, Any] = {
        **(more or {}),
        "version": CALIBRATED_VERSION,
        "recipe": {k: _plain(v) for k, v in asdict(chosen).items()},
        "sources": {name: bundle.manifest.files[name].sha256 for name in names},
        "data": dict(provenance),
        "statistics": statistics.digest,
        "plan": {name: config_to_json(config) for name, config in plan.items()},
        "choices": choices,
    }
    with bundle.edit() as edit:
        place = edit.folder(folder)
        write_graph(model, place, GRAPH)
        edit.add_json(f"{folder}/{RECORD}", record)
    kept = {name: bundle.manifest.files[name] for name in bundle.names(f"{folder}/")}
    weights = next((file.bytes for name, file in kept.items() if name.endswith(".safetensors")), 0)
    return Calibration(
        recipe=chosen,
        plan=dict(plan),
        layers=count,
        weight_bytes=weights,
        portable_bytes=_portable_bytes(bundle),
        files={name: file.sha256 for name, file in kept.items()},
        digest=statistics.digest,
    )


def _portable_bytes(bundle: Bundle) -> int:
    from lehr.engines.graph.weights import weight_bytes

    return weight_bytes(step_graph(bundle))


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _told(on_step: OnStep | None, what: str) -> Callable[[int, int], None] | None:
    return None if on_step is None else lambda done, total: on_step(what, done, total)
