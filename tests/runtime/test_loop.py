"""The loop: what it feeds the network, in which order it draws noise, and that a batch changes nothing."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.loop import Step, sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.paths import VP, LinearFlow
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION
from lehr.runtime.solver_table import Clip, DynamicThreshold, LearnedVariance, SolverTable
from lehr.runtime.solvers import solver_table

SHAPE = (3, 5, 6)


def network(x: np.ndarray, timestep: float) -> np.ndarray:
    """Not linear; every sample for itself."""
    return np.tanh(x + np.roll(x, 1, axis=-1) * x.dtype.type(0.3)) * x.dtype.type(np.cos(timestep))


def with_variance(x: np.ndarray, timestep: float) -> np.ndarray:
    return np.concatenate([network(x, timestep), np.tanh(x)], axis=1)


def clipped_ddim(op: Clip | DynamicThreshold) -> SolverTable:
    """DDIM on clip(D): x' = alpha' clip(D) + sigma' F."""
    table = solver_table("ddim", VP(), EPSILON, 6)
    n = len(table)
    outputs, clipped, start = np.zeros((n + 1, n)), np.zeros((n + 1, n)), np.zeros(n + 1)
    start[0] = 1
    for i in range(n):
        clipped[i + 1, i] = table.alphas[i + 1] if i + 1 < n else 1.0
        outputs[i + 1, i] = table.sigmas[i + 1] if i + 1 < n else 0.0
    return replace(table, start=start, outputs=outputs, clipped=clipped, clip=op)


def dense(table: SolverTable) -> SolverTable:
    table.__dict__["_recurrence"] = None
    return table


def wide(table: SolverTable) -> SolverTable:
    form = table.recurrence()
    assert form is not None
    table.__dict__["_recurrence"] = replace(form, wide=True)
    return table


def learned() -> SolverTable:
    table = solver_table("ddim", VP(), EPSILON, 6, eta=1.0)
    slopes = np.linspace(0.2, 0.5, table.num_noises)
    return replace(table, variance=LearnedVariance.LOG_RANGE, variance_slopes=slopes)


TABLES: dict[str, tuple[Callable[[], SolverTable], Any]] = {
    "one input": (lambda: solver_table("euler", VP(), EPSILON, 6), network),
    "estimates kept": (lambda: solver_table("dpmpp_2m", VP(), EPSILON, 6), network),
    "with noise": (lambda: solver_table("ddim", VP(), EPSILON, 6, eta=0.7), network),
    "dense": (lambda: dense(solver_table("ddim", VP(), EPSILON, 6, eta=0.7)), network),
    "wide": (lambda: wide(solver_table("dpmpp_2m", VP(), EPSILON, 6)), network),
    "clipped": (lambda: clipped_ddim(Clip(limit=0.8)), network),
    "clipped dense": (lambda: dense(clipped_ddim(Clip(limit=0.8))), network),
    "thresholded": (lambda: clipped_ddim(DynamicThreshold(ratio=0.9, max_value=3.0)), network),
    "learned variance": (learned, with_variance),
    "learned variance dense": (lambda: dense(learned()), with_variance),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_changes_no_bit_of_a_sample(kind: str, dtype: type) -> None:
    build, model = TABLES[kind]
    table = build()
    generator = np.random.default_rng(0)
    x_T = generator.standard_normal((4, *SHAPE)).astype(dtype)
    noises = [generator.standard_normal((4, *SHAPE)).astype(dtype) for _ in range(table.num_noises)]
    together = sample(model, table, x_T, injected=noises)
    alone = [sample(model, table, x_T[k : k + 1], injected=[z[k : k + 1] for z in noises]) for k in range(4)]

    assert together.dtype == dtype
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("kind", TABLES)
def test_single_precision_follows_double_precision(kind: str) -> None:
    build, model = TABLES[kind]
    table = build()
    generator = np.random.default_rng(0)
    x_T = generator.standard_normal((2, *SHAPE))
    noises = [generator.standard_normal((2, *SHAPE)) for _ in range(table.num_noises)]
    double = sample(model, table, x_T, injected=noises)
    single = sample(model, table, x_T.astype(np.float32), injected=[z.astype(np.float32) for z in noises])

    assert np.abs(single - double).max() < 2e-5 * np.abs(double).max()


@pytest.mark.parametrize(
    "pair", [("with noise", "dense"), ("clipped", "clipped dense"), ("learned variance", "learned variance dense")]
)
def test_the_two_forms_of_a_table_agree(pair: tuple[str, str]) -> None:
    generator = np.random.default_rng(0)
    x_T = generator.standard_normal((2, *SHAPE))
    noises = [generator.standard_normal((2, *SHAPE)) for _ in range(6)]
    results = [sample(TABLES[kind][1], TABLES[kind][0](), x_T, injected=noises) for kind in pair]

    assert np.abs(results[0] - results[1]).max() < 1e-12 * np.abs(results[0]).max()


def test_the_network_sees_the_tables_timesteps_in_order() -> None:
    table = solver_table("flow_euler", LinearFlow(), FLOW_PREDICTION, 5)
    seen: list[float] = []
    sample(lambda x, t: (seen.append(t), -x)[1], table, np.ones((1, 2), np.float32))

    assert seen == table.timesteps.tolist()


def test_a_flow_towards_a_point_arrives_there() -> None:
    table = solver_table("flow_euler", LinearFlow(), FLOW_PREDICTION, 7)
    target = np.linspace(-1, 1, 12).reshape(1, 3, 4)
    times = iter(table.timesteps / 1000)
    final = sample(lambda x, _t: (x - target) / next(times), table, np.random.default_rng(0).standard_normal((1, 3, 4)))

    assert np.allclose(final, target, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ noise


def test_noises_are_used_in_the_order_in_which_the_sampler_draws_them() -> None:
    table = solver_table("ddim", VP(), EPSILON, 4, eta=1.0)
    asked: list[int] = []

    def draw(j: int) -> np.ndarray:
        asked.append(j)
        return np.full((1, 2), 10.0**j, np.float32)

    inputs: list[np.ndarray] = []
    sample(
        lambda x, _t: (inputs.append(x.copy()), np.zeros_like(x))[1], table, np.zeros((1, 2), np.float32), injected=draw
    )

    assert asked == [0, 1, 2]
    for i, x in enumerate(inputs):
        expected = sum(table.noises[i, j] * 10.0**j for j in range(3))
        assert x == pytest.approx(np.full((1, 2), expected), rel=1e-5)


def test_a_list_and_a_function_of_noises_are_the_same() -> None:
    table = solver_table("ddim", VP(), EPSILON, 5, eta=1.0)
    x_T = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    noises = [np.random.default_rng(j).standard_normal(x_T.shape).astype(np.float32) for j in range(4)]

    assert np.array_equal(
        sample(network, table, x_T, injected=noises), sample(network, table, x_T, injected=lambda j: noises[j])
    )


def test_without_noises_the_counter_based_generator_is_asked() -> None:
    table = solver_table("ddim", VP(), EPSILON, 5, eta=1.0)
    x_T = np.zeros((2, *SHAPE), np.float32)
    drawn = [batch_normal(0, range(2), SHAPE, stream=1 + j) for j in range(table.num_noises)]

    assert np.array_equal(sample(network, table, x_T), sample(network, table, x_T, injected=drawn))


# --------------------------------------------------------------------------------------------------------- previews


@pytest.mark.parametrize("kind", TABLES)
def test_a_preview_sees_each_evaluation_and_changes_nothing(kind: str) -> None:
    build, model = TABLES[kind]
    table = build()
    x_T = np.random.default_rng(1).standard_normal((2, *SHAPE)).astype(np.float32)
    steps: list[Step] = []
    watched = sample(model, table, x_T, on_step=steps.append)

    assert np.array_equal(watched, sample(model, table, x_T))
    assert [step.index for step in steps] == list(range(len(table)))
    assert [step.timestep for step in steps] == table.timesteps.tolist()
    for i, step in enumerate(steps):
        assert np.array_equal(step.output, model(step.sample, step.timestep))
        prediction = step.output[:, : SHAPE[0]]
        expected = table.denoised_from_input[i] * step.sample + table.denoised_from_output[i] * prediction
        assert step.denoised == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_an_exception_in_the_preview_ends_the_loop() -> None:
    calls: list[int] = []

    class Enough(Exception):
        pass

    def stop(step: Step) -> None:
        if step.index == 2:
            raise Enough

    with pytest.raises(Enough):
        sample(
            lambda x, _t: (calls.append(1), x)[1],
            solver_table("euler", VP(), EPSILON, 6),
            np.ones((1, 2), np.float32),
            on_step=stop,
        )
    assert len(calls) == 3


# --------------------------------------------------------------------------------------------------------- refusals


def test_too_few_noises_and_noises_of_another_shape_are_refused() -> None:
    table = solver_table("ddim", VP(), EPSILON, 4, eta=1.0)
    x_T = np.zeros((2, *SHAPE), np.float32)

    with pytest.raises(InvalidInput, match="injects 3 noises, got 2"):
        sample(network, table, x_T, injected=[x_T, x_T])
    with pytest.raises(InvalidInput, match="injected noise 0 has shape"):
        sample(network, table, x_T, injected=lambda _j: x_T[:1])


@pytest.mark.parametrize("dtype", [np.float16, np.int64])
def test_a_start_of_another_dtype_is_refused(dtype: type) -> None:
    with pytest.raises(InvalidInput, match="expected float32 or float64"):
        sample(network, solver_table("euler", VP(), EPSILON, 3), np.zeros((1, 4), dtype))


def test_extra_channels_belong_to_a_learned_variance_and_only_there() -> None:
    plain, variance = solver_table("euler", VP(), EPSILON, 3), learned()
    x_T = np.zeros((2, *SHAPE), np.float32)

    with pytest.raises(RunFailed, match=r"returned shape \(2, 6, 5, 6\).*expected \(2, 3, 5, 6\)"):
        sample(with_variance, plain, x_T)
    with pytest.raises(RunFailed, match=r"returned shape \(2, 3, 5, 6\).*expects a learned variance"):
        sample(network, variance, x_T)
    with pytest.raises(InvalidInput, match="needs \\(batch, channels"):
        sample(with_variance, variance, np.zeros(4, np.float32))
    with pytest.raises(RunFailed, match=r"returned shape \(2, 3, 5\)"):
        sample(lambda x, _t: x[..., 0], plain, x_T)


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "name,order",
    [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3), ("deis", 3), ("lms", 4), ("pndm", 4), ("flow_euler", 1)],
)
def test_the_loop_keeps_no_more_than_its_order_and_two_latents(name: str, order: int) -> None:
    path, prediction = (LinearFlow(), FLOW_PREDICTION) if name == "flow_euler" else (VP(), EPSILON)
    table = solver_table(name, path, prediction, 30)
    form = table.recurrence()
    assert form is not None
    assert form.depth <= order + 2
    x_T = np.ones((1, 4, 128, 128), np.float32)
    output = np.ones_like(x_T)
    most = 0

    def watch(x: np.ndarray, _t: float) -> np.ndarray:
        nonlocal most
        most = max(most, tracemalloc.get_traced_memory()[0])
        return output  # the network's own latents do not count

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        sample(watch, table, x_T)
    finally:
        tracemalloc.stop()

    assert (most - before) / x_T.nbytes <= order + 2.1
