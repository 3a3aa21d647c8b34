"""Final samples on held-out seeds: what is measured, when it stops, and what is remembered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lehr.calibration.budget import parse_budget
from lehr.calibration.execute import OrtGraph, step_graph
from lehr.calibration.held_out import MAX_NUM, MAX_SEED, Fold, HeldOut, Settings
from lehr.calibration.tracks import evaluation_errors, evaluation_losses, only, record, replay
from lehr.calibration.trajectories import CALIBRATION_SEEDS
from lehr.ci.distribution import Networks, network_file
from lehr.engines.feature_network import ImageNetwork
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import InvalidInput
from lehr.runtime.parity import WORST, compare
from lehr.runtime.pipeline import Pipeline, Request

SMALL = Settings(num=20, steps=3, batch=10, threads=1)


@pytest.fixture(scope="module")
def held_out(dit_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    return HeldOut(Bundle.open(dit_bundle), SMALL, cache=tmp_path_factory.mktemp("held-out"))


def scaled(model: ir.Model, factor: float, *, named: str = "fc1") -> ir.Model:
    """The graph with some weights multiplied."""
    for name, value in model.graph.initializers.items():
        if named in name and value.const_value is not None and value.const_value.dtype.is_floating_point():
            value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name=name)
    return model


def test_held_out_seeds_never_meet_those_of_calibration_or_of_each_other() -> None:
    last = Settings(seed=MAX_SEED - 1, fold=Fold.CONFIRM, num=MAX_NUM)
    assert max(last.seeds([MAX_NUM - 1])) < CALIBRATION_SEEDS
    drawn = [Settings(seed=seed, fold=fold, num=9).seeds(range(9)) for seed in (0, 1) for fold in Fold]
    assert len({seed for seeds in drawn for seed in seeds}) == 4 * 9
    with pytest.raises(InvalidInput, match="65535"):
        Settings(seed=MAX_SEED)


def test_the_float_graph_loses_nothing_and_draws_what_its_engine_draws(held_out: HeldOut, dit_bundle: Path) -> None:
    same = held_out.measure(step_graph(held_out.bundle), scored=True)
    assert set(same.psnr_db) == {999.0}
    assert same.score_error == 0.0
    assert set(same.sqnr_db) == {999.0}
    numbers = [3, 7]
    request = Request(seeds=SMALL.seeds(numbers), num=2, class_labels=numbers, num_inference_steps=SMALL.steps)
    engine = Pipeline.open(dit_bundle)(request)
    drawn = held_out.draw(held_out.reference, numbers)
    assert compare(engine, drawn, held_out.spec.value_range).psnr_db > 80


def test_a_larger_error_loses_more(held_out: HeldOut) -> None:
    little, much = (held_out.measure(scaled(step_graph(held_out.bundle), f), scored=True) for f in (1.001, 1.05))
    assert little.samples == much.samples == SMALL.num
    assert np.mean(little.psnr_db) > np.mean(much.psnr_db) + 20
    assert little.score_error is not None
    assert much.score_error is not None
    assert 0 < little.score_error < much.score_error
    assert all(a > b + 20 for a, b in zip(little.sqnr_db, much.sqnr_db, strict=True))


def test_a_graph_that_is_not_finite_gets_the_worst_of_every_measure(held_out: HeldOut) -> None:
    broken = held_out.measure(scaled(step_graph(held_out.bundle), float("inf")))
    assert set(broken.psnr_db) == {-999.0}
    assert set(broken.cosine) == {-1.0}
    session = OrtGraph(scaled(step_graph(held_out.bundle), float("inf")), threads=1)
    single = evaluation_losses(evaluation_errors(held_out, held_out.track, session))
    assert single.score_error == WORST
    assert set(single.sqnr_db) == {-999.0}


def test_the_distance_of_distributions_is_zero_for_the_same_samples_and_grows_with_the_error(
    dit_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(dit_bundle)
    file = network_file(bundle, Networks())
    assert file is not None
    cached = tmp_path / "held-out"
    held_out = HeldOut(bundle, SMALL, cache=cached, features=ImageNetwork(file))
    graphs = (step_graph(bundle), *(scaled(step_graph(bundle), f) for f in (1.02, 1.3, float("inf"))))
    same, little, much, broken = (held_out.measure(graph).fid for graph in graphs)
    assert same is not None
    assert little is not None
    assert much is not None
    assert same < 1e-6 < little < much < broken == WORST
    early = held_out.measure(scaled(step_graph(bundle), 1.01), budget=parse_budget("psnr>=95"))
    assert (early.fid is None) == (early.samples < SMALL.num)  # of all samples, or not at all
    again = HeldOut(bundle, SMALL, cache=cached, features=ImageNetwork(file))
    assert again.measure(scaled(step_graph(bundle), 1.02)).fid == little  # remembered


def test_a_measurement_stops_as_soon_as_the_budget_is_decided(held_out: HeldOut, dit_bundle: Path) -> None:
    many = HeldOut(Bundle.open(dit_bundle), Settings(num=60, steps=2, batch=20, threads=1))
    assert many.measure(scaled(step_graph(many.bundle), 1.05), budget=parse_budget("psnr>=90")).samples == 20
    assert many.measure(scaled(step_graph(many.bundle), 1.05)).samples == 60


def test_a_result_is_remembered_by_content_and_not_for_another_graph(
    held_out: HeldOut, dit_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held_out.measure(scaled(step_graph(held_out.bundle), 1.01))
    again = HeldOut(Bundle.open(dit_bundle), SMALL, cache=held_out._cache)
    monkeypatch.setattr(again, "draw", lambda *_: pytest.fail("drawn again"))
    assert again.measure(scaled(step_graph(again.bundle), 1.01)) == first
    with pytest.raises(pytest.fail.Exception):
        again.measure(scaled(step_graph(again.bundle), 1.02))


def test_recorded_calls_answered_by_the_reference_give_the_reference_back(held_out: HeldOut) -> None:
    track = record(held_out, 2)
    answers = replay(held_out, track, held_out.reference, {0, 2})
    assert sorted(answers) == [0, 2]
    for index, output in answers.items():
        assert np.array_equal(output.astype(np.float32), track.outputs[index])
    other = OrtGraph(scaled(step_graph(held_out.bundle), 1.05), threads=1)
    moved = replay(held_out, track, other, {1})[1]
    assert not np.allclose(moved, track.outputs[1])
    exact = evaluation_losses(evaluation_errors(held_out, track, held_out.reference))
    assert exact.score_error == 0.0
    assert set(exact.sqnr_db) == {999.0}
    errors = evaluation_errors(held_out, track, other)
    for call, error in zip(track.calls, errors, strict=True):
        wide = call.output.astype(np.float64)
        noise = only(other.run(call.feeds)) - wide
        assert error.sqnr_db == pytest.approx(10 * np.log10((wide**2).sum() / (noise**2).sum()))
    assert evaluation_losses(errors).sqnr_db == tuple(error.sqnr_db for error in errors)
    with pytest.raises(InvalidInput, match="one batch"):
        record(held_out, SMALL.batch + 1)
