"""L0 to L2 in parts: what a bundle's statements are held against, and where limits come from."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import numpy as np
import pytest

from lehr.ci import fidelity
from lehr.ci.checks import Outcome
from lehr.ci.policy import policy
from lehr.export.backbones import presets
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.golden import Floor, Golden, StepsGolden, Tier, read
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.parity import relative_error, score
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import default_sampler, samplers, solver_table

LIMITS = policy("release", dt.date(2030, 1, 1)).limits


def stored(table):
    """As it comes back from a bundle."""
    import io

    with np.load(io.BytesIO(table.to_bytes())) as arrays:
        return SolverTable.from_arrays(dict(arrays))


@pytest.fixture(scope="module")
def opened(dit_bundle):
    return Bundle.open(dit_bundle)


@pytest.fixture(scope="module")
def golden(opened):
    return read(opened)


# ---------------------------------------------------------------------------------------------------- L0, contract


@pytest.mark.parametrize("name", sorted(presets()))
def test_the_tables_of_every_preset_are_written_out_anew_without_a_false_alarm(name):
    spec = presets()[name].spec
    sampler = spec.sampling.sampler or default_sampler(spec.path)
    table = stored(solver_table(sampler, spec.path, spec.prediction, 20))
    assert fidelity._table_problem(spec, table) is None


@pytest.mark.parametrize("steps", [4, 13])
@pytest.mark.parametrize("name", sorted(samplers()))
def test_the_tables_of_every_sampler_are_written_out_anew_without_a_false_alarm(name, steps):
    specs = (preset.spec for preset in presets().values())
    spec = next((spec for spec in specs if isinstance(spec.path, samplers()[name].paths)), None)
    if spec is None:
        pytest.skip("no preset lies on a path of this sampler")
    spec = replace(spec, sampling=replace(spec.sampling, sampler=name))
    table = stored(solver_table(name, spec.path, spec.prediction, steps))
    assert fidelity._table_problem(spec, table) is None
    other = replace(table, alphas=table.alphas * 1.001)
    assert "alphas" in (fidelity._table_problem(spec, other) or "")


@pytest.mark.parametrize(
    ("recipe", "achieved", "good"),
    [
        ("fp32", {"float": 1.0}, True),
        ("fp32", {"float": 0.9, "bfloat16": 0.1}, False),
        ("bf16", {"bfloat16": 0.97, "float": 0.03}, True),
        ("bf16", {"float": 1.0}, False),
        ("fp16", {"bfloat16": 1.0}, False),
    ],
)
def test_the_achieved_precision_must_be_the_recipes(opened, recipe, achieved, good):
    record = engines.find(opened, "cpu", "fp32")
    plan = replace(record.plans["step"], achieved_precision=achieved)
    check = fidelity._precision(replace(record, recipe=recipe, plans={"step": plan}))
    assert (check.outcome is Outcome.PASSED) is good


# -------------------------------------------------------------------------------------------------------- L1, limits


def bare(floors, alphas=(0.0, 0.5, 0.9)):
    arrays = np.zeros((len(alphas), 2, 1, 2, 2))
    at = np.asarray(alphas)
    steps = StepsGolden(timesteps=at, alphas=at, sigmas=1 - at, inputs=arrays, outputs=arrays, conditions={})
    return Golden(tier=Tier.STEPS, steps=steps, trajectories=(), floors=floors)


def test_limits_follow_the_floor_timestep_by_timestep_and_never_fall_below_the_absolute_one():
    golden = bare({"fp16": Floor(rel_error=(0.0, 1e-6, 3e-3))})
    allowed, source = fidelity.step_limits(golden, LIMITS, "fp16")
    assert allowed == pytest.approx([3e-2, 1e-4, 3e-2])  # alpha 0: the largest of the others stands in
    assert "10 x eager's fp16" in source


@pytest.mark.parametrize("floors", [{}, {"fp16": Floor(unavailable="no kernel")}, {"bf16": Floor(rel_error=(1, 1, 1))}])
def test_without_a_floor_in_its_format_the_absolute_limit_holds(floors):
    allowed, source = fidelity.step_limits(bare(floors), LIMITS, "fp16")
    assert allowed.tolist() == [1e-4] * 3
    assert source.startswith("absolute; no fp16 floor")


def test_final_samples_may_lie_as_far_below_eagers_own_as_the_factor_says_and_no_more_is_asked_than_the_policy():
    golden = bare(
        {"bf16": Floor(rel_error=(0, 0, 0), psnr_db=51.0, snr_db=42.0), "fp64": Floor(psnr_db=140, snr_db=130)}
    )
    assert fidelity.loop_limits(golden, LIMITS.L2, "bf16")["psnr_db"] == pytest.approx(31.0)
    assert fidelity.loop_limits(golden, LIMITS.L2, "bf16")["snr_db"] == pytest.approx(22.0)
    assert fidelity.loop_limits(golden, LIMITS.L2, "fp32")["psnr_db"] == 60.0


def test_a_bundle_of_one_sample_has_no_other_order_and_says_so(opened, golden):
    steps = golden.steps
    one = replace(
        golden,
        steps=replace(
            steps,
            inputs=steps.inputs[:, :1],
            outputs=steps.outputs[:, :1],
            conditions={name: value[:1] for name, value in steps.conditions.items()},
        ),
    )
    record = engines.find(opened, "cpu", "fp32")
    checks, _ = fidelity.steps(load_denoiser(opened, record), record, one, LIMITS, list(one.steps.outputs))
    assert [(check.name, check.outcome) for check in checks] == [
        ("L1.score", Outcome.PASSED),
        ("L1.order", Outcome.NOT_RUN),
    ]


# --------------------------------------------------------------------------------------------------------- L2, drift


def test_an_output_error_of_the_converted_size_is_the_allowed_error_of_the_score(golden):
    """The conversion against its definition: perturb an output by that much, and measure the score."""
    steps, prediction = golden.steps, golden.trajectories[0].table.prediction
    for k in range(1, len(steps.timesteps)):
        error = fidelity._output_error(golden, prediction, k, 1e-3)
        output = steps.outputs[k].astype(np.float64)
        flat = lambda array: array.reshape(1, -1)  # noqa: E731 - one sample: the same mean that the conversion takes
        point = (prediction, float(steps.alphas[k]), float(steps.sigmas[k]))
        noise = np.random.default_rng(k).standard_normal(output.shape)
        noise *= error * np.linalg.norm(output) / np.linalg.norm(noise)
        reference, moved = (score(*point, steps.inputs[k], x) for x in (output, output + noise))
        assert relative_error(flat(reference), flat(moved)) == pytest.approx(1e-3, rel=1e-6)


def test_one_wrong_evaluation_exceeds_what_is_explained_exactly_when_it_exceeds_l1(golden):
    """First evaluation of the loop: its drift is its own error times a coefficient of the table."""
    loop = golden.trajectories[0]
    nothing = [0.0] * (len(loop.table) + 1)
    explained = fidelity.explained_drift(golden, LIMITS, "fp32", loop, nothing)
    b = abs(loop.table.outputs[1, 0])
    size = np.sqrt(np.mean(golden.steps.outputs[0].astype(float) ** 2)) / np.sqrt(
        np.mean(loop.inputs[1].astype(float) ** 2)
    )
    assert explained[0] == fidelity.ROUNDING
    assert explained[1] == pytest.approx(fidelity.ROUNDING + b * size * LIMITS.L1.rel_error, rel=1e-6)
    grown = fidelity.explained_drift(golden, LIMITS, "fp32", loop, [1e-2] * len(nothing))
    assert np.all(grown[1:] > explained[1:] + 1e-2)
