"""The cheapest mixed recipe that keeps a loss budget.

A plan says for each layer which option it takes. Its cost is the sum over layers (:mod:`lehr.calibration.cost_model`),
and so, to first order, is its loss (:mod:`lehr.calibration.sensitivity`). The plans that minimise cost + m x loss for
some price m of a unit of loss are therefore found layer by layer, and they are the corners of the lower hull of all
plans. The search

1. measures the uniform recipes, the bar to pass;
2. predicts what each layer loses in each option, and measures the ones that weigh most in whole loops (where the
   budget is on single evaluations, these are measured, and nothing need be predicted);
3. finds the price at which a plan just keeps the budget, measuring each plan on held-out seeds;
4. takes single layers to cheaper options as long as the measured loss allows it;
5. confirms the result on seeds that had no part in the choice, and backs off if they disagree.

Everything but the clock is deterministic: without measured costs, and as long as the time limit is not reached, the
same inputs give the same plan.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lehr.calibration.budget import Losses
from lehr.calibration.execute import OrtGraph, Session
from lehr.calibration.held_out import HeldOut
from lehr.calibration.problem import KEEP, Found, Plan, Point, Problem
from lehr.calibration.sensitivity import Sensitivity, measure_sensitivity

Progress = Callable[[str], None]

MAX_SINGLES = 64  # layers and options that are measured by themselves in whole loops
BISECTIONS, MOVES, BACK_OFFS = 8, 24, 4
REFUSALS = 4  # moves in a row that miss the budget, after which no more are tried
LEAST_SAVING = 1e-3  # of the cost of a plan; a move that saves less is not worth measuring
RESERVE = 0.15  # of the time limit, for confirming what was found
GUARD_DB = 0.1  # further than a confirmation fell short, the next one aims


def silent(_: str) -> None:
    """Progress that nobody watches."""


def search(
    select: HeldOut,
    confirm: HeldOut,
    problem: Problem,
    *,
    time_limit: float | None = None,
    progress: Progress = silent,
) -> Found:
    """Find the cheapest plan that keeps the budget.

    Args:
        select: the seeds that candidates are measured on.
        confirm: other seeds, for what was chosen.
        problem: what is searched.
        time_limit: seconds, after which the best so far is confirmed and returned.
        progress: takes a line of text now and then.

    Raises:
        InvalidInput: nothing to search.
        OutOfTime: the limit passed before anything was measured.
    """
    return _Search(select, confirm, problem, time_limit, progress).run()


@dataclass(slots=True)
class _Search:
    select: HeldOut
    confirm: HeldOut
    problem: Problem
    time_limit: float | None
    progress: Progress
    points: dict[tuple[tuple[str, str], ...], Point] = field(default_factory=dict)
    confirmations: dict[tuple[tuple[str, str], ...], Losses] = field(default_factory=dict)
    singles: dict[tuple[str, str], float] = field(default_factory=dict)
    loss: dict[tuple[str, str], float] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    deadline: float | None = None
    guard: float = 0.0
    able: dict[str, Sequence[str]] = field(default_factory=dict)  # what is left to choose from

    def run(self) -> Found:
        if self.time_limit is not None:
            self.deadline = time.monotonic() + self.time_limit * (1 - RESERVE)
        self.able = dict(self.problem.able)
        nothing = dict.fromkeys(self.able, KEEP)
        finished = True
        try:
            for name, plan in self.problem.uniform.items():
                self._measure(name, {**nothing, **plan}, early=False)
            self._predict()
            chosen = self._choose()
        except _TimeIsUp:
            finished = False
            chosen = self._confirmed(self._feasible())
        uniform = [point for point in self._feasible() if point.name in self.problem.uniform]
        best_uniform = self._confirmed(uniform)
        if chosen is None or (best_uniform is not None and best_uniform.cost < chosen.cost):
            chosen = best_uniform or chosen
        points = tuple(self.points.values())
        return Found(
            budget=self.problem.budget,
            chosen=chosen,
            confirmed=None if chosen is None else self.confirmations[_key(chosen.plan)],
            best_uniform=best_uniform,
            best=max(points, key=lambda point: self.problem.budget.margin(point.losses)),
            points=points,
            full_cost=self.problem.costs.of(nothing),
            sensitivity=self.sensitivity,
            singles=self.singles,
            finished=finished,
        )

    # ------------------------------------------------------------------------------------------------ measuring

    def _measure(self, name: str, plan: Plan, *, early: bool = True) -> Point:
        """Losses of a plan on the seeds to choose by; ends early where the answer is clear."""
        key = _key(plan)
        if key not in self.points:
            self._check_time()
            graph = self.problem.apply(_quantised(plan))
            scored = self.problem.budget.measure.on_evaluations
            losses = self.select.measure(graph, budget=self.problem.budget if early else None, scored=scored)
            self.points[key] = Point(name=name, plan=dict(plan), cost=self.problem.costs.of(plan), losses=losses)
            point = self.points[key]
            measure = self.problem.budget.measure
            share = point.cost / self.problem.costs.of(dict.fromkeys(plan, KEEP))
            self.progress(f"{name}: {measure.value} {losses.mean(measure):.4g} at {share:.3f} of the cost")
        return self.points[key]

    def _meets(self, point: Point) -> bool:
        return self.problem.budget.margin(point.losses) >= self.guard

    def _feasible(self) -> list[Point]:
        """Measured plans that keep the budget, cheapest first."""
        kept = [point for point in self.points.values() if self.problem.budget.met(point.losses)]
        return sorted(kept, key=lambda point: point.cost)

    def _confirmed(self, candidates: Sequence[Point]) -> Point | None:
        """The first of some plans that keeps the budget on the other seeds too."""
        return next((point for point in candidates[:BACK_OFFS] if self._confirm(point)), None)

    def _confirm(self, point: Point) -> bool:
        key = _key(point.plan)
        if key not in self.confirmations:
            graph = self.problem.apply(_quantised(point.plan))
            self.confirmations[key] = self.confirm.measure(graph, scored=True)
            value = self.confirmations[key].mean(self.problem.budget.measure)
            self.progress(f"{point.name} on other seeds: {self.problem.budget.measure.value} {value:.4g}")
        return self.problem.budget.met(self.confirmations[key])

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _TimeIsUp

    # ------------------------------------------------------------------------------------------------ predicting

    def _predict(self) -> None:
        """What each layer loses in each option: predicted for all, measured in loops for those that weigh most."""
        dropped = self._dominated()
        options = {layer: [o for o in able if o != KEEP and o not in dropped] for layer, able in self.able.items()}
        options = {layer: able for layer, able in options.items() if able}
        self.able = {layer: (KEEP, *options.get(layer, ())) for layer in self.able}
        probe = max(self.points.values(), key=lambda point: self.problem.budget.margin(point.losses))
        self._check_time()
        self.progress(f"sensitivity of {len(options)} layers")
        alone = self.problem.budget.measure.on_evaluations  # then no loop tells more than an evaluation
        few = not alone and sum(map(len, options.values())) <= MAX_SINGLES
        self.sensitivity = found = measure_sensitivity(
            self.select,
            options,
            self.problem.apply,
            self.problem.apply(_quantised(probe.plan)),
            channel_weights=self.problem.channel_weights,
            deadline=self.deadline,
            also=self._single if few else None,
        )
        effect = (found.noise() if alone else found.effect()).mean(axis=-1)
        predicted = {
            (layer, option): float(effect[found.layers.index(layer), found.options.index(option)])
            for layer, able in options.items()
            for option in able
        }
        if any(math.isnan(value) for value in predicted.values()):
            raise _TimeIsUp
        for key in sorted(predicted, key=lambda k: (-predicted[k], k))[: 0 if alone else MAX_SINGLES]:
            if key not in self.singles:
                self._check_time()
                graph = OrtGraph(self.problem.apply(dict([key])), threads=self.select.settings.threads)
                self._single(*key, graph)
        self.loss = combined(predicted, self.singles)

    def _dominated(self) -> set[str]:
        """Options whose uniform recipe is no cheaper and loses more than another's, in no layer cheaper than it."""
        uniform = [point for point in self.points.values() if point.name in self.problem.uniform]
        margin, costs = self.problem.budget.margin, self.problem.costs.values

        def beaten(one: Point, other: Point) -> bool:
            both = [values for values in costs.values() if one.name in values and other.name in values]
            dearer = all(values[other.name] <= values[one.name] for values in both)
            everywhere = len(both) == sum(one.name in values for values in costs.values())
            return everywhere and dearer and margin(other.losses) > margin(one.losses)

        return {one.name for one in uniform if any(beaten(one, other) for other in uniform if other is not one)}

    def _single(self, layer: str, option: str, session: Session) -> None:
        """Measure the mean squared error of the track's final samples with one layer quantised."""
        track = self.select.track
        final = self.select.draw(session, range(len(track.final)))
        error = (final.astype(np.float64) - track.final) ** 2
        # The geometric mean over samples, as a mean of decibels takes it.
        each = error.mean(axis=tuple(range(1, error.ndim)))
        self.singles[layer, option] = float(np.exp(np.log(np.maximum(each, 1e-30)).mean()))

    # ------------------------------------------------------------------------------------------------ choosing

    def _choose(self) -> Point | None:
        for _ in range(BACK_OFFS):
            point = self._bisect()
            point = self._descend(point or self._nothing())
            if not _quantised(point.plan):
                return self._confirmed(self._feasible())
            if self._confirm(point):
                return point
            short = -self.problem.budget.margin(self.confirmations[_key(point.plan)])
            self.guard += short + (GUARD_DB if self.problem.budget.limit > 1 else 0.1 * short)
        return self._confirmed(self._feasible())

    def _bisect(self) -> Point | None:
        """The price of loss at which a plan just keeps the budget: the cheapest such plan of the lower hull."""
        plans = self._hull()
        low, high = 0, len(plans) - 1  # cheap and lossy first
        found: Point | None = None
        while low <= high:
            middle = (low + high) // 2
            point = self._measure(f"hull {middle + 1}/{len(plans)}", plans[middle])
            if self._meets(point):
                found, high = point, middle - 1
            else:
                low = middle + 1
        return found

    def _nothing(self) -> Point:
        """The plan that quantises nothing and loses nothing."""
        perfect = (999.0,)
        same = Losses(
            psnr_db=perfect, snr_db=perfect, ssim=(1.0,), cosine=(1.0,), score_error=0.0, sqnr_db=perfect, fid=0.0
        )
        plan = dict.fromkeys(self.problem.able, KEEP)
        return Point(name="nothing", plan=plan, cost=self.problem.costs.of(plan), losses=same)

    def _hull(self) -> list[dict[str, str]]:
        """Plans of the lower hull of cost against predicted loss, cheapest first."""
        plans = [dict.fromkeys(self.able, KEEP)]
        prices = sorted({price for layer in self.able for price in self._prices(layer)}, reverse=True)
        dearest = [2 * price for price in prices[:1]]
        for price in (*dearest, *(math.sqrt(a * b) for a, b in itertools.pairwise(prices))):
            plan = {layer: self._best(layer, price) for layer in self.able}
            if plan != plans[-1]:
                plans.append(plan)
        cheapest = {layer: self._best(layer, 0.0) for layer in self.able}
        if cheapest != plans[-1]:
            plans.append(cheapest)
        kept = [plan for plan in plans if any(option != KEEP for option in plan.values())]
        return thinned(kept[::-1], 1 << BISECTIONS)

    def _prices(self, layer: str) -> list[float]:
        """Prices of loss at which the layer changes its mind."""
        able, costs = self.able[layer], self.problem.costs.values[layer]
        pairs = [(self._lost(layer, o), costs[o]) for o in able]
        return [
            (cost_a - cost_b) / (loss_b - loss_a)
            for loss_a, cost_a in pairs
            for loss_b, cost_b in pairs
            if loss_b > loss_a and cost_a > cost_b
        ]

    def _best(self, layer: str, price: float) -> str:
        costs = self.problem.costs.values[layer]
        return min(self.able[layer], key=lambda o: (costs[o] + price * self._lost(layer, o), costs[o]))

    def _lost(self, layer: str, option: str) -> float:
        return 0.0 if option == KEEP else self.loss[layer, option]

    def _descend(self, point: Point) -> Point:
        """Take single layers to cheaper options, the one that saves most for its loss first, while the budget lasts."""
        refused: set[tuple[str, str]] = set()
        in_a_row = 0
        for number in range(MOVES):
            moves = self._moves(point, refused)
            if not moves or in_a_row == REFUSALS:
                break
            layer, option = moves[0]
            tried = self._measure(f"move {number + 1}", {**point.plan, layer: option})
            if self._meets(tried):
                point, in_a_row = tried, 0
            else:
                refused.add((layer, option))
                in_a_row += 1
        return point

    def _moves(self, point: Point, refused: set[tuple[str, str]]) -> list[tuple[str, str]]:
        """Single changes that save cost, best first by cost saved for predicted loss."""
        worth: list[tuple[float, str, str]] = []
        for layer, now in point.plan.items():
            costs = self.problem.costs.values[layer]
            for option in self.able[layer]:
                saved = costs[now] - costs[option]
                if saved < LEAST_SAVING * point.cost or (layer, option) in refused:
                    continue
                lost = self._lost(layer, option) - self._lost(layer, now)
                worth.append((-saved / max(lost, 1e-30), layer, option))
        return [(layer, option) for _, layer, option in sorted(worth)]


class _TimeIsUp(Exception):
    """The deadline passed; what is known is used."""


def combined(predicted: Mapping[tuple[str, str], float], measured: Mapping[tuple[str, str], float]) -> dict[Any, float]:
    """Losses by layer and option: measured where they are, else predicted and corrected.

    The correction is, option by option, the geometric mean of measured over predicted.
    """
    ratios: dict[str, list[float]] = {}
    for key, value in measured.items():
        if value > 0 and predicted[key] > 0:
            ratios.setdefault(key[1], []).append(math.log(value / predicted[key]))
    factor = {option: math.exp(sum(values) / len(values)) for option, values in ratios.items()}
    return {key: measured.get(key, value * factor.get(key[1], 1.0)) for key, value in predicted.items()}


def thinned(plans: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """At most ``most`` of some plans, evenly spread, the first and last among them."""
    if len(plans) <= most:
        return plans
    chosen = np.unique(np.rint(np.linspace(0, len(plans) - 1, most)).astype(int))
    return [plans[k] for k in chosen.tolist()]


def _quantised(plan: Plan) -> dict[str, str]:
    return {layer: option for layer, option in plan.items() if option != KEEP}


def _key(plan: Plan) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(plan.items()))
