"""Faults injected into a bundle and its engine: each is caught, at the level named here; harmless changes pass."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lehr.ci import cost, fidelity
from lehr.ci import gate as gates
from lehr.ci.checks import Outcome
from lehr.ci.policy import policy
from lehr.engines.build import build
from lehr.engines.target import target
from lehr.runtime import engine as engines
from lehr.runtime import hoisted
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import IncompatibleEngine
from lehr.runtime.guidance import plain
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import EPSILON, Prediction, PredictionKind
from lehr.runtime.recipe import recipe
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import Sampling

RELEASE = policy("release", dt.date(2030, 1, 1))
WEIGHTS = "model/weights.safetensors"
QKV, FC2, HEAD = "blocks.3.attn.qkv.weight", "blocks.2.mlp.fc2.weight", "final_layer.linear.weight"


@pytest.fixture
def bundle(dit_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))


def judged(root, *, baseline=None, by=RELEASE, recipe="fp32"):
    opened = Bundle.open(root)
    old = None if baseline is None else Bundle.open(baseline)
    return gates.gate(opened, engines.find(opened, "cpu", recipe), by, baseline=old)


def failures(report):
    return {check.name for check in report.checks if check.outcome is Outcome.FAILED}


def levels(report):
    return {name.partition(".")[0] for name in failures(report)}


# ------------------------------------------------------------------------------------------------------ weights


def edit_weights(root, name, change, *, rebuild=True):
    """Change one tensor of the bundle's weights, and build the engine from what is there then."""
    bundle = Bundle.open(root)
    data = bytearray(bundle.path(WEIGHTS).read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    tensor = np.frombuffer(bytes(data[begin:end]), np.float32).reshape(entry["shape"]).copy()
    change(tensor)
    data[begin:end] = tensor.tobytes()
    with bundle.edit() as edit:
        edit.add_bytes(WEIGHTS, bytes(data))
    if rebuild:
        build(root, target("cpu"), recipe("fp32"), library="onnxruntime")


def flip_largest(tensor):
    at = np.unravel_index(np.argmax(np.abs(tensor)), tensor.shape)
    tensor[at] = -tensor[at]


def scale_channel(tensor):
    tensor[5] *= 1.25


def nudge_one(tensor):
    tensor.flat[77] *= np.float32(1 + 1.2e-7)


@pytest.mark.parametrize("name", [QKV, FC2, HEAD])
def test_one_large_weight_of_the_wrong_sign_is_caught_by_single_evaluations(bundle, name):
    edit_weights(bundle, name, flip_largest)
    report = judged(bundle)
    assert not report.passed
    assert "L1.score" in failures(report)
    assert "L0" not in levels(report)


@pytest.mark.parametrize("name", [QKV, FC2, HEAD])
def test_a_channel_of_the_wrong_scale_is_caught_by_single_evaluations(bundle, name):
    edit_weights(bundle, name, scale_channel)
    assert "L1.score" in failures(judged(bundle))


def test_an_engine_of_the_weights_before_is_refused(bundle):
    edit_weights(bundle, QKV, scale_channel, rebuild=False)
    with pytest.raises(IncompatibleEngine, match=r"weights\.safetensors has changed"):
        judged(bundle)


# ----------------------------------------------------------------------------------------------- what is declared


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prediction", Prediction(kind=PredictionKind.FLOW_PREDICTION, sign=-1), "-flow_prediction"),
        ("prediction", EPSILON, "epsilon"),
        ("path", LinearFlow(num_train_timesteps=999), "alpha"),
        ("sampling", Sampling(sampler="dpmpp_2m", guidance_scale=1.5), "the recorded loops ran flow_euler"),
    ],
    ids=["sign", "epsilon-for-flow", "timesteps", "scheduler"],
)
def test_a_wrong_statement_about_the_model_is_caught_by_structure(bundle, field, value, says):
    """Engine and eager agree all the same: only ``run`` would draw something else."""
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        edit.set_manifest(model=replace(opened.manifest.model, **{field: value}))
    report = judged(bundle)
    assert "L0.contract" in failures(report)
    assert says in next(check.reason for check in report.checks if check.name == "L0.contract")


def test_a_sampler_that_computes_other_coefficients_is_caught_by_structure(bundle, monkeypatch):
    def shifted(name, path, prediction, steps):
        table = solver_table(name, path, prediction, steps)
        return replace(table, timesteps=np.append(table.timesteps[1:], 0.0))

    monkeypatch.setattr(fidelity, "solver_table", shifted)
    assert failures(judged(bundle)) == {"L0.contract"}


# ---------------------------------------------------------------------------------------------------- the engine


class Wrapped(Denoiser):
    """A denoiser whose evaluations pass through ``change(evaluate, sample, timestep, conditions)``."""

    def __init__(self, inner, change):
        super().__init__(inner.spec, lambda feeds: {})
        self.inner, self.change = inner, change

    def prepare(self, timesteps, sample_sizes, conditions):
        self.inner.prepare(timesteps, sample_sizes, conditions)

    def with_variance(self, sample, timestep, conditions):
        return self.change(self.inner.with_variance, sample, timestep, conditions)


def wrap(monkeypatch, change):
    load = gates.load_denoiser
    monkeypatch.setattr(gates, "load_denoiser", lambda *given: Wrapped(load(*given), change))


def test_timesteps_that_are_one_off_are_caught_by_single_evaluations(bundle, monkeypatch):
    wrap(monkeypatch, lambda evaluate, x, t, conditions: evaluate(x, t - 1, conditions))
    report = judged(bundle)
    assert "L1.score" in failures(report)
    assert "L0" not in levels(report)


def test_one_sample_of_nan_at_one_timestep_is_caught_by_structure(bundle, monkeypatch):
    def change(evaluate, x, t, conditions):
        output = evaluate(x, t, conditions).copy()
        if 290 < t < 310:
            output[3, 0, 4, 4] = np.nan
        return output

    wrap(monkeypatch, change)
    report = judged(bundle)
    assert "L0.values" in failures(report)
    reason = next(check.reason for check in report.checks if check.name == "L0.values")
    assert reason == "the engine returned values that are not finite at timestep 300"


def test_swapped_halves_of_guidance_are_caught_by_the_guided_loop_alone(bundle, monkeypatch):
    monkeypatch.setattr(
        plain, "halves", lambda conditions, without: {n: np.concatenate([v, without[n]]) for n, v in conditions.items()}
    )
    report = judged(bundle)
    assert failures(report)
    assert all(name.startswith("L2.guided.") for name in failures(report))


def test_a_loop_of_another_sampler_is_caught_by_whole_loops(bundle, monkeypatch):
    read = gates.read

    def other(opened):
        golden, spec = read(opened), opened.manifest.model
        table = replace(solver_table("dpmpp_2m", spec.path, spec.prediction, 20), sampler="flow_euler")
        return replace(golden, trajectories=tuple(replace(loop, table=table) for loop in golden.trajectories))

    monkeypatch.setattr(gates, "read", other)
    report = judged(bundle)
    assert {"L2.unguided.psnr_db", "L2.guided.psnr_db"} <= failures(report)
    assert "L1" not in levels(report)


def test_tensors_that_all_prompts_share_by_mistake_are_caught_by_single_evaluations(bundle, monkeypatch):
    monkeypatch.setattr(hoisted, "_digest", lambda conditions, batched, row: b"one key for everybody")
    assert "L1.score" in failures(judged(bundle))


def test_the_first_prompts_tensors_for_the_second_prompt_are_caught_by_another_order(bundle, monkeypatch):
    """Every recorded evaluation has the same prompts, so only asking for them in another order shows this."""
    keys = hoisted.HoistedNetwork._keys

    def kept(self, conditions, sample_shape):
        known = getattr(kept, "known", {})
        kept.known = known
        return known.setdefault(sample_shape, keys(self, conditions, sample_shape))

    monkeypatch.setattr(hoisted.HoistedNetwork, "_keys", kept)
    assert "L1.order" in failures(judged(bundle))


def test_an_engine_that_is_wrong_at_one_evaluation_is_named_with_it(bundle, monkeypatch):
    at = Bundle.open(bundle).read_arrays("tables/flow_euler-20.npz")["timesteps"][7]

    def change(evaluate, x, t, conditions):
        output = evaluate(x, t, conditions)
        return output * np.float32(1.05) if t == at else output

    wrap(monkeypatch, change)
    report = judged(bundle)
    assert "L2.unguided.psnr_db" in failures(report)
    assert report.divergence["unguided"]["evaluation"] == 7
    assert report.divergence["guided"]["timestep"] == at
    assert f"in evaluation 8 of 20 (timestep {at:g})" in {c.name: c.reason for c in report.checks}["L2.guided.drift"]


# ---------------------------------------------------------------------------------------------------------- cost


def test_an_engine_a_fifth_larger_is_caught_by_its_size(bundle, dit_bundle, monkeypatch):
    monkeypatch.setattr(cost, "_latency", lambda *given: fidelity.judged("L4.latency", True, "not looked at here"))
    opened = Bundle.open(bundle)
    record = engines.find(opened, "cpu", "fp32")
    extra = -(-cost.engine_bytes(opened, record) // 5)
    with opened.edit() as edit:
        edit.add_bytes(f"{record.folder}/padding.bin", bytes(extra))
    assert failures(judged(bundle, baseline=dit_bundle)) == {"L4.size"}
    with opened.edit() as edit:
        edit.add_bytes(f"{record.folder}/padding.bin", bytes(extra // 2))
    assert judged(bundle, baseline=dit_bundle).passed


def test_an_engine_that_takes_half_as_long_again_is_caught_by_its_latency(bundle, dit_bundle, monkeypatch):
    load = cost._at

    def slow(opened, record):
        denoiser = load(opened, record)

        def twice(evaluate, x, t, conditions):
            evaluate(x[: len(x) // 2], t, {name: value[: len(x) // 2] for name, value in conditions.items()})
            return evaluate(x, t, conditions)

        return Wrapped(denoiser, twice) if opened.root == bundle else denoiser

    monkeypatch.setattr(cost, "_at", slow)
    report = judged(bundle, baseline=dit_bundle)
    assert failures(report) == {"L4.latency"}
    assert next(check.value for check in report.checks if check.name == "L4.latency") > 1.2


# ------------------------------------------------------------------------------------------- what must not be caught


def test_what_was_just_built_passes(bundle):
    report = judged(bundle)
    assert report.passed
    assert not failures(report)
    assert report.divergence == {"unguided": None, "guided": None}


def test_one_weight_that_moves_by_a_rounding_passes(bundle):
    edit_weights(bundle, QKV, nudge_one)
    assert judged(bundle).passed


@pytest.mark.parametrize("threads", [1, 3])
def test_another_number_of_threads_passes(bundle, threads):
    build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime", threads=threads)
    assert judged(bundle).passed


def test_another_batch_passes(bundle, monkeypatch):
    def one_by_one(evaluate, x, t, conditions):
        parts = [evaluate(x[k : k + 1], t, {n: v[k : k + 1] for n, v in conditions.items()}) for k in range(len(x))]
        return np.concatenate(parts)

    wrap(monkeypatch, one_by_one)
    assert judged(bundle).passed


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_another_library_and_another_format_pass(bundle, name):
    pytest.importorskip("openvino")
    from lehr.runtime.host import cpu_features

    if name == "bf16" and not {"avx512_bf16", "amx_bf16"} & set(cpu_features()):
        pytest.skip("this processor has no bf16 arithmetic")
    build(bundle, target("cpu"), recipe(name), library="openvino")
    report = judged(bundle, recipe=name)
    assert report.passed, [check.reason for check in report.checks if check.outcome is Outcome.FAILED]
