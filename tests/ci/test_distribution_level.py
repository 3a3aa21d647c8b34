"""L3: feature networks, what passes and what does not, and windows that stop early only where they must fail."""

from __future__ import annotations

import datetime as dt
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lehr import cli
from lehr.ci import distribution as level
from lehr.ci import gate as gates
from lehr.ci.checks import Outcome
from lehr.ci.distribution import Networks
from lehr.ci.page import page
from lehr.ci.policy import WindowLimits, policies, policy
from lehr.ci.window import Progress, window
from lehr.engines.feature_network import ImageNetwork, TextNetwork
from lehr.engines.portable import portable_denoiser
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.golden import read
from lehr.runtime.hoisted import load_denoiser

TODAY = dt.date(2030, 1, 1)
SHIPPED = Path(level.__file__).parent / "features" / "digits-classifier.onnx"
MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"
FEW = replace(policy("release", TODAY).limits.L3, samples=40.0)


@pytest.fixture(scope="module")
def opened(dit_bundle):
    return Bundle.open(dit_bundle)


@pytest.fixture(scope="module")
def engine(opened):
    return load_denoiser(opened, engines.find(opened, "cpu", "fp32"))


@pytest.fixture(scope="module")
def golden(opened):
    return read(opened)


class Changed(Denoiser):
    """An engine whose outputs pass through ``change``."""

    def __init__(self, inner, change):
        super().__init__(inner.spec, lambda feeds: {})
        self.inner, self.change = inner, change

    def with_variance(self, sample, timestep, conditions):
        return self.change(self.inner.with_variance, sample, timestep, conditions)


def outcomes(checks):
    return {check.name: check.outcome for check in checks}


def lehr(*arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def text_network(path, table):
    """class_labels (N,) -> row of ``table``."""
    node = helper.make_node("Gather", ["table", "class_labels"], ["features"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", table.shape[1]])],
        [numpy_helper.from_array(table.astype(np.float32), "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


# -------------------------------------------------------------------------------------------------------- networks


def test_the_shipped_feature_network_is_the_digits_classifier():
    from lehr.export.reference import classifier

    samples = np.random.default_rng(0).uniform(-1, 1, (60, 1, 28, 28)).astype(np.float32)
    classes, features = classifier.judge(classifier.load(), samples)
    found = ImageNetwork(SHIPPED)(samples, (-1.0, 1.0))
    assert found.vectors == pytest.approx(features, abs=1e-4)
    assert np.array_equal(found.classes, classes)


def test_samples_are_brought_from_the_models_range_to_the_networks():
    samples = np.random.default_rng(0).uniform(0, 255, (3, 1, 28, 28)).astype(np.float32)
    network = ImageNetwork(SHIPPED)
    same = network(samples / 127.5 - 1, (-1.0, 1.0)).vectors
    assert network(samples, (0.0, 255.0)).vectors == pytest.approx(same, abs=1e-4)


def test_what_is_no_feature_network_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(InvalidInput, match="no network that ONNX Runtime runs"):
        ImageNetwork(tmp_path / "bad.onnx")
    with pytest.raises(InvalidInput, match="cannot read"):
        ImageNetwork(tmp_path / "gone.onnx")
    with pytest.raises(InvalidInput, match="does not take"):
        ImageNetwork(SHIPPED)(np.zeros((2, 3, 64, 64), np.float32), (-1.0, 1.0))
    labels = text_network(tmp_path / "text.onnx", np.eye(10))
    with pytest.raises(InvalidInput, match=r"one float32 tensor \(N, C, H, W\)"):
        ImageNetwork(labels)
    with pytest.raises(InvalidInput, match="not conditioned on"):
        TextNetwork(labels)({"prompt": np.zeros((1, 4))})


def test_a_general_network_returns_features_of_pictures(tmp_path):
    """EfficientNet's own first layer, written by hand from its weights, as anybody's network would come."""
    weights = MODELS / "efficientnet_lite0_features" / "efficientnet-lite0-57934424.safetensors"
    if not weights.is_file():
        pytest.skip("the shared models are not here")
    from safetensors.numpy import load_file

    arrays = load_file(weights)
    stem = next(v for n, v in arrays.items() if v.ndim == 4 and v.shape[1] == 3)
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", stem.shape[0], "a", "b"])],
        [numpy_helper.from_array(stem.astype(np.float32), "w")],
    )
    file = tmp_path / "stem.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    found = ImageNetwork(file)(np.random.default_rng(0).uniform(-1, 1, (4, 1, 32, 32)), (-1.0, 1.0))
    assert found.vectors.shape == (4, stem.shape[0])
    assert found.classes is None


# ----------------------------------------------------------------------------------------------------------- level


def test_a_good_engine_passes_and_the_report_shows_what_was_drawn(opened, engine, golden, tmp_path):
    text = text_network(tmp_path / "text.onnx", np.random.default_rng(0).uniform(size=(10, 128)))
    checks, series = level.distribution(opened, engine, golden, FEW, Networks(text_features=text))
    names = ("L3.reference", "L3.frechet", "L3.kernel", "L3.similarity", "L3.agreement")
    assert outcomes(checks) == dict.fromkeys(names, Outcome.PASSED)
    assert series.samples == 40
    assert series.noise > 1


def test_an_engine_that_draws_other_classes_than_were_asked_for_is_caught(opened, engine, golden):
    def next_class(evaluate, x, t, conditions):
        labels = conditions["class_labels"]
        return evaluate(x, t, {"class_labels": np.where(labels < 10, (labels + 1) % 10, labels)})

    found = outcomes(
        level.distribution(opened, Changed(engine, next_class), golden, replace(FEW, samples=20.0), Networks())[0]
    )
    assert found["L3.agreement"] is Outcome.FAILED


def test_an_engine_that_draws_other_strokes_is_caught_by_both_distances(opened, engine, golden):
    def bolder(evaluate, x, t, conditions):
        return evaluate(x, t, conditions) * np.float32(1.3)

    found = outcomes(level.distribution(opened, Changed(engine, bolder), golden, FEW, Networks())[0])
    assert found["L3.frechet"] is Outcome.FAILED
    assert found["L3.kernel"] is Outcome.FAILED


def test_a_reference_that_is_not_eager_judges_nobody(opened, engine, golden, monkeypatch):
    loops = tuple(replace(loop, final=loop.final[::-1]) for loop in golden.trajectories)
    checks, series = level.distribution(opened, engine, replace(golden, trajectories=loops), FEW, Networks())
    assert [(check.name, check.outcome) for check in checks] == [("L3.reference", Outcome.FAILED)]
    assert "it is no reference" in checks[0].reason
    assert series is None


def test_values_that_are_not_finite_fail_the_draw(opened, engine, golden):
    broken = Changed(engine, lambda evaluate, x, t, conditions: evaluate(x, t, conditions) * np.nan)
    checks, _ = level.distribution(opened, broken, golden, replace(FEW, samples=20.0), Networks())
    assert outcomes(checks)["L3.draws"] is Outcome.FAILED


def test_the_portable_graphs_draw_what_eager_drew(opened, golden):
    assert level._reference(portable_denoiser(opened), golden).value > 100


# ------------------------------------------------------------------------------------------------ what is required


def test_release_requires_many_samples_where_a_network_is_known_and_only_there(opened, tmp_path):
    release = policy("release", TODAY)
    assert gates._required(opened, release, Networks()) == ("L0", "L1", "L2", "L3")
    other = Bundle.open(shutil.copytree(opened.root, tmp_path / "d.lehr"))
    with other.edit() as edit:
        edit.set_manifest(source="somebody/else")
    other = Bundle.open(other.root)
    assert gates._required(other, release, Networks()) == ("L0", "L1", "L2")
    assert "name one, --features" in level.judgeable(other, Networks())
    assert gates._required(other, release, Networks(features=SHIPPED))[-1] == "L3"
    with pytest.raises(InvalidInput, match="requires L3, many samples: no feature network is known"):
        gates._required(other, replace(release, required=("L0", "L3")), Networks())


def test_a_release_report_holds_the_level_and_one_that_failed_before_does_not_draw(opened, engine, golden):
    release = policy("release", TODAY)
    release = replace(release, limits=replace(release.limits, L3=replace(FEW, samples=20.0)))
    made = gates.gate(opened, engines.find(opened, "cpu", "fp32"), release)
    assert made.passed
    assert {check.name for check in made.checks if check.level == "L3"} >= {"L3.frechet", "L3.agreement"}
    text = page(made)
    assert "Distribution (L3)" in text
    assert made.to_json()["distribution"]["samples"] == 20
    strict = replace(release, limits=replace(release.limits, L1=replace(release.limits.L1, rel_error=1e-12)))
    strict = replace(strict, limits=replace(strict.limits, L1=replace(strict.limits.L1, floor_factor=0.01)))
    failed = gates.gate(opened, engines.find(opened, "cpu", "fp32"), strict)
    assert "not reached: L1.score failed" in next(c.reason for c in failed.checks if c.level == "L3")
    assert not failed.passed


def test_windows_without_their_networks_are_wrong_usage_and_say_what_to_give(dit_bundle, capsys):
    code, _, err = lehr("gate", dit_bundle, "--policy", "mlperf-sdxl", capsys=capsys)
    assert code == 2
    for option in ("--features", "--text-features", "--statistics"):
        assert option in err


@pytest.mark.parametrize("name", sorted(policies()))
def test_no_shipped_policy_passes_l3_by_default(name):
    made = policy(name, TODAY)
    assert "L3" in (*made.required, *made.required_with_features) or not made.limits.L3.samples


# --------------------------------------------------------------------------------------------------------- windows


def limits(**given):
    values = {"samples": 2000.0, "fid_min": 0.0, "fid_max": 1.0, "clip_min": 30.0, "clip_max": 32.0}
    return WindowLimits(**{**values, "look_every": 100.0, "error": 0.02, **given})


def gathered(rng, at, *, shift=0.0, clip=0.31, width=24):
    """Features and scores fed part by part: the checks, and after how many samples they came."""
    progress, done = Progress(at, np.zeros(width), np.eye(width)), 0
    while True:
        done += 100
        features = rng.standard_normal((100, width)) + shift / np.sqrt(width)
        if checks := progress.add(features, clip + 0.05 * rng.standard_normal(100)):
            return checks, done


def test_a_clear_failure_stops_early_and_is_named():
    checks, done = gathered(np.random.default_rng(0), limits(), shift=3.0)  # a distance of 9
    assert [(c.name, c.outcome) for c in checks] == [("L3.fid", Outcome.FAILED)]
    assert done <= 400
    assert "of 2000 samples" in checks[0].reason
    checks, done = gathered(np.random.default_rng(0), limits(), clip=0.25)
    assert [(c.name, c.outcome) for c in checks] == [("L3.clip", Outcome.FAILED)]
    assert done <= 400


def test_an_engine_inside_its_windows_is_stopped_no_more_often_than_the_policy_says():
    """The truth is known: distance 0.81, which a window to 1.1 holds, and a score of 31."""
    runs, at = 40, limits(samples=1000.0, fid_max=1.1)
    ends = [gathered(np.random.default_rng(k), at, shift=0.9) for k in range(runs)]
    early = sum(done < 1000 for _, done in ends)
    assert early <= max(1, at.error * runs)
    good = [c for checks, done in ends if done == 1000 for c in checks]
    assert np.mean([c.outcome is Outcome.PASSED for c in good]) > 0.9


def test_a_window_is_judged_on_samples_that_the_engine_draws(opened, engine, golden, tmp_path):
    """Statistics of the same model's own draws: another hundred lie inside a window around their distance."""
    network, rows = ImageNetwork(SHIPPED), np.tile(np.arange(10), 3)
    from lehr.runtime.pipeline import Pipeline, Request

    own = network(Pipeline(engine)(Request(num=30, seed=3, num_inference_steps=4, batch=30)), (-1.0, 1.0)).vectors
    statistics = tmp_path / "real.npz"
    np.savez(statistics, mu=own.mean(axis=0), sigma=np.cov(own, rowvar=False))
    table = np.stack([own[rows == k].mean(axis=0) for k in range(10)])
    given = Networks(features=SHIPPED, text_features=text_network(tmp_path / "t.onnx", table), statistics=statistics)
    wide = limits(samples=20.0, look_every=10.0, fid_max=1e4, clip_min=50.0, clip_max=100.0)
    few = Changed(engine, lambda evaluate, x, t, conditions: evaluate(x, t, conditions))
    checks = window(opened, few, golden, wide, given)
    assert [(c.name, c.outcome) for c in checks] == [("L3.fid", Outcome.PASSED), ("L3.clip", Outcome.PASSED)]
    assert "over 20 samples" in checks[0].reason
    narrow = replace(wide, clip_min=99.9)
    assert outcomes(window(opened, few, golden, narrow, given))["L3.clip"] is Outcome.FAILED


def test_statistics_of_another_shape_are_refused(opened, engine, golden, tmp_path):
    file = tmp_path / "real.npz"
    np.savez(file, mu=np.zeros(3), sigma=np.zeros((4, 4)))
    given = Networks(features=SHIPPED, text_features=text_network(tmp_path / "t.onnx", np.eye(10)), statistics=file)
    with pytest.raises(InvalidInput, match="expected mu of shape"):
        window(opened, engine, golden, limits(), given)


def test_a_session_that_fails_is_no_pass(opened, engine, golden):
    def broken(evaluate, x, t, conditions):
        raise RunFailed("the device is gone")

    checks, _ = level.distribution(opened, Changed(engine, broken), golden, replace(FEW, samples=20.0), Networks())
    assert "the device is gone" in next(c.reason for c in checks if c.name == "L3.draws")
