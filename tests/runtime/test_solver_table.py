"""Tables as linear algebra: what the loop computes is what the coefficients say, and what is saved comes back."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.runtime.errors import BundleError, InvalidInput, RunFailed
from lehr.runtime.loop import sample
from lehr.runtime.paths import EDM, VP, LinearFlow
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, V_PREDICTION, Prediction, PredictionKind
from lehr.runtime.recurrence import Kept
from lehr.runtime.solver_table import Clip, DynamicThreshold, LearnedVariance, SolverTable, TableWriter
from lehr.runtime.solvers import solver_table

SHAPE = (2, 3, 4)


def make(n: int, **changes: Any) -> SolverTable:
    """A table of n evaluations without noise that steps nowhere, with fields replaced."""
    fields: dict[str, Any] = {
        "sampler": "test",
        "prediction": EPSILON,
        "timesteps": np.arange(n, 0, -1.0),
        "alphas": np.full(n, 0.8),
        "sigmas": np.full(n, 0.6),
        "start": np.ones(n + 1),
        "outputs": np.zeros((n + 1, n)),
        "noises": np.zeros((n + 1, 0)),
        "denoised_from_input": np.full(n, 1.25),
        "denoised_from_output": np.full(n, -0.75),
        "options": {"num_inference_steps": n},
    }
    return SolverTable(**{**fields, **changes})


def run(
    table: SolverTable, *, seed: int = 0, extra: bool = False
) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    """Run with random outputs: (final, inputs, everything that was fed)."""
    generator = np.random.default_rng(seed)
    x_T = generator.standard_normal(SHAPE)
    noises = [generator.standard_normal(SHAPE) for _ in range(table.num_noises)]
    inputs, outputs, variances = [], [], []

    def network(x: np.ndarray, timestep: float) -> np.ndarray:
        inputs.append(x.copy())
        outputs.append(generator.standard_normal(SHAPE))
        variances.append(generator.uniform(0.1, 1.0, SHAPE))
        return np.concatenate([outputs[-1], variances[-1]], axis=1) if extra else outputs[-1]

    final = sample(network, table, x_T, injected=noises)
    return final, inputs, {"x_T": x_T, "outputs": outputs, "noises": noises, "variances": variances}


def rows_of(table: SolverTable, fed: dict[str, Any], inputs: list[np.ndarray]) -> np.ndarray:
    """The rows by matrix product, (N + 1, …)."""
    banks = [[fed["x_T"]], fed["outputs"]]
    if table.clip is not None:
        pairs = zip(table.denoised_from_input, table.denoised_from_output, inputs, fed["outputs"], strict=True)
        banks.append([table.clip(a * x + b * output) for a, b, x, output in pairs])
    vectors = np.stack([item for bank in [*banks, fed["noises"]] for item in bank])
    return np.tensordot(table.coefficients, vectors, axes=1)


# ------------------------------------------------------------------------------------------- the loop and a table

coefficients = st.floats(-2, 2, width=32)


@st.composite
def random_tables(draw: st.DrawFn) -> SolverTable:
    n, m = draw(st.integers(1, 7)), draw(st.integers(0, 3))
    lower = np.tril(np.ones((n + 1, n)), -1)
    values = lambda shape: draw(hnp.arrays(np.float64, shape, elements=coefficients))  # noqa: E731
    clip = draw(st.sampled_from([None, Clip(limit=0.5), DynamicThreshold(ratio=0.7, max_value=2.0)]))
    return make(
        n,
        start=values(n + 1),
        outputs=values((n + 1, n)) * lower,
        noises=values((n + 1, m)),
        clip=clip,
        clipped=None if clip is None else values((n + 1, n)) * lower,
    )


@given(random_tables())
@settings(max_examples=60)
def test_the_loop_computes_what_the_coefficients_say(table: SolverTable) -> None:
    final, inputs, fed = run(table)
    expected = rows_of(table, fed, inputs)
    size = np.abs(table.coefficients).sum(axis=1).max() * 10 + 1e-9

    assert np.abs(np.stack([*inputs, final]) - expected).max() < 1e-11 * size


@given(random_tables())
@settings(max_examples=60)
def test_a_recurrence_if_there_is_one_is_the_table(table: SolverTable) -> None:
    form = table.recurrence()
    if form is None:
        return
    result, _, _ = run(table)
    table.__dict__["_recurrence"] = None  # the dense form
    dense, _, _ = run(table)

    assert np.abs(result - dense).max() <= 1e-9 * max(np.abs(table.coefficients).sum(axis=1).max(), 1)


@st.composite
def random_recurrences(draw: st.DrawFn) -> tuple[SolverTable, int]:
    """x' from the last K inputs and the last L of F, of D or of eps, with fresh noise; and how many latents that is."""
    n = draw(st.integers(8, 30))
    num_inputs, num_outputs = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    kept = draw(st.sampled_from(["output", "denoised", "noise"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    writer = TableWriter("random", VP(), EPSILON, max_evaluations=n, max_noises=n)
    inputs, outputs = [writer.x_T], []
    timesteps = np.linspace(900, 100, n).round()
    for t in timesteps:
        x = inputs[-1]
        denoised = writer.denoise(x, float(t))
        alpha, sigma = (float(value) for value in VP().alpha_sigma(t))
        eps = (x - alpha * denoised) / sigma
        outputs.append({"output": eps, "noise": eps, "denoised": alpha * denoised}[kept])
        following = sum(generator.uniform(0.3, 0.6) * x for x in inputs[-num_inputs:])
        following = following + sum(generator.uniform(-0.3, 0.3) * y for y in outputs[-num_outputs:])
        inputs.append(following + generator.uniform(0.1, 0.2) * writer.noise())
    return writer.finish(inputs[-1], init_noise_sigma=1.0, options={}), num_inputs + num_outputs


@given(random_recurrences())
@settings(max_examples=40)
def test_the_recurrence_of_a_recurrence_is_found_and_equals_the_table(made: tuple[SolverTable, int]) -> None:
    table, latents = made
    form = table.recurrence()

    assert form is not None
    assert form.depth <= latents + 1
    final, inputs, fed = run(table)
    expected = rows_of(table, fed, inputs)
    scale = np.abs(table.coefficients).max(axis=1)[:, None, None, None]
    assert np.abs((np.stack([*inputs, final]) - expected) / scale).max() < 1e-10


def test_a_table_without_structure_has_no_recurrence() -> None:
    generator = np.random.default_rng(0)
    n = 20
    table = make(n, start=generator.standard_normal(n + 1), outputs=np.tril(generator.standard_normal((n + 1, n)), -1))

    assert table.recurrence() is None
    final, inputs, fed = run(table)
    assert np.abs(final - rows_of(table, fed, inputs)[-1]).max() < 1e-12 * np.abs(final).max() * n


@pytest.mark.parametrize(
    "name,path,prediction,depth",
    [
        ("euler", VP(), EPSILON, 2),
        ("euler", EDM(), Prediction(kind=PredictionKind.EDM), 2),
        ("ddim", VP(), V_PREDICTION, 2),
        ("dpmpp_2m", VP(), EPSILON, 3),
        ("dpmpp_2m", EDM(), Prediction(kind=PredictionKind.EDM), 3),
        ("flow_euler", LinearFlow(), FLOW_PREDICTION, 2),
    ],
)
def test_known_samplers_keep_few_latents(name: str, path: Any, prediction: Prediction, depth: int) -> None:
    form = solver_table(name, path, prediction, 50).recurrence()

    assert form is not None
    assert (form.depth, form.wide) == (depth, False)
    assert form.kept is (Kept.DENOISED if name == "dpmpp_2m" else Kept.OUTPUT)


def test_a_recurrence_that_would_lose_float32_digits_carries_float64() -> None:
    n = 40
    writer = TableWriter("steep", VP(), EPSILON, max_evaluations=n)
    x = writer.x_T
    before = x
    for t in np.linspace(900, 100, n).round():
        F = writer.denoise(x, float(t)) * 0 + writer._basis[writer._evaluations]
        x, before = 1.999 * x - 0.9995 * before + 0.01 * F, x  # the double root near 1 adds rounding up, and again
    table = writer.finish(x, init_noise_sigma=1.0, options={})
    form = table.recurrence()
    assert form is not None
    assert form.wide

    noise = np.random.default_rng(0).standard_normal((1, 1000))
    network: Callable[[np.ndarray, float], np.ndarray] = lambda x, _t: np.full_like(x, 0.25)  # noqa: E731
    exact = sample(network, table, noise)
    rounded = sample(network, table, noise.astype(np.float32))
    assert rounded.dtype == np.float32
    assert np.abs(rounded - exact).max() < 2e-7 * np.abs(exact).max()


def test_building_fifty_steps_takes_less_than_fifty_milliseconds() -> None:
    def seconds() -> float:
        begin = time.process_time()
        table = solver_table("dpmpp_2m", VP(), EPSILON, 50)
        assert table.recurrence() is not None
        return time.process_time() - begin

    assert min(seconds() for _ in range(5)) < 0.05


def test_gains_are_what_an_error_of_one_output_does_to_the_final_sample() -> None:
    table = solver_table("dpmpp_2m", VP(), EPSILON, 12)
    x_T = np.random.default_rng(0).standard_normal(SHAPE)

    def final(wrong: int | None) -> np.ndarray:
        calls = iter(range(100))
        return sample(lambda x, t: np.full_like(x, 0.3 + (next(calls) == wrong)), table, x_T)

    for i in range(12):
        assert final(i) - final(None) == pytest.approx(np.full(SHAPE, table.gains()[i]), rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------------------------------- element-wise operations


def test_dynamic_thresholding_divides_by_each_samples_own_quantile() -> None:
    op = DynamicThreshold(ratio=0.5, max_value=3.0)
    denoised = np.array([[-4.0, -2.0, 0.0, 2.0, 4.0], [0.1, 0.2, 0.3, -0.4, 0.5], [-10, -20, 30, 40, 50.0]])
    expected = [[-1, -1, 0, 1, 1], [0.1, 0.2, 0.3, -0.4, 0.5], [-1, -1, 1, 1, 1]]

    assert op(denoised) == pytest.approx(np.array(expected))
    assert np.array_equal(op(denoised)[1:2], op(denoised[1:2]))


@given(
    hnp.arrays(np.float32, (3, 5, 4), elements=st.floats(-50, 50, width=32)),
    st.floats(0, 1),
    st.floats(1, 9),
)
@settings(max_examples=50)
def test_thresholded_estimates_lie_in_the_unit_interval(denoised: np.ndarray, ratio: float, most: float) -> None:
    result = DynamicThreshold(ratio=ratio, max_value=most)(denoised)

    assert result.dtype == np.float32
    assert np.abs(result).max() <= 1


def test_learned_variance_scales_the_noise_by_what_the_evaluation_before_it_said() -> None:
    noises = np.zeros((4, 2))
    noises[1:, 0], noises[2:, 1] = 0.5, 0.25
    table = make(3, noises=noises, variance=LearnedVariance.LOG_RANGE, variance_slopes=np.array([1.5, -0.5]))
    final, inputs, fed = run(table, extra=True)
    first = 0.5 * fed["noises"][0] * np.exp(1.5 * fed["variances"][0])
    second = 0.25 * fed["noises"][1] * np.exp(-0.5 * fed["variances"][1])

    assert np.allclose(inputs[1], fed["x_T"] + first)
    assert np.allclose(final, fed["x_T"] + first + second)


def test_a_directly_learned_variance_is_a_square_root_and_cannot_be_negative() -> None:
    noises = np.array([[0.0], [2.0]])
    table = make(1, noises=noises, variance=LearnedVariance.DIRECT)
    final, _, fed = run(table, extra=True)

    assert np.allclose(final, fed["x_T"] + 2 * np.sqrt(fed["variances"][0]) * fed["noises"][0])
    with pytest.raises(RunFailed, match="negative variance"):
        sample(lambda x, _t: np.concatenate([x, -np.ones_like(x)], axis=1), table, fed["x_T"], injected=fed["noises"])


# ---------------------------------------------------------------------------------------------------- save and load


def load(data: bytes) -> SolverTable:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return SolverTable.from_arrays(dict(arrays))


@given(random_tables())
@settings(max_examples=30)
def test_a_saved_table_comes_back_bit_by_bit(table: SolverTable) -> None:
    again = load(table.to_bytes())

    assert again.to_bytes() == table.to_bytes()
    assert (again.clip, again.variance, again.prediction) == (table.clip, table.variance, table.prediction)
    assert np.array_equal(again.coefficients, table.coefficients)


def test_a_learned_variance_and_its_slopes_are_saved() -> None:
    table = make(
        2,
        noises=np.array([[0.0], [1.0], [1.0]]),
        variance=LearnedVariance.LOG_RANGE,
        variance_slopes=np.array([0.3]),
        prediction=Prediction(kind=PredictionKind.EDM, sigma_data=0.7, sign=-1),
    )
    again = load(table.to_bytes())

    assert again.variance is LearnedVariance.LOG_RANGE
    assert again.variance_slopes is not None
    assert again.variance_slopes.tolist() == [0.3]
    assert again.prediction == table.prediction


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.pop(name)


def _with(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({key: np.asarray(value) for key, value in values.items()})


def _text(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        _without("meta"),
        _without("outputs"),
        _with(outputs=np.zeros((3, 3))),
        _with(outputs=np.zeros((4, 3), np.float32)),
        _with(outputs=np.ones((4, 3))),
        _with(start=np.full(4, np.nan)),
        _with(timesteps=np.array(3.0)),
        _with(timesteps=np.zeros(0)),
        _with(stranger=np.zeros(3)),
        _with(clipped=np.zeros((4, 3))),
        _with(variance_slopes=np.zeros(0)),
        _with(meta=_text(b"{")),
        _with(meta=_text(b"\xff\xfe")),
        _with(meta=_text(b"[1, 2]")),
        _with(meta=_text(b"{}")),
        _with(meta=_text(b"[" * 5000)),
        _with(meta=_text(b'{"sampler": "x", "prediction": {"kind": "?"}, "clip": null, "variance": null}')),
    ],
)
def test_a_damaged_table_is_a_bundle_error(damage: Callable[[dict[str, Any]], None]) -> None:
    with np.load(io.BytesIO(make(3).to_bytes())) as file:
        arrays = dict(file)
    damage(arrays)

    with pytest.raises(BundleError, match=r"solver table is damaged.*Make it again"):
        SolverTable.from_arrays(arrays)


@pytest.mark.parametrize(
    "change",
    [
        {"clip": {"kind": "soft"}},
        {"clip": {"kind": "clip", "limit": -1}},
        {"clip": {"kind": "clip", "height": 1}},
        {"clip": 1.0},
        {"variance": "maybe"},
        {"init_noise_sigma": 0.0},
        {"init_noise_sigma": "loud"},
        {"prediction": {"kind": "epsilon", "sign": 3}},
    ],
)
def test_damaged_metadata_is_a_bundle_error(change: dict[str, Any]) -> None:
    import json

    table = make(2, clip=Clip(), clipped=np.zeros((3, 2)))
    with np.load(io.BytesIO(table.to_bytes())) as file:
        arrays = dict(file)
    meta = {**json.loads(arrays["meta"].tobytes()), **change}
    arrays["meta"] = _text(json.dumps(meta).encode())

    with pytest.raises(BundleError, match="solver table is damaged"):
        SolverTable.from_arrays(arrays)


def test_saved_tables_hold_no_pickle_and_no_time() -> None:
    data = make(3).to_bytes()
    time.sleep(0.01)

    assert data == make(3).to_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert all(b"pickle" not in archive.read(info) for info in archive.infolist())


def test_options_that_are_no_json_are_refused_when_saving() -> None:
    with pytest.raises(InvalidInput, match="table 'test'"):
        make(2, options={"limit": float("inf")}).to_bytes()


# ------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"start": np.ones(3)}, "'start'"),
        ({"outputs": np.ones((4, 3))}, "lower triangular"),
        ({"outputs": np.zeros((4, 3), np.float32)}, "float32"),
        ({"noises": np.full((4, 1), np.inf)}, "not finite"),
        ({"clip": Clip()}, "come together"),
        ({"clipped": np.zeros((4, 3))}, "come together"),
        ({"variance": LearnedVariance.LOG_RANGE}, "slopes"),
        ({"variance_slopes": np.zeros(0)}, "slopes"),
        ({"variance": LearnedVariance.DIRECT, "noises": np.ones((4, 1))}, "nothing is evaluated before"),
        ({"init_noise_sigma": float("nan")}, "init_noise_sigma"),
        ({"init_noise_sigma": -1.0}, "init_noise_sigma"),
    ],
)
def test_a_table_that_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        make(3, **changes)


@pytest.mark.parametrize(
    "op", [lambda: Clip(limit=0), lambda: DynamicThreshold(ratio=1.5), lambda: DynamicThreshold(max_value=0)]
)
def test_operations_check_their_numbers(op: Callable[[], Any]) -> None:
    with pytest.raises(InvalidInput, match=r"positive|quantile"):
        op()


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make(2).outputs[1, 0] = 1


def test_describe_says_what_a_person_asks() -> None:
    text = make(
        2, clip=DynamicThreshold(), clipped=np.zeros((3, 2)), noises=np.zeros((3, 1)), variance=LearnedVariance.UNUSED
    ).describe()

    for part in (
        "test: 2 evaluations",
        "1 injected noises",
        "recurrence of",
        "0.995 quantile",
        "learned variance (unused)",
    ):
        assert part in text
