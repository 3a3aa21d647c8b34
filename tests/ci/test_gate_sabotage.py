"""Faults injected into a bundle and its engine: each is caught, at its level, and named; harmless changes pass."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lehr.ci import cost, fidelity
from lehr.ci import gate as gates
from lehr.ci.checks import Outcome
from lehr.ci.fidelity import loop_limits
from lehr.ci.policy import policy
from lehr.engines.build import build
from lehr.engines.target import target
from lehr.runtime import engine as engines
from lehr.runtime import hoisted
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import IncompatibleEngine
from lehr.runtime.golden import read
from lehr.runtime.parity import compare
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.recipe import recipe
from lehr.runtime.solvers import solver_table


def _beside(name):
    """A module of this folder: pytest's importlib mode puts none of them on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


faults = _beside("faults")
RELEASE = policy("release", date(2030, 1, 1))
# L3 draws samples for seconds; tests of the other levels go without.
QUICK = replace(
    RELEASE,
    limits=replace(RELEASE.limits, L3=replace(RELEASE.limits.L3, samples=0.0)),
    recipes={n: replace(v, L3=replace(v.L3, samples=0.0)) for n, v in RELEASE.recipes.items()},
    required_with_features=(),
)


@pytest.fixture
def bundle(dit_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))


@pytest.fixture(scope="module")
def model(dit_bundle):
    return faults.Model(read(Bundle.open(dit_bundle)))


def judged(root, *, baseline=None, by=QUICK, recipe="fp32"):
    opened = Bundle.open(root)
    old = None if baseline is None else Bundle.open(baseline)
    return gates.gate(opened, engines.find(opened, "cpu", recipe), by, baseline=old)


def failures(report):
    return {check.name for check in report.checks if check.outcome is Outcome.FAILED}


def levels(report):
    return {name.partition(".")[0] for name in failures(report)}


def said(report):
    """What a reader of the report learns about the fault."""
    text = " ".join(c.reason for c in report.checks if c.outcome is Outcome.FAILED or c.name.endswith(".drift"))
    return text if report.culprit is None else f"{report.culprit.text} {text}"


def moves(fault, model):
    """How far eager's own samples move, and how far the policy lets an engine move them, in dB."""
    loop = model.loop(fault.loop)
    found = compare(loop.final, fault.eager(model), model.spec.value_range)
    return found.psnr_db, loop_limits(model.golden, RELEASE.limits.L2, "fp32")["psnr_db"]


# ---------------------------------------------------------------------------------------------------- the library


@pytest.mark.parametrize("fault", faults.COUNTING, ids=lambda fault: fault.name)
def test_a_fault_that_counts_is_caught_at_its_level_and_named(fault, bundle, model, monkeypatch):
    psnr, allowed = moves(fault, model)
    assert psnr < allowed, "this fault moves no sample, so it does not count"
    fault.inject(bundle, monkeypatch)
    report = judged(bundle)
    assert not report.passed
    assert min(levels(report)) == fault.level
    assert fault.names in said(report), said(report)


@pytest.mark.parametrize("fault", faults.HARMLESS, ids=lambda fault: fault.name)
def test_a_fault_that_moves_no_sample_raises_no_alarm(fault, bundle, model, monkeypatch):
    psnr, allowed = moves(fault, model)
    assert psnr >= allowed
    fault.inject(bundle, monkeypatch)
    report = judged(bundle)
    assert report.passed, said(report)
    assert report.culprit is None


def test_an_overflow_of_half_precision_is_caught_by_structure_and_its_layer_named(bundle, monkeypatch):
    """The weights are equal in fp32; a range audit of other weights kept nothing of them out of fp16."""
    faults.overflow(bundle, monkeypatch)
    report = judged(bundle, recipe="fp16")
    assert "L0.values" in failures(report)
    assert report.culprit.layer == "blocks.3.attn.qkv"


def test_an_engine_of_the_weights_before_is_refused(bundle):
    faults.edit_weights(bundle, faults.QKV, faults.scale_channel, rebuild=False)
    with pytest.raises(IncompatibleEngine, match=r"weights\.safetensors has changed"):
        judged(bundle)


def test_a_fault_of_the_plan_alone_is_told_from_one_of_the_bundle(bundle, dit_bundle, tmp_path):
    other = Path(shutil.copytree(dit_bundle, tmp_path / "other.lehr"))
    faults.in_plan("step", "blocks.1.mlp.fc1/Transpose", faults.flip_largest)(bundle, None)
    faults.edit_weights(other, "blocks.1.mlp.fc1.weight", faults.flip_largest)
    texts = [judged(root).culprit.text for root in (bundle, other)]
    assert "in the engine alone" in texts[0]
    assert "since the portable graph has it too" in texts[1]


# ----------------------------------------------------------------------------------------------- what is declared


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prediction", Prediction(kind=PredictionKind.FLOW_PREDICTION, sign=-1), "-flow_prediction"),
        ("path", LinearFlow(num_train_timesteps=999), "alpha"),
    ],
    ids=["sign", "timesteps"],
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


def test_tensors_that_all_prompts_share_by_mistake_are_caught_by_single_evaluations(bundle, monkeypatch):
    monkeypatch.setattr(hoisted, "digest_of", lambda conditions, batched, row: b"one key for everybody")
    assert "L1.score" in failures(judged(bundle))


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

        return faults.Wrapped(denoiser, twice) if opened.root == bundle else denoiser

    monkeypatch.setattr(cost, "_at", slow)
    report = judged(bundle, baseline=dit_bundle)
    assert failures(report) == {"L4.latency"}
    assert next(check.value for check in report.checks if check.name == "L4.latency") > 1.2


def test_an_engine_a_tenth_slower_is_not_let_through(bundle, dit_bundle, monkeypatch):
    """On a clock of our own: a machine shared with others cannot tell 10 % from its own noise."""
    rng, now = np.random.default_rng(0), [0.0]

    def stub(opened, record):
        takes = 1.1 if opened.root == bundle else 1.0

        def evaluate(sample, timestep, conditions):
            now[0] += takes * (1 + 0.02 * abs(rng.standard_normal()))

        return evaluate

    monkeypatch.setattr(cost, "_at", stub)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    limits = replace(QUICK.limits, L4=replace(QUICK.limits.L4, max_seconds=1e9))
    report = judged(bundle, baseline=dit_bundle, by=replace(QUICK, limits=limits))
    assert failures(report) == {"L4.latency"}


# ------------------------------------------------------------------------------------------- what must not be caught


def test_what_was_just_built_passes(bundle):
    report = judged(bundle)
    assert report.passed
    assert not failures(report)
    assert report.divergence == {"unguided": None, "guided": None}


@pytest.mark.parametrize("threads", [1, 3])
def test_another_number_of_threads_passes(bundle, threads):
    build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime", threads=threads)
    assert judged(bundle).passed


def test_another_batch_passes(bundle, monkeypatch):
    def one_by_one(evaluate, x, t, conditions):
        parts = [evaluate(x[k : k + 1], t, {n: v[k : k + 1] for n, v in conditions.items()}) for k in range(len(x))]
        return np.concatenate(parts)

    faults.wrap(monkeypatch, one_by_one)
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
