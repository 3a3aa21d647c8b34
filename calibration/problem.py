"""What a search for a cheap recipe is given, and what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.budget import Budget, Losses
from lehr.calibration.cost_model import Costs
from lehr.calibration.sensitivity import Sensitivity
from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[Any]
Plan = Mapping[str, str]
Apply = Callable[[Plan], ir.Model]

KEEP = "keep"  # the option that every layer has: as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is searched.

    Attributes:
        budget: to keep.
        able: layer -> its options, :data:`KEEP` first, in the order of the graph.
        uniform: name -> plan of each uniform recipe.
        costs: of layers by option.
        apply: makes the step graph of a plan.
        channel_weights: as of :func:`lehr.calibration.sensitivity.measure_sensitivity`.
    """

    budget: Budget
    able: Mapping[str, Sequence[str]]
    uniform: Mapping[str, Plan]
    costs: Costs
    apply: Apply
    channel_weights: Array | None = None

    def __post_init__(self) -> None:
        if not self.able:
            raise InvalidInput("no layer of the graph can be quantised, so there is nothing to search.")
        for layer, options in self.able.items():
            if KEEP not in options:
                raise InvalidInput(f"layer {layer!r} cannot stay as it is, which every layer must be able to.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan that was measured. ``name`` says how it was found.

    Attributes:
        cost: of an evaluation, on average over a loop.
        end: of a loop whose steps are not quantised, :data:`.FIRST` or :data:`.LAST`; None where all are alike.
        steps: how many these are.
    """

    name: str
    plan: Plan
    cost: float
    losses: Losses
    end: str | None = None
    steps: int = 0

    def to_json(self) -> dict[str, Any]:
        schedule = {} if self.end is None else {"schedule": {self.end: self.steps}}
        return {"name": self.name, "cost": self.cost, "plan": dict(self.plan), **schedule, **self.losses.summary()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        budget: that was asked for.
        chosen: the cheapest plan that keeps it on both folds of held-out seeds; None if there is none.
        confirmed: its losses on the seeds that had no part in the choice.
        best_uniform: the cheapest uniform recipe that keeps it on both; None if there is none.
        best: the plan that comes closest to the budget, of quantised ones; what to report where none keeps it.
        points: every plan that was measured.
        full_cost: of the graph with nothing quantised.
        sensitivity: by layer and timestep; None if the time ran out before.
        singles: (layer, option) -> measured mean squared error of final samples, where it was measured.
        finished: whether the search ended by itself rather than by its time limit.
    """

    budget: Budget
    chosen: Point | None
    confirmed: Losses | None
    best_uniform: Point | None
    best: Point
    points: tuple[Point, ...]
    full_cost: float
    sensitivity: Sensitivity | None
    singles: Mapping[tuple[str, str], float]
    finished: bool

    def front(self) -> tuple[Point, ...]:
        """The points that no other is both cheaper and better than, cheapest first."""
        good: list[Point] = []
        sign = 1.0 if self.budget.measure.higher_is_better else -1.0
        best = -math.inf
        for point in sorted(self.points, key=lambda p: (p.cost, -sign * p.losses.mean(self.budget.measure))):
            value = sign * point.losses.mean(self.budget.measure)
            if value > best:
                good.append(point)
                best = value
        return tuple(good)
