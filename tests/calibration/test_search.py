"""The search: what it finds on problems whose best answer is known, and what it keeps in a bundle."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.calibration import budgeted
from lehr.calibration import search as module
from lehr.calibration.budget import Budget, Losses, Measure
from lehr.calibration.budgeted import saved
from lehr.calibration.configs import Int8, Keep, WeightOnly
from lehr.calibration.cost_model import GPU, Costs, Source, bits, rates, static_costs
from lehr.calibration.execute import OrtGraph, step_graph
from lehr.calibration.held_out import HeldOut, Settings
from lehr.calibration.layers import Kind, Layer, layers
from lehr.calibration.options import as_options, options_of, recipes_for
from lehr.calibration.pictures import draw_front
from lehr.calibration.problem import KEEP, Found, Problem
from lehr.calibration.recipes import plan_of
from lehr.calibration.search import combined, search, thinned
from lehr.calibration.tracks import evaluation_errors, evaluation_losses
from lehr.commands.calibrate import command
from lehr.engines.target import target
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import read_calibrated
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import Format

# ------------------------------------------------------------------------------------------------ known answers


class Additive:
    """Held-out samples of a network whose layers' errors add up exactly; the graph of a plan is the plan itself."""

    def __init__(self, errors: Mapping[tuple[str, str], float], shift_db: float = 0.0, seconds: float = 0.0) -> None:
        self.errors, self.shift_db, self.seconds, self.measured = errors, shift_db, seconds, 0
        self.track = SimpleNamespace(final=np.zeros((2, 1)))

    def psnr(self, plan: Mapping[str, str]) -> float:
        error = sum(self.errors[item] for item in plan.items())
        return 99.0 if error == 0 else float(10 * np.log10(1 / error)) - self.shift_db

    def draw(self, error: float, numbers: Sequence[int]) -> Any:
        return np.full((len(numbers), 1), error**0.5)

    def measure(self, plan: Mapping[str, str], **_: Any) -> Losses:
        self.measured += 1
        time.sleep(self.seconds)
        value = self.psnr(plan)
        four = (value,) * 4
        return Losses(psnr_db=four, snr_db=four, ssim=(1.0,) * 4, cosine=(1.0,) * 4, score_error=0.01, sqnr_db=four)


def additive(
    errors: Mapping[tuple[str, str], float],
    costs: Mapping[str, Mapping[str, float]],
    limit: float,
    measure: Measure = Measure.PSNR,
) -> tuple[Problem, Additive]:
    able = {layer: tuple(options) for layer, options in costs.items()}
    names = dict.fromkeys(option for options in able.values() for option in options if option != KEEP)
    problem = Problem(
        budget=Budget(measure=measure, limit=limit),
        able=able,
        uniform={name: dict.fromkeys(able, name) for name in names},
        costs=Costs(source=Source.STATIC, unit="MAC", where="cpu", values=costs),
        apply=dict,  # type: ignore[arg-type]  # the plan stands for its graph
    )
    return problem, Additive(errors)


@pytest.fixture(autouse=True)
def exact_predictions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensitivities of the additive network are its errors; bundles measure their own."""
    measured = module.measure_sensitivity

    def exact(select: Any, options: Mapping[str, Sequence[str]], apply: Any, probe: Any, **rest: Any) -> Any:
        if not isinstance(select, Additive):
            return measured(select, options, apply, probe, **rest)
        kinds = tuple(dict.fromkeys(o for able in options.values() for o in able))
        for layer, able in options.items():
            for option in able:
                if rest["also"] is not None:
                    rest["also"](layer, option, select.errors[layer, option])
        effect = np.array([[[select.errors.get((layer, o), np.nan)] for o in kinds] for layer in options])
        return SimpleNamespace(layers=tuple(options), options=kinds, effect=lambda: effect, noise=lambda: effect)

    monkeypatch.setattr(module, "measure_sensitivity", exact)


def problem_of(seed: int, limit: float, count: int = 5, measure: Measure = Measure.PSNR) -> tuple[Problem, Additive]:
    draw = np.random.default_rng(seed)
    layers_ = [f"l{k}" for k in range(count)]
    errors: dict[tuple[str, str], float] = {}
    costs: dict[str, dict[str, float]] = {}
    for name in layers_:
        size, weight = draw.uniform(1, 20), 10 ** draw.uniform(-6, -3)
        errors |= {(name, "w8"): weight, (name, "i8"): weight * draw.uniform(3, 300)}
        costs[name] = {KEEP: size, "w8": size * 0.8, "i8": size * 0.3}
    return additive(errors, costs, limit, measure)


def cheapest(problem: Problem, network: Additive) -> float:
    plans = (dict(zip(problem.able, pick, strict=True)) for pick in itertools.product(*problem.able.values()))
    kept = [
        problem.costs.of(p)
        for p in plans
        if network.psnr({k: v for k, v in p.items() if v != KEEP}) >= problem.budget.limit
    ]
    return min(kept)


@given(st.integers(0, 10**6), st.floats(22, 55), st.sampled_from([Measure.PSNR, Measure.SQNR]))
@settings(max_examples=25)
def test_what_is_found_keeps_the_budget_and_is_close_to_the_cheapest_there_is(
    seed: int, limit: float, measure: Measure
) -> None:
    problem, network = problem_of(seed, limit, measure=measure)
    found = search(network, network, problem)  # type: ignore[arg-type]
    if found.chosen is None:
        assert found.full_cost <= 1.25 * cheapest(problem, network)  # nothing that is much cheaper keeps it
        return
    assert found.finished
    assert found.confirmed is not None
    assert found.confirmed.mean(measure) >= limit
    assert bool(found.singles) == (measure is Measure.PSNR)  # single layers draw samples for a budget on samples
    assert found.chosen.cost <= 1.25 * cheapest(problem, network)
    if found.best_uniform is not None:
        assert found.chosen.cost <= found.best_uniform.cost
        assert saved(found) == pytest.approx(1 - found.chosen.cost / found.best_uniform.cost)


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_a_looser_budget_never_costs_more_than_single_layers_can_say(seed: int) -> None:
    costs = []
    for limit in (24.0, 30.0, 36.0, 42.0):
        problem, network = problem_of(seed, limit, count=8)
        found = search(network, network, problem)  # type: ignore[arg-type]
        costs.append(found.full_cost if found.chosen is None else found.chosen.cost)
    largest = max(options[KEEP] for options in problem.costs.values.values())
    assert all(a <= b + largest for a, b in itertools.pairwise(costs))
    assert costs[0] < costs[-1]


def test_the_same_problem_is_answered_alike_each_time() -> None:
    first, second = (search(n, n, p) for p, n in (problem_of(7, 33.0), problem_of(7, 33.0)))  # type: ignore[arg-type]
    assert first.chosen is not None
    assert first.chosen == second.chosen
    assert first.points == second.points


def test_a_budget_that_nothing_keeps_gives_the_best_reachable() -> None:
    problem, network = problem_of(3, 90.0)
    found = search(network, network, problem)  # type: ignore[arg-type]
    assert found.chosen is None
    assert found.best_uniform is None
    assert found.best.losses.mean(Measure.PSNR) == max(p.losses.mean(Measure.PSNR) for p in found.points)


def test_a_choice_that_other_seeds_contradict_is_given_up() -> None:
    problem, network = problem_of(11, 30.0)
    stricter = Additive(network.errors, shift_db=6.0)
    found = search(network, stricter, problem)  # type: ignore[arg-type]
    assert found.chosen is not None
    assert stricter.psnr({k: v for k, v in found.chosen.plan.items() if v != KEEP}) >= 30.0
    alone = search(network, network, problem)  # type: ignore[arg-type]
    assert alone.chosen is not None
    assert found.chosen.cost > alone.chosen.cost


def test_a_time_limit_ends_the_search_with_what_is_known() -> None:
    problem, network = problem_of(5, 30.0, count=12)
    slow = Additive(network.errors, seconds=0.05)
    started = time.monotonic()
    found = search(slow, slow, problem, time_limit=0.2)  # type: ignore[arg-type]
    assert time.monotonic() - started < 1.0
    assert not found.finished
    whole = Additive(network.errors)
    search(whole, whole, problem)  # type: ignore[arg-type]
    assert slow.measured < whole.measured


def test_the_front_holds_no_point_that_another_beats() -> None:
    problem, network = problem_of(2, 33.0)
    found: Found = search(network, network, problem)  # type: ignore[arg-type]
    front = found.front()
    values = [(point.cost, point.losses.mean(Measure.PSNR)) for point in front]
    assert values == sorted(values)
    for point in found.points:
        if point not in front:
            assert any(c <= point.cost and v >= point.losses.mean(Measure.PSNR) for c, v in values)
    assert draw_front(found, problem.costs, "net").size == (760, 460)


def test_predictions_are_corrected_by_what_was_measured() -> None:
    predicted = {("a", "x"): 1.0, ("b", "x"): 4.0, ("c", "x"): 2.0, ("c", "y"): 5.0}
    given_ = combined(predicted, {("a", "x"): 10.0, ("b", "x"): 40.0})
    assert given_ == pytest.approx({("a", "x"): 10.0, ("b", "x"): 40.0, ("c", "x"): 20.0, ("c", "y"): 5.0})
    assert thinned([{"a": str(k)} for k in range(9)], 3) == [{"a": "0"}, {"a": "4"}, {"a": "8"}]


# ---------------------------------------------------------------------------------------------------- the costs


def layer(macs: int, parameters: int) -> Layer:
    return Layer(
        name="l",
        kind=Kind.MATMUL,
        group="",
        inputs=("x",),
        output="y",
        weight="w",
        weight_shape=(parameters,),
        nbytes=4 * parameters,
        macs=macs,
        roles=frozenset(),
    )


def test_static_costs_are_multiplications_and_bytes_of_each_format() -> None:
    choices = {"l": {KEEP: Keep(), "int8": Int8(), "w4": WeightOnly(format=Format.INT4, block=32)}}
    values = static_costs([layer(1000, 10)], choices).values["l"]
    assert values == pytest.approx({KEEP: 1000 + 40 * 6.4, "int8": 250 + 10 * 6.4, "w4": 1000 + 10 * 5 / 8 * 6.4})
    assert bits(WeightOnly(format=Format.NVFP4), Format.NVFP4) == 4.5
    assert rates(target("h100")) is GPU


def test_layers_may_take_what_recipes_would_make_of_them_whatever_their_role(dit_bundle: Path) -> None:
    found = layers(step_graph(Bundle.open(dit_bundle)))
    names = recipes_for(None, Format.FP32, found)
    assert "int8" in names
    assert "fp8" not in names
    choices = options_of(found, names)
    assert all(next(iter(options)) == KEEP for options in choices.values())
    assert any(one.roles and one.name in choices for one in found)
    attention = [set(choices[one.name]) for one in found if one.kind is Kind.ATTENTION]
    assert attention
    assert all(options == {KEEP, "int8-asym-attention"} for options in attention)
    products = [set(choices[one.name]) for one in found if one.kind is Kind.MATMUL]
    assert not any("int8-asym-attention" in options for options in products)  # the same as int8-asym, which is there
    uniform = as_options(plan_of("int8-asym-attention", found), choices)
    assert set(uniform.values()) == {"int8-asym", "int8-asym-attention"}
    with pytest.raises(InvalidInput, match="rtx-20"):
        recipes_for(target("rtx-20"), Format.FP32, found)


# ------------------------------------------------------------------------------------------------- in a bundle


@pytest.fixture
def few_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers and one recipe, so that a search takes seconds."""
    every = budgeted.options_of

    def few(found: tuple[Layer, ...], names: tuple[str, ...]) -> dict[str, Any]:
        return dict(list(every(found, names).items())[5:8])

    monkeypatch.setattr(budgeted, "options_of", few)
    monkeypatch.setattr(budgeted, "recipes_for", lambda *_: ("int8", "int8-weight"))


def run(bundle: Path, scratch: Path, *words: str) -> Any:
    few = ("--num", "4", "--steps", "2", "--held-out", "16", "--threads", "1", "--trajectories", str(scratch / "t"))
    return CliRunner().invoke(command, [str(bundle), *few, *words, "--json"])


def test_a_budget_becomes_a_recipe_in_the_bundle_with_the_same_bytes_each_time(
    dit_bundle: Path, tmp_path: Path, few_options: None
) -> None:
    hashes = []
    for name in ("one", "two"):
        bundle = tmp_path / f"{name}.lehr"
        shutil.copytree(dit_bundle, bundle)
        done = run(bundle, tmp_path, "--budget", "psnr>=25")
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["met"]
        assert told["confirmed"]["psnr"]["mean"] >= 25
        opened = Bundle.open(bundle)
        assert read_calibrated(opened, "mixed").recipe.calibrated
        files = [f for f in opened.names("calibration/mixed/") if not f.endswith(("search.json",))]
        assert {"front.png", "sensitivity.png", "step.onnx"} <= {Path(f).name for f in files}
        hashes.append({f: opened.manifest.files[f].sha256 for f in files})
    assert hashes[0] == hashes[1]


def test_a_budget_on_evaluations_is_kept_by_those_of_other_loops(
    dit_bundle: Path, tmp_path: Path, few_options: None
) -> None:
    bundle = tmp_path / "d.lehr"
    shutil.copytree(dit_bundle, bundle)
    done = run(bundle, tmp_path, "--budget", "sqnr>=20", "--name", "evaluations")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["confirmed"]["sqnr"]["mean"] >= 20
    few = Settings(num=4, steps=3, seed=9, batch=4, threads=1)
    held_out = HeldOut(Bundle.open(bundle), few)
    session = OrtGraph(ir.load(bundle / "calibration" / "evaluations" / "step.onnx"), threads=1)
    found = evaluation_losses(evaluation_errors(held_out, held_out.track, session))
    assert 19 < found.mean(Measure.SQNR) < 100


def test_an_impossible_budget_exits_with_one_and_stores_nothing(
    dit_bundle: Path, tmp_path: Path, few_options: None
) -> None:
    bundle = tmp_path / "d.lehr"
    shutil.copytree(dit_bundle, bundle)
    done = run(bundle, tmp_path, "--budget", "psnr>=150", "--time-limit", "600")
    assert done.exit_code == 1, done.output
    told = json.loads(done.stdout)
    assert not told["met"]
    assert told["best"]["psnr"]["mean"] < 150
    assert not Bundle.open(bundle).names("calibration/mixed/")


def test_a_budget_and_a_recipe_are_not_both_taken(dit_bundle: Path, tmp_path: Path) -> None:
    assert run(dit_bundle, tmp_path, "--budget", "psnr>=30", "--recipe", "int8").exit_code == 2
    assert run(dit_bundle, tmp_path).exit_code == 2
    assert run(dit_bundle, tmp_path, "--recipe", "int8", "--target", "cpu").exit_code == 2
