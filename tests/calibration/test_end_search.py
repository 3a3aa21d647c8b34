"""Precision schedules as answers to a budget: the fewest exempt steps that keep it, where that is cheaper."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lehr.calibration import end_search
from lehr.calibration.budget import Losses, Measure, parse_budget
from lehr.calibration.cost_model import Costs, Source
from lehr.calibration.end_search import Switched, with_schedules
from lehr.calibration.problem import KEEP, Found, Point, Problem
from lehr.calibration.tracks import EvaluationError
from lehr.runtime.precision_schedule import Ends

STEPS = 20
FULL, CHEAP = 100.0, 25.0


def losses(psnr: float) -> Losses:
    return Losses(psnr_db=(psnr,) * 4, snr_db=(psnr,) * 4, ssim=(1.0,) * 4, cosine=(1.0,) * 4, score_error=0.01)


class Drawn:
    """Held-out samples whose PSNR grows by 2 dB with each exempt step at the end and by half with each at the start."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.reference, self.timestep = shift, "float32", float("nan")
        self.settings = SimpleNamespace(threads=1)
        self.spec = SimpleNamespace(timestep=SimpleNamespace(dtype=SimpleNamespace(numpy=np.dtype(np.float32))))
        self.table = SimpleNamespace(timesteps=np.linspace(1000, 50, STEPS))
        self.track = SimpleNamespace(calls=[SimpleNamespace(timestep=t) for t in self.table.timesteps])
        self.measured: list[tuple[int, int]] = []

    def measure(self, session: Switched, **_: Any) -> Losses:
        ends = session._ends
        self.measured.append((ends.first, ends.last))
        return losses(40 + 2 * ends.last + 0.5 * ends.first + self.shift)


def point(name: str, cost: float, psnr: float) -> Point:
    return Point(name=name, plan={"a": "int8"}, cost=cost, losses=losses(psnr))


def found_by_layers(price: float | None) -> tuple[Found, Problem]:
    budget = parse_budget("psnr>=45")
    chosen = None if price is None else point("hull 3/9", price, 45.2)
    points = (point("int8", CHEAP, 40.0), *([] if chosen is None else [chosen]))
    costs = Costs(source=Source.STATIC, unit="MAC", where="cpu", values={"a": {KEEP: FULL, "int8": CHEAP}})
    problem = Problem(
        budget=budget,
        able={"a": (KEEP, "int8")},
        uniform={"int8": {"a": "int8"}},
        costs=costs,
        apply=dict,  # type: ignore[arg-type]  # the plan stands for its graph
    )
    found = Found(
        budget=budget,
        chosen=chosen,
        confirmed=None if chosen is None else losses(45.1),
        best_uniform=None,
        best=points[-1],
        points=points,
        full_cost=FULL,
        sensitivity=None,
        singles={},
        finished=True,
    )
    return found, problem


def searched(price: float | None, *, shift: float = 0.0, longest: int = STEPS - 1) -> tuple[Found, Drawn]:
    select = Drawn()
    found, problem = found_by_layers(price)
    made = with_schedules(found, select, Drawn(shift), problem, longest=longest, progress=lambda _: None)  # type: ignore[arg-type]
    return made, select


EVALUATION = EvaluationError(score=0.01, sqnr_db=30.0)


@pytest.fixture(autouse=True)
def graphs_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_search, "OrtGraph", lambda graph, threads: graph)
    monkeypatch.setattr(end_search, "evaluation_errors", lambda _, track, __: [EVALUATION] * len(track.calls))


@pytest.mark.parametrize("price", [60.0, None])
def test_the_fewest_steps_that_keep_the_budget_are_exempt(price: float | None) -> None:
    made, select = searched(price)
    assert made.chosen is not None
    assert (made.chosen.end, made.chosen.steps) == ("last", 3)  # 40 + 3 x 2 dB
    assert made.chosen.cost == pytest.approx((3 * FULL + 17 * CHEAP) / STEPS)
    assert made.confirmed is not None
    assert made.confirmed.mean(Measure.PSNR) == 46
    assert made.confirmed.sqnr_db == (30.0,) * (STEPS - 3)  # of the evaluations that are quantised
    assert made.confirmed.score_error == pytest.approx(0.01 * 17 / 20)  # those at the end have none
    assert made.chosen.to_json()["schedule"] == {"last": 3}
    assert len(select.measured) < STEPS  # by bisection


def test_of_recipes_at_about_one_price_the_best_gets_the_schedule() -> None:
    found, problem = found_by_layers(60.0)
    points = (*found.points, point("int8-sq", CHEAP * 1.01, 44.0), point("int8-weight", CHEAP * 1.5, 44.9))
    uniform = {name: {"a": "int8"} for name in ("int8", "int8-sq", "int8-weight")}
    made = with_schedules(
        replace(found, points=points),
        Drawn(),  # type: ignore[arg-type]
        Drawn(),  # type: ignore[arg-type]
        replace(problem, uniform=uniform),
        longest=STEPS - 1,
        progress=lambda _: None,
    )
    assert made.chosen is not None
    assert made.chosen.name.startswith("int8-sq, last")


def test_a_choice_that_other_seeds_do_not_confirm_gets_more_steps() -> None:
    made, _ = searched(60.0, shift=-1.5)
    assert made.chosen is not None
    assert (made.chosen.end, made.chosen.steps) == ("last", 4)


def test_where_no_schedule_is_cheaper_the_mixture_of_layers_stays() -> None:
    made, select = searched(30.0)  # a single exempt step costs 28.75 and is not enough
    assert made.chosen is not None
    assert made.chosen.end is None
    assert made.chosen.name == "hull 3/9"
    assert select.measured == [(0, 1), (1, 0)]
    nothing, quiet = searched(28.0)
    assert nothing.chosen is not None
    assert nothing.chosen.end is None
    assert quiet.measured == []


def test_a_recipe_that_keeps_the_budget_by_itself_needs_no_schedule() -> None:
    found, problem = found_by_layers(CHEAP)
    good = replace(found, points=(point("int8", CHEAP, 46.0),))
    assert with_schedules(good, Drawn(), Drawn(), problem, longest=9, progress=lambda _: None) is good  # type: ignore[arg-type]


def test_the_switch_follows_the_place_in_the_loop() -> None:
    drawn = Drawn()
    timesteps = tuple(float(np.float32(t)) for t in drawn.table.timesteps)

    class Says:
        def __init__(self, word: str) -> None:
            self.word = word

        def run(self, feeds: Any) -> dict[str, Any]:
            return {self.word: feeds}

    ends = Ends(first=1, last=2, timesteps=timesteps)
    switched = Switched(drawn, ends, Says("middle"), Says("end"))  # type: ignore[arg-type]
    said = []
    for drawn.timestep in timesteps:
        said += list(switched.run({}))
    assert said == ["end", *["middle"] * (STEPS - 3), "end", "end"]
