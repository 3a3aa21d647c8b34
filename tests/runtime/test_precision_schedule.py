"""Places of evaluations in loops, and a network that another plan computes at the ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import InvalidInput
from lehr.runtime.hoisted import Residency, hoisted_denoiser
from lehr.runtime.paths import LinearFlow
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.precision_schedule import FIRST, LAST, Ends, graph_of, plan_of, steps_of
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.recipe import RECIPES, Recipe, Schedule
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import GraphSpec, ModelSpec, TensorSpec, Varies

Array = np.ndarray[Any, Any]
OWN = tuple(float(t) for t in range(1000, 0, -50))

SPEC = ModelSpec(
    name="toy",
    family="toy",
    inputs=(
        TensorSpec(name="sample", shape=("batch", 1, 4, 4), varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
    ),
    outputs=(TensorSpec(name="output", shape=("batch", 1, 4, 4), varies=Varies.SAMPLE),),
    prediction=Prediction(kind=PredictionKind.FLOW_PREDICTION),
    path=LinearFlow(),
    value_range=(-1.0, 1.0),
)


class Plan:
    """Predicts the sample times a factor, and counts how often."""

    def __init__(self, factor: float) -> None:
        self.factor, self.asked = factor, list[float]()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.asked.append(float(feeds["timestep"][0]))
        return {"output": feeds["sample"] * np.float32(self.factor)}


def network(ends: Ends, **factors: float) -> tuple[Denoiser, dict[str, Plan]]:
    plans = {name.replace("_", "."): Plan(factor) for name, factor in factors.items()}
    graph = GraphSpec(inputs=SPEC.inputs, outputs=SPEC.outputs)
    denoiser = hoisted_denoiser(SPEC, {"step": graph}, plans.__getitem__, residency=Residency.PHASES, ends=ends)
    return denoiser, plans


@given(first=st.integers(0, 8), last=st.integers(0, 8), steps=st.integers(1, 60))
def test_every_step_has_one_place_and_the_ends_have_their_number_of_steps(first: int, last: int, steps: int) -> None:
    if first + last == 0:
        first = 1
    ends = Ends(first=first, last=last, timesteps=OWN)
    loop = tuple(float(t) for t in np.linspace(999, 3, steps))
    places = [ends.end_of(t, loop) for t in loop]
    share = ends.share(steps)
    assert places.count(LAST) == min(last, steps) == round(share[LAST] * steps)
    assert places.count(FIRST) == min(first, steps - places.count(LAST)) == round(share[FIRST] * steps)
    assert places == sorted(places, key=[FIRST, None, LAST].index)


@given(t=st.floats(0, 1000), first=st.integers(1, 5), last=st.integers(1, 5))
def test_outside_of_a_loop_the_nearest_step_of_the_models_own_decides(t: float, first: int, last: int) -> None:
    ends = Ends(first=first, last=last, timesteps=OWN)
    nearest = min(OWN, key=lambda own: abs(own - t))
    assert ends.end_of(t) == ends.end_of(nearest, OWN) == ends.end_of(t, (2000.0, 3000.0))


def test_evaluations_at_one_timestep_are_one_step() -> None:
    table = solver_table("flow_heun", SPEC.path, SPEC.prediction, 10)
    assert len(table) > len(steps_of(table.timesteps)) >= 10
    ends = Ends(last=2, timesteps=OWN)
    loop = steps_of(table.timesteps)
    assert len({t for t in table.timesteps if ends.end_of(float(t), loop) == LAST}) == 2


def test_a_loop_is_computed_by_the_plans_of_its_places() -> None:
    ends = Ends(first=2, last=3, timesteps=OWN)
    denoiser, plans = network(ends, step=0.5, step_first=0.5, step_last=0.5)
    draw = Pipeline(denoiser)(Request(num=3, batch=2, num_inference_steps=10, sampler="flow_euler"))
    timesteps = solver_table("flow_euler", SPEC.path, SPEC.prediction, 10).timesteps.astype(np.float32).tolist()
    assert plans["step.first"].asked == timesteps[:2] * 2  # two batches
    assert plans["step.last"].asked == timesteps[-3:] * 2
    assert plans["step"].asked == timesteps[2:-3] * 2
    whole, _ = network(Ends(last=1, timesteps=OWN), step=0.5, step_last=0.5)
    same = Pipeline(whole)(Request(num=3, batch=3, num_inference_steps=10, sampler="flow_euler"))
    np.testing.assert_array_equal(draw, same)
    with denoiser.loop([10.0, 5.0]):
        pass
    before = len(plans["step"].asked)
    denoiser(np.zeros((1, 1, 4, 4), np.float32), 500.0, {})  # no loop any more: the middle of the model's own
    assert len(plans["step"].asked) == before + 1


def test_a_fault_in_one_end_changes_the_sample_and_only_there() -> None:
    ends = Ends(first=2, timesteps=OWN)
    request = Request(num=1, num_inference_steps=10, sampler="flow_euler")
    seen: dict[float, list[Array]] = {}
    for factor in (0.5, 0.25):
        denoiser, _ = network(ends, step=0.5, step_first=factor)
        seen[factor] = []
        Pipeline(denoiser)(request, on_step=lambda _, step, kept=seen[factor]: kept.append(step.output / step.sample))
    np.testing.assert_allclose([r.mean() for r in seen[0.25]], [0.25] * 2 + [0.5] * 8, rtol=1e-6)
    np.testing.assert_allclose([r.mean() for r in seen[0.5]], [0.5] * 10, rtol=1e-6)


def test_timesteps_of_several_places_in_one_evaluation_are_refused() -> None:
    from lehr.runtime.hoisted import HoistedNetwork

    graph = GraphSpec(inputs=SPEC.inputs, outputs=SPEC.outputs)
    scheduled = HoistedNetwork(SPEC, {"step": graph}, lambda _: Plan(1.0), ends=Ends(last=2, timesteps=OWN))
    with pytest.raises(InvalidInput, match=r"step, step\.last"):
        scheduled({"sample": np.zeros((2, 1, 4, 4), np.float32), "timestep": np.array([900, 50], np.float32)})


def test_names_of_plans_lead_back_to_their_graph() -> None:
    assert [plan_of(end) for end in (None, FIRST, LAST)] == ["step", "step.first", "step.last"]
    assert [graph_of(name) for name in ("step", "step.first", "step.last", "prompt", "loop")] == [
        *["step"] * 3,
        "prompt",
        "loop",
    ]


def test_a_scheduled_recipe_is_read_back_as_it_was_written() -> None:
    schedule = Schedule(ends=Ends(first=2, last=3, timesteps=OWN), first=RECIPES["bf16"], last=RECIPES["fp32"])
    made = Recipe(**{f: getattr(RECIPES["int8-sq"], f) for f in Recipe.__dataclass_fields__} | {"schedule": schedule})
    assert Recipe.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert {form.value for form in made.formats} == {"int8", "bf16", "fp32"}
    with pytest.raises(InvalidInput, match="schedule of its own"):
        Schedule(ends=Ends(last=1, timesteps=OWN), last=made)
    with pytest.raises(InvalidInput, match="steps for"):
        Schedule(ends=Ends(last=1, timesteps=OWN), first=RECIPES["fp32"])


@pytest.mark.parametrize(
    ("first", "last", "timesteps", "words"),
    [
        (0, 0, OWN, "1 step or more"),
        (-1, 2, OWN, "1 step or more"),
        (10, 10, OWN, "leave nothing"),
        (1, 1, (3.0, 3.0, 2.0), "differ"),
        (1, 1, (3.0, float("nan"), 2.0), "finite"),
    ],
)
def test_impossible_ends_are_refused(first: int, last: int, timesteps: tuple[float, ...], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Ends(first=first, last=last, timesteps=timesteps)
