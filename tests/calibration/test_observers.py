"""Histograms without ranges known beforehand, the ranges chosen from them, and statistics of real activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lehr.calibration.collected import Trajectories
from lehr.calibration.columns import columns
from lehr.calibration.configs import Range, ZeroPoint
from lehr.calibration.execute import OrtGraph, step_graph
from lehr.calibration.histogram import BINS, HIGH, LOW, bins_of, count_by_channel, edges, range_of, squared_error
from lehr.calibration.layers import Kind, layers, probabilities_of
from lehr.calibration.observers import Statistics, TensorStatistics, observe
from lehr.calibration.trajectories import collect
from lehr.engines.portable import portable_denoiser
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import InvalidInput

FLOATS = st.floats(-(2.0 ** (HIGH - 1)), 2.0 ** (HIGH - 1), width=32)
TENSORS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=FLOATS)


def brute(values: np.ndarray, limit: float, levels: int = 127) -> float:
    step = limit / levels
    return float(((np.clip(np.rint(values / step), -levels, levels) * step - values) ** 2).sum())


def histogram_of(values: np.ndarray) -> np.ndarray:
    return count_by_channel(values.reshape(-1, 1).astype(np.float32))[0]


# ------------------------------------------------------------------------------------------------------ histograms


@given(TENSORS)
def test_every_magnitude_lies_between_the_edges_of_its_bin(values: np.ndarray) -> None:
    found, ends = bins_of(np.ascontiguousarray(values)), edges()
    magnitudes = np.abs(values)
    assert np.all(ends[found] <= magnitudes)
    assert np.all(magnitudes < ends[found + 1])


@given(TENSORS)
def test_counts_are_those_of_numpys_histogram_channel_by_channel(values: np.ndarray) -> None:
    counts = count_by_channel(values)
    for k in range(values.shape[1]):
        assert np.array_equal(counts[k], np.histogram(np.abs(values[:, k]), edges())[0])


def test_numbers_beyond_the_bins_are_counted_in_the_last_one_and_tiny_ones_in_the_first() -> None:
    counts = count_by_channel(np.array([[2.0**40], [2.0 ** (LOW - 5)], [0.0]], np.float32))
    assert counts[0, BINS - 1] == 1
    assert counts[0, 0] == 2


# --------------------------------------------------------------------------------------------------------- ranges


@given(TENSORS, st.sampled_from(Range))
@settings(max_examples=60)
def test_a_range_never_exceeds_the_largest_magnitude_and_is_none_only_for_zeros(
    values: np.ndarray, method: Range
) -> None:
    peak = float(np.abs(values).max())
    found = range_of(histogram_of(values), peak, method)
    assert found <= peak * (1 + 1e-6)
    assert (found > 0) == (peak > 0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 37.0])
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform"])
def test_the_predicted_error_is_the_error(kind: str, scale: float) -> None:
    values = (scale * getattr(np.random.default_rng(0), kind)(size=100_000)).astype(np.float32)
    peak = float(np.abs(values).max())
    limits = peak * np.array([1.0, 0.8, 0.5, 0.3])
    told = squared_error(histogram_of(values), peak, limits)
    for limit, error in zip(limits, told, strict=True):
        assert error == pytest.approx(brute(values, limit), rel=0.12)  # a bin is an eighth of an octave


def test_the_mse_range_is_as_good_as_the_best_of_a_search_over_the_raw_numbers() -> None:
    values = np.random.default_rng(1).laplace(size=200_000).astype(np.float32)
    peak = float(np.abs(values).max())
    found = range_of(histogram_of(values), peak, Range.MSE)
    best = min(brute(values, peak * share) for share in np.linspace(0.1, 1, 91))
    assert found < 0.9 * peak  # clipping pays for a distribution with tails
    assert brute(values, found) < 1.05 * best


def test_the_percentile_is_numpys_to_a_bins_width() -> None:
    values = np.random.default_rng(2).standard_normal(500_000).astype(np.float32)
    found = range_of(histogram_of(values), float(np.abs(values).max()), Range.PERCENTILE)
    exact = float(np.quantile(np.abs(values), 0.9999))
    assert exact <= found <= exact * 1.13


def test_entropy_keeps_what_is_spread_evenly_and_clips_a_lone_outlier() -> None:
    even = np.linspace(-1, 1, 100_000).astype(np.float32)
    assert range_of(histogram_of(even), 1.0, Range.ENTROPY) > 0.9
    outlier = np.append(np.random.default_rng(3).standard_normal(100_000), 60.0).astype(np.float32)
    assert range_of(histogram_of(outlier), 60.0, Range.ENTROPY) < 20


# ------------------------------------------------------------------------------------------------------ statistics


def statistics(values: np.ndarray) -> TensorStatistics:
    """Of one tensor (n, C) in one bucket."""
    counts = count_by_channel(values)
    return TensorStatistics(
        axis=-1,
        low=float(values.min()),
        high=float(values.max()),
        lows=values.min(axis=0),
        highs=values.max(axis=0),
        peak=np.abs(values).max(axis=0)[None],
        histogram=counts.sum(axis=0)[None].astype(float),
        by_channel=counts.astype(float),
        mean=values.mean(axis=0, dtype=float),
        magnitude=np.abs(values).mean(axis=0, dtype=float),
        square=(values.astype(float) ** 2).mean(axis=0),
        weights=np.ones(1),
    )


def test_the_histogram_of_divided_channels_is_that_of_the_divided_tensor() -> None:
    values = np.random.default_rng(4).standard_normal((5000, 6)).astype(np.float32)
    divisors = 2.0 ** np.array([0, 1, 2, -1, -3, 0.5])
    told = statistics(values).divided(divisors)
    made = count_by_channel((values / divisors).astype(np.float32)).sum(axis=0)
    centres = np.log2(np.maximum(edges()[:-1], 2.0**LOW))
    assert told.sum() == made.sum()
    assert told @ centres == pytest.approx(made @ centres, rel=0.02)


@pytest.mark.parametrize("divided", [False, True])
def test_an_interval_reaches_from_the_smallest_number_to_the_largest_and_holds_zero(divided: bool) -> None:
    values = np.random.default_rng(5).uniform(-1, 3, (500, 4)).astype(np.float32) + np.arange(4, dtype=np.float32)
    divisors = np.array([1.0, 2.0, 4.0, 0.5]) if divided else None
    seen = values / (1.0 if divisors is None else divisors)
    found = statistics(values)
    low, high = found.interval_of(Range.MIN_MAX, ZeroPoint.OWN, divisors=divisors)
    assert (low, high) == pytest.approx((seen.min(), seen.max()), rel=1e-6)
    assert found.interval_of(Range.MIN_MAX, ZeroPoint.CENTRE, divisors=divisors) == pytest.approx((-high, high))
    clipped = found.interval_of(Range.MSE, ZeroPoint.OWN, divisors=divisors)
    assert low <= clipped[0] <= 0 < clipped[1] <= high
    assert statistics(np.abs(values) + 1).interval_of(Range.MIN_MAX, ZeroPoint.OWN)[0] == 0


def test_block_peaks_are_the_largest_of_their_channels() -> None:
    values = np.arange(-12, 12, dtype=np.float32).reshape(3, 8)
    found = statistics(values).block_peaks(3)
    peaks = np.abs(values).max(axis=0)
    assert found.tolist() == [peaks[:3].max(), peaks[3:6].max(), peaks[6:].max()]


@pytest.mark.parametrize(
    "attributes",
    ["", "<strides=[2,2]>", "<pads=[1,0,2,1]>", "<dilations=[2,1], pads=[2,1,2,1]>", '<auto_pad="NOTSET">'],
)
def test_a_convolution_is_a_product_of_its_columns(attributes: str) -> None:
    text = f"g (float[2,3,9,8] x, float[4,3,3,2] w) => (float[b,c,h,v] y) {{ y = Conv {attributes} (x, w) }}"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    random = np.random.default_rng(5)
    x = random.standard_normal((2, 3, 9, 8)).astype(np.float32)
    w = random.standard_normal((4, 3, 3, 2)).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x, "w": w})[0]
    rows = columns(model.graph[0], x, w.shape)
    assert rows is not None
    made = (rows @ w.reshape(4, -1).T).reshape(2, *expected.shape[2:], 4)
    assert np.allclose(np.moveaxis(made, -1, 1), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------- a whole bundle


@pytest.fixture(scope="module")
def drawn(dit_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Trajectories]:
    bundle = Bundle.open(dit_bundle)
    return bundle, collect(bundle, num=2, steps=3, threads=1, folder=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def observed(drawn: tuple[Bundle, Trajectories]) -> Statistics:
    bundle, data = drawn
    return observe(bundle, data, threads=1, grams=["blocks.0.attn.qkv/MatMul", "x_embedder.proj/Conv"])


def test_what_is_observed_of_an_input_is_what_the_data_holds(
    drawn: tuple[Bundle, Trajectories], observed: Statistics
) -> None:
    values = np.concatenate([evaluation.sample.reshape(-1) for evaluation in drawn[1].evaluations()])
    found = observed.of("sample")  # equal gains: every evaluation counts alike
    assert (found.low, found.high) == (values.min(), values.max())
    assert found.channel_peaks().max() == np.abs(values).max()
    assert found.mean[0] == pytest.approx(values.mean(dtype=float), abs=1e-6)
    assert found.square[0] == pytest.approx((values.astype(float) ** 2).mean(), rel=1e-5)
    assert found.histogram.sum() == values.size
    assert observed.evaluations == 3


def test_the_products_of_inputs_have_their_mean_squares_on_the_diagonal(observed: Statistics) -> None:
    gram = observed.grams["blocks.0.attn.qkv/MatMul"]
    square = observed.of("blocks.0/Add_1").square
    assert np.allclose(np.diag(gram), square, rtol=1e-4)
    assert np.allclose(gram, gram.T)
    assert observed.grams["x_embedder.proj/Conv"].shape == (16, 16)


class Listening:
    """The step graph, and what attention's queries and keys are as it runs."""

    def __init__(self, bundle: Bundle, names: list[str]) -> None:
        model = step_graph(bundle)
        values = {str(value.name): value for node in model.graph for value in node.outputs}
        model.graph.outputs.extend(values[name] for name in names)
        self.names, self.taken = names, []
        self._session = OrtGraph(model, threads=1)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = dict(self._session.run(feeds))
        self.taken.append([outputs.pop(name).astype(np.float64) for name in self.names])
        return outputs


def test_the_largest_probability_of_attention_is_observed_and_nothing_else_of_it(
    drawn: tuple[Bundle, Trajectories], observed: Statistics
) -> None:
    bundle, data = drawn
    layer = next(one for one in layers(step_graph(bundle)) if one.kind is Kind.ATTENTION)
    session = Listening(bundle, list(layer.inputs[:2]))
    denoiser = portable_denoiser(bundle, lambda: session)
    for evaluation in data.evaluations():
        denoiser.with_variance(evaluation.sample, evaluation.timestep, evaluation.conditions)
    largest = 0.0
    for query, key in session.taken:
        logits = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]))
        largest = max(largest, float((logits / logits.sum(axis=-1, keepdims=True)).max()))
    found = observed.of(probabilities_of(layer.name))
    assert found.high == pytest.approx(largest, rel=1e-4)
    assert found.histogram.sum() == len(session.taken)  # one number an evaluation


def test_little_memory_takes_more_runs_and_gives_the_same(
    drawn: tuple[Bundle, Trajectories], observed: Statistics
) -> None:
    bundle, data = drawn
    again = observe(bundle, data, threads=1, memory=1 << 18)
    assert set(again.tensors) == set(observed.tensors)
    for name, found in again.tensors.items():
        assert np.array_equal(found.histogram, observed.of(name).histogram)
        assert np.array_equal(found.peak, observed.of(name).peak)


def test_a_tensor_that_was_not_observed_is_refused_by_name(observed: Statistics) -> None:
    with pytest.raises(InvalidInput, match="'gone' was not observed"):
        observed.of("gone")
