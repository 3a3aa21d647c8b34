"""Precision schedules as answers to a budget: a cheap recipe whose first or last steps are not quantised.

A layer-by-layer search changes what every step computes. Where the loss comes from a few steps, it is cheaper to exempt
those: with k of n steps in the dear format an evaluation costs (k full + (n - k) cheap) / n on average. The cheapest
uniform recipe that misses the budget (of several at about its price, the best) is tried so at either end. Since a step
more in the dear format loses less, bisection finds the fewest steps that keep the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from lehr.calibration.budget import Losses
from lehr.calibration.execute import OrtGraph, Session
from lehr.calibration.held_out import HeldOut
from lehr.calibration.problem import KEEP, Found, Point, Problem
from lehr.calibration.tracks import evaluation_errors, evaluation_losses
from lehr.runtime.precision_schedule import FIRST, LAST, Ends, steps_of

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

ALIKE = 1.05  # of the cheapest recipe's cost: recipes up to there differ in loss, not in price
BACK_OFFS = 3  # more steps that are tried where other seeds do not confirm the fewest


class Switched:
    """A step graph that another one stands in for at an end of the loop.

    Args:
        held_out: draws the loop, and knows where it is.
        ends: of a loop as held_out draws it.
        middle: computes what lies between the ends.
        end: computes the ends.
    """

    def __init__(self, held_out: HeldOut, ends: Ends, middle: Session, end: Session) -> None:
        self._held_out, self._ends, self._middle, self._end = held_out, ends, middle, end

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        at_end = self._ends.end_of(self._held_out.timestep, self._ends.timesteps) is not None
        return (self._end if at_end else self._middle).run(feeds)


def with_schedules(
    found: Found, select: HeldOut, confirm: HeldOut, problem: Problem, *, longest: int, progress: Progress
) -> Found:
    """What a search found, or a precision schedule if one keeps the budget at less cost.

    Args:
        found: by the search over layers.
        select: held-out seeds to choose by.
        confirm: those to confirm on.
        problem: that was searched.
        longest: steps that an end may have.
        progress: takes a line of text now and then.
    """
    budget = problem.budget
    missing = [p for p in found.points if p.name in problem.uniform and not budget.met(p.losses)]
    if not missing:
        return found  # the cheapest uniform recipe keeps the budget by itself
    cheap = ALIKE * min(point.cost for point in missing)
    base = max((p for p in missing if p.cost <= cheap), key=lambda point: (budget.margin(point.losses), -point.cost))
    price = found.full_cost if found.chosen is None else found.chosen.cost
    timesteps = _timesteps(select)

    def cost(steps: int) -> float:
        return (steps * found.full_cost + (len(timesteps) - steps) * base.cost) / len(timesteps)

    most = max((k for k in range(1, min(longest, len(timesteps) - 1) + 1) if cost(k) < price), default=0)
    if not most:
        return found
    graph = problem.apply({layer: option for layer, option in base.plan.items() if option != KEEP})
    session = OrtGraph(graph, threads=select.settings.threads)
    tried: dict[tuple[str, int], Point] = {}

    def measured(end: str, steps: int) -> Point:
        if (end, steps) not in tried:
            losses = _losses(select, session, end, steps, problem)
            name = f"{base.name}, {end} {steps} steps exempt"
            point = Point(name=name, plan=base.plan, cost=cost(steps), losses=losses, end=end, steps=steps)
            tried[end, steps] = point
            share = point.cost / found.full_cost
            progress(f"{name}: {budget.measure.value} {losses.mean(budget.measure):.4g} at {share:.3f} of the cost")
        return tried[end, steps]

    candidates = []
    for end in (LAST, FIRST):
        low, high = 1, most  # the fewest steps that keep the budget lie here, if any do
        if not budget.met(measured(end, most).losses):
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if budget.met(measured(end, middle).losses) else (middle + 1, high)
        candidates.append((high, end))
    result = replace(found, points=(*found.points, *tried.values()))
    for steps, end in sorted(candidates):
        for more in range(steps, min(steps + BACK_OFFS, most) + 1):
            point = measured(end, more)
            result = replace(result, points=(*found.points, *tried.values()))
            losses = _losses(confirm, session, end, more, problem, scored=True)
            value = losses.mean(budget.measure)
            progress(f"{point.name} on other seeds: {budget.measure.value} {value:.4g}")
            if budget.met(losses):
                return replace(result, chosen=point, confirmed=losses)
    return result


def _losses(
    held_out: HeldOut, middle: Session, end: str, steps: int, problem: Problem, *, scored: bool = False
) -> Losses:
    timesteps = _timesteps(held_out)
    ends = Ends(
        first=steps if end == FIRST else 0,
        last=steps if end == LAST else 0,
        timesteps=timesteps,
    )
    switched = Switched(held_out, ends, middle, held_out.reference)
    losses = held_out.measure(switched, budget=None if scored else problem.budget, scored=False)
    return losses if not (scored or problem.budget.measure.on_evaluations) else _scored(held_out, losses, middle, ends)


def _scored(held_out: HeldOut, losses: Losses, middle: Session, ends: Ends) -> Losses:
    """With the errors of single evaluations, at the ends none; SQNR is of those that are left."""
    errors = evaluation_errors(held_out, held_out.track, middle)
    exempt = [ends.end_of(call.timestep, ends.timesteps) is not None for call in held_out.track.calls]
    left = evaluation_losses([error for error, out in zip(errors, exempt, strict=True) if not out])
    share = 1 - sum(exempt) / len(exempt)
    return replace(losses, score_error=share * (left.score_error or 0.0), sqnr_db=left.sqnr_db)


def _timesteps(held_out: HeldOut) -> tuple[float, ...]:
    """Of the loop, as the network is given them."""
    kind = held_out.spec.timestep.dtype.numpy.type
    return steps_of(float(kind(t)) for t in held_out.table.timesteps)
