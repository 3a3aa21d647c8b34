"""``lehr calibrate --budget``: from a stated loss to the cheapest mixed recipe that keeps it, in the bundle.

The result is a calibrated recipe like any other (:mod:`lehr.calibration.calibrate`), under the name ``mixed`` or one of
the user's. Beside it stand what the search measured (``search.json``), the Pareto front (``front.png``) and the map of
layers against timesteps (``sensitivity.png``, ``sensitivity.npz``).
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from PIL import Image

from lehr.calibration.budget import LEAST_FID, Budget, Measure
from lehr.calibration.calibrate import Calibration, Data, gather, provenance, store
from lehr.calibration.collected import cache_folder
from lehr.calibration.configs import Config
from lehr.calibration.cost_model import Choices, Costs, Source, static_costs
from lehr.calibration.end_search import with_schedules
from lehr.calibration.ends import EndAsked, own_steps, with_ends
from lehr.calibration.execute import OrtGraph, step_graph
from lehr.calibration.held_out import STEPS, Fold, HeldOut, Settings
from lehr.calibration.layers import Layer, layers
from lehr.calibration.observers import Statistics, observe
from lehr.calibration.options import as_options, options_of, recipes_for, roundable
from lehr.calibration.pictures import draw_front, draw_sensitivity
from lehr.calibration.problem import KEEP, Found, Plan, Problem
from lehr.calibration.quantize import quantize
from lehr.calibration.recipes import MIXED, mixed_recipe, needs_grams, plan_of, renamed
from lehr.calibration.search import Progress, search, silent
from lehr.calibration.timing import few_rows, measured_costs, step_milliseconds
from lehr.calibration.tracks import evaluation_errors
from lehr.engines.feature_network import ImageNetwork
from lehr.engines.portable import portable_denoiser
from lehr.engines.target import Target
from lehr.runtime import golden
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import calibrated_folder
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import RECIPES, Format
from lehr.runtime.verify import step_errors

Array = npt.NDArray[Any]

SLACK_DB, SLACK_FACTOR = 3.0, 2.0  # what an engine may differ from the emulated graph before parity fails it


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a search is asked for.

    Attributes:
        budget: the loss to keep.
        target: the class of machine, whose formats are searched; None for this machine's processor.
        costs: the static model, or layers timed on this machine.
        name: of the result in the bundle.
        rest: arithmetic of what is not quantised.
        seed: chooses the held-out samples.
        num, steps: held-out samples, and steps of the sampler.
        time_limit: seconds for the search; calibration data comes on top.
        threads: of ONNX Runtime; 0 is one a core.
        channel_weights: as of :func:`lehr.calibration.sensitivity.measure_sensitivity`.
        folder: where results are kept between runs; by default the user's cache.
        features: ONNX file of the network in whose features a budget on fid is measured.
    """

    budget: Budget
    target: Target | None = None
    costs: Source = Source.STATIC
    name: str = MIXED
    rest: Format = Format.FP32
    seed: int = 0
    num: int = 64
    steps: int = STEPS
    time_limit: float | None = 600.0
    threads: int = 0
    channel_weights: Array | None = None
    folder: Path | None = None
    features: Path | None = None

    def __post_init__(self) -> None:
        if self.budget.measure is Measure.FID:
            if self.features is None:
                raise InvalidInput(
                    "a budget on fid needs the network whose features are compared, and none is known for this model: "
                    "name an ONNX file, --features FILE.onnx."
                )
            if self.num < LEAST_FID:
                raise InvalidInput(
                    f"the distance of {self.num} samples says little about their distribution; draw at least "
                    f"{LEAST_FID} (--held-out {LEAST_FID})."
                )
        if self.time_limit is not None and not self.time_limit > 0:
            raise InvalidInput(f"the time limit must be positive, got {self.time_limit:g} seconds.")
        if self.costs is Source.MEASURED and self.target is not None and self.target.sm:
            raise InvalidInput(
                f"costs of {self.target.where} cannot be measured on this machine; search with the static costs "
                "(--costs static)."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgeted:
    """What became of a wish.

    Attributes:
        found: what the search found.
        costs: that it searched by.
        calibration: what was stored; None where no recipe keeps the budget, or the bundle cannot be written.
        milliseconds: library -> graph -> of one evaluation on this machine: "fp32", the best uniform recipe, "mixed".
        front, heat_map: pictures; no map where the time ran out before it was known.
        seconds: of the search.
    """

    found: Found
    costs: Costs
    calibration: Calibration | None
    milliseconds: Mapping[str, Mapping[str, float]]
    front: Image.Image
    heat_map: Image.Image | None
    seconds: float


def calibrate_to_budget(
    bundle: Bundle, wish: Wish, *, data: Data | None = None, progress: Progress = silent
) -> Budgeted:
    """Find and store the cheapest mixed recipe that keeps a budget.

    Args:
        bundle: holds weights.
        wish: what is asked for.
        data: where calibration data comes from.
        progress: takes a line of text now and then.

    Raises:
        InvalidInput: a target without quantised formats, a name that is taken, calibration data that does not fit.
        OutOfTime: the time limit passed before anything was measured.
        BundleError: structure only, or damaged files.
        RunFailed: the float32 graph fails.
    """
    data = data or Data(threads=wish.threads)
    if wish.name != MIXED and wish.name in RECIPES:
        raise InvalidInput(f"{wish.name!r} is a shipped recipe. Choose a name of your own.")
    sizes = bundle.manifest.model.default_sizes(batch=2)
    found = layers(step_graph(bundle), sizes, sample=bundle.manifest.model.sample.name)
    uniform = {name: plan_of(name, found) for name in recipes_for(wish.target, wish.rest, found)}
    choices = options_of(found, tuple(uniform))
    progress(f"{len(choices)} layers, recipes {', '.join(uniform)}")
    trajectories = gather(bundle, data)
    grams = [name for name, options in choices.items() if needs_grams(options)]
    statistics = observe(bundle, trajectories, grams=grams, threads=wish.threads)
    choices = roundable(choices, statistics)
    apply = applied(bundle, choices, statistics)
    settings = Settings(num=wish.num, steps=wish.steps, seed=wish.seed, threads=wish.threads)
    place = (wish.folder or cache_folder().parent) / "held-out"
    network = ImageNetwork(wish.features) if wish.features and wish.budget.measure is Measure.FID else None
    select = HeldOut(bundle, settings, cache=place, features=network)
    confirm = HeldOut(bundle, replace(settings, fold=Fold.CONFIRM), cache=place, features=network)
    feeds = few_rows(select.track.calls[0].feeds, len(select.track.calls[0].sample))
    started = time.monotonic()
    costs = static_costs(found, choices, target=wish.target, rest=wish.rest)
    if wish.costs is Source.MEASURED:
        costs = _timed(wish, found, choices, apply, feeds, progress) or costs
        choices = {
            layer: {o: c for o, c in able.items() if o in costs.values[layer]} for layer, able in choices.items()
        }
    recipes = {name: as_options(plan, choices) for name, plan in uniform.items()}
    problem = Problem(
        budget=wish.budget,
        able={name: tuple(options) for name, options in choices.items()},
        uniform={name: plan for name, plan in recipes.items() if plan},
        costs=costs,
        apply=apply,
        channel_weights=wish.channel_weights,
    )
    result = search(select, confirm, problem, time_limit=wish.time_limit, progress=progress)
    if result.finished:
        longest = len(own_steps(bundle)) - 1
        result = with_schedules(result, select, confirm, problem, longest=longest, progress=progress)
    seconds = time.monotonic() - started
    milliseconds = _latencies(result, apply, feeds, wish.threads)
    front = draw_front(result, costs, bundle.manifest.model.name)
    heat_map = None
    if result.sensitivity is not None:
        heat_map = draw_sensitivity(result.sensitivity, bundle.manifest.model.name)
    budgeted = Budgeted(
        found=result,
        costs=costs,
        calibration=None,
        milliseconds=milliseconds,
        front=front,
        heat_map=heat_map,
        seconds=seconds,
    )
    if result.chosen is None or result.confirmed is None:
        return budgeted
    plan = chosen_plan(result.chosen.plan, choices)
    recipe = mixed_recipe(
        MIXED,
        plan,
        psnr_db=result.confirmed.worst(Measure.PSNR) - SLACK_DB,
        rel_error=max(1e-3, SLACK_FACTOR * worst_score_error(bundle, select, apply(_quantised(result.chosen.plan)))),
        rest=wish.rest,
    )
    recipe = recipe if wish.name == MIXED else renamed(recipe, wish.name)
    if result.chosen.end is not None:
        ends = {result.chosen.end: EndAsked(steps=result.chosen.steps, recipe=wish.rest.value)}
        recipe = with_ends(bundle, recipe, ends, wish.name)
    more = {"search": {"budget": str(wish.budget), "seed": wish.seed, "samples": wish.num, "steps": wish.steps}}
    kept = store(bundle, recipe, plan, statistics, provenance=provenance(trajectories), more=more)
    _keep(bundle, wish.name, budgeted)
    return replace(budgeted, calibration=kept)


def worst_score_error(bundle: Bundle, held_out: HeldOut, graph: ir.Model) -> float:
    """Of single evaluations, as parity judges an engine: on the recorded steps, else on a held-out loop."""
    session = OrtGraph(graph, threads=held_out.settings.threads)
    if golden.INDEX_FILE in bundle.manifest.files:
        denoiser = portable_denoiser(bundle, lambda: session, threads=held_out.settings.threads)
        return max(step_errors(denoiser, golden.read(bundle)))
    return max(error.score for error in evaluation_errors(held_out, held_out.track, session))


def _quantised(plan: Plan) -> dict[str, str]:
    return {layer: option for layer, option in plan.items() if option != KEEP}


def applied(bundle: Bundle, choices: Choices, statistics: Statistics) -> Callable[[Plan], ir.Model]:
    """A function from plans to step graphs."""

    def apply(plan: Plan) -> ir.Model:
        return quantize(step_graph(bundle), chosen_plan(plan, choices), statistics)

    return apply


def chosen_plan(plan: Plan, choices: Choices) -> dict[str, Config]:
    """Layer -> configuration, of the layers that are quantised."""
    return {layer: choices[layer][option] for layer, option in plan.items() if option != KEEP}


# -------------------------------------------------------------------------------------------------------- clocks


def _timed(
    wish: Wish,
    found: tuple[Layer, ...],
    choices: Choices,
    apply: Callable[[Plan], ir.Model],
    feeds: Mapping[str, Array],
    progress: Progress,
) -> Costs | None:
    options = dict.fromkeys(option for able in choices.values() for option in able)
    plans = {
        option: {layer: option for layer, able in choices.items() if option in able and option != KEEP}
        for option in options
    }
    progress("timing layers")
    limit = None if wish.time_limit is None else time.monotonic() + wish.time_limit / 4
    graphs = {option: _maker(apply, plan) for option, plan in plans.items()}
    return measured_costs(graphs, found, choices, feeds, reference=KEEP, threads=wish.threads, deadline=limit)


def _maker(apply: Callable[[Plan], ir.Model], plan: Plan) -> Callable[[], ir.Model]:
    return lambda: apply(plan)


def _latencies(
    found: Found, apply: Callable[[Plan], ir.Model], feeds: Mapping[str, Array], threads: int
) -> dict[str, dict[str, float]]:
    graphs: dict[str, Callable[[], ir.Model]] = {"fp32": _maker(apply, {})}
    for label, point in ((None, found.best_uniform), ("mixed", found.chosen)):
        if point is not None:
            graphs[label or point.name] = _maker(apply, _quantised(point.plan))
    return step_milliseconds(graphs, feeds, threads=threads)


# -------------------------------------------------------------------------------------------------------- keeping


def report(budgeted: Budgeted) -> dict[str, Any]:
    """What the search found, as JSON."""
    found = budgeted.found
    return {
        "budget": str(found.budget),
        "met": found.chosen is not None,
        "finished": found.finished,
        "seconds": round(budgeted.seconds, 1),
        "full_cost": found.full_cost,
        "chosen": None if found.chosen is None else found.chosen.to_json(),
        "confirmed": None if found.confirmed is None else found.confirmed.summary(),
        "best_uniform": None if found.best_uniform is None else found.best_uniform.to_json(),
        "best": found.best.to_json(),
        "front": [point.to_json() for point in found.front()],
        "measured": len(found.points),
        "sensitivity": None
        if found.sensitivity is None
        else {"layers": list(found.sensitivity.layers), "options": list(found.sensitivity.options)},
        "costs": budgeted.costs.to_json(),
        "milliseconds": {library: dict(times) for library, times in budgeted.milliseconds.items()},
    }


def _keep(bundle: Bundle, name: str, budgeted: Budgeted) -> None:
    """Store what belongs to the search. Times are in ``search.json`` alone, so all else is the same again."""
    folder = calibrated_folder(name)
    with bundle.edit() as edit:
        edit.add_json(f"{folder}/search.json", report(budgeted))
        edit.add_bytes(f"{folder}/front.png", png(budgeted.front))
        if budgeted.heat_map is not None and budgeted.found.sensitivity is not None:
            edit.add_bytes(f"{folder}/sensitivity.png", png(budgeted.heat_map))
            edit.add_arrays(f"{folder}/sensitivity.npz", budgeted.found.sensitivity.to_arrays())


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    pixels = io.BytesIO()
    picture.save(pixels, format="PNG")
    return pixels.getvalue()


def plan_digest(plan: Plan) -> str:
    """SHA-256 of a plan, to compare two searches by."""
    return hashlib.sha256(repr(sorted(plan.items())).encode()).hexdigest()


def histogram(plan: Plan) -> dict[str, int]:
    """Option -> how many layers take it."""
    names = list(plan.values())
    return {option: names.count(option) for option in dict.fromkeys(names)}


def saved(found: Found) -> float | None:
    """Share of the best uniform recipe's cost that the chosen plan saves; None without either."""
    if found.chosen is None or found.best_uniform is None:
        return None
    return float(np.clip(1 - found.chosen.cost / found.best_uniform.cost, -1, 1))
