"""The noise generator: normal to the far tails, independent over samples and streams, the same at any batch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.runtime.errors import InvalidInput
from lehr.runtime.noise import _inverse_normal, _log, batch_normal, standard_normal

stats = pytest.importorskip("scipy.stats")
special = pytest.importorskip("scipy.special")

COUNT = 400_000
SEEDS = st.integers(0, 2**63 - 1)


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return standard_normal(20_240_607, 3, (COUNT,)).astype(np.float64)


# ------------------------------------------------------------------------------------------------ the quantile


def test_the_quantile_is_scipys_over_the_whole_range_of_32_bits() -> None:
    near_the_ends = np.r_[-(2**31) + np.arange(2000), 2**31 - 1 - np.arange(2000)]
    raw = np.r_[near_the_ends, np.linspace(-(2**31), 2**31 - 1, 200_001)].astype(np.int32)
    expected = special.ndtri((raw.astype(np.float64) + 0.5) * 2.0**-32 + 0.5)
    assert np.allclose(_inverse_normal(raw), expected, rtol=1e-6, atol=1e-9)


def test_the_quantile_is_odd_so_that_the_mean_is_exactly_zero() -> None:
    raw = np.random.default_rng(0).integers(0, 2**31, 10_000).astype(np.int32)
    assert np.abs(_inverse_normal(raw) + _inverse_normal(-1 - raw)).max() <= 3e-7


def test_the_logarithm_made_of_basic_operations_is_the_logarithm() -> None:
    p = np.r_[np.geomspace(2.0**-33, 0.075, 20_001), 0.5]
    assert np.abs(_log(p) - np.log(p)).max() < 2e-10


# ------------------------------------------------------------------------------------------------- distribution


def test_moments_up_to_the_sixth_are_those_of_a_unit_normal(normals: np.ndarray) -> None:
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(np.mean(normals**power) - expected) < 4.5 * np.sqrt(variance / COUNT), power


def test_a_kolmogorov_smirnov_test_finds_no_difference_from_a_normal(normals: np.ndarray) -> None:
    assert stats.kstest(normals, "norm").pvalue > 1e-3


def test_tails_hold_the_right_share_up_to_five_sigma() -> None:
    rows = np.concatenate([standard_normal(1, k, (2**21,)) for k in range(3)])
    for limit in (2.0, 3.0, 4.0, 4.5, 5.0):
        expected = len(rows) * 2 * special.ndtr(-limit)
        for share in (np.sum(rows > limit), np.sum(rows < -limit)):
            assert abs(share - expected / 2) < 4.5 * np.sqrt(expected / 2), limit


def test_neighbours_samples_streams_and_seeds_are_uncorrelated() -> None:
    base = standard_normal(7, 0, (COUNT,)).astype(np.float64)
    others = {
        "next value": np.roll(base, 1),
        "second next value": np.roll(base, 2),
        "next sample": standard_normal(7, 1, (COUNT,)),
        "next stream": standard_normal(7, 0, (COUNT,), stream=1),
        "far stream": standard_normal(7, 0, (COUNT,), stream=40),
        "next seed": standard_normal(8, 0, (COUNT,)),
        "seed and sample swapped": standard_normal(0, 7, (COUNT,)),
    }
    for name, other in others.items():
        for a, b in ((base, other), (base**2 - 1, other.astype(np.float64) ** 2 - 1), (np.abs(base) - 0.8, other)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(COUNT), name


def test_sums_over_samples_and_over_streams_are_normal_too() -> None:
    for draws in (
        np.stack([standard_normal(5, k, (500,)) for k in range(64)]),
        np.stack([standard_normal(5, 0, (500,), stream=k) for k in range(64)]),
    ):
        assert stats.kstest(draws.sum(axis=0) / 8.0, "norm").pvalue > 1e-3


# ------------------------------------------------------------------------------------------------ reproducibility


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, batch=st.integers(1, 5), stream=st.integers(0, 100))
def test_a_sample_has_the_same_noise_in_any_batch(seed: int, batch: int, stream: int) -> None:
    shape = (2, 3, 5)
    together = batch_normal(seed, range(batch), shape, stream=stream)
    assert together.dtype == np.float32
    assert together.shape == (batch, *shape)
    for k in range(batch):
        assert np.array_equal(together[k], standard_normal(seed, k, shape, stream=stream))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, short=st.integers(0, 40), long=st.integers(0, 40))
def test_a_shorter_noise_is_the_beginning_of_a_longer_one(seed: int, short: int, long: int) -> None:
    short, long = sorted((short, long))
    assert np.array_equal(standard_normal(seed, 0, (short,)), standard_normal(seed, 0, (long,))[:short])


def test_the_numbers_are_these_on_every_machine() -> None:
    # Recorded once with numpy 2.4.6 on x86-64; basic IEEE operations alone, so no tolerance.
    noise = standard_normal(1234, 5, (4, 64, 64), stream=6)
    digest = hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest()
    assert digest == "ef98b0779e0fca80fd72f50e3def70c6778e1227231af2c07283ade5d7acd5f6"
    assert noise.ravel()[:3].tolist() == [-1.4240097999572754, 0.5105921030044556, 0.32509270310401917]


@pytest.mark.parametrize("seed, index, stream", [(-1, 0, 0), (0, -1, 0), (2**63, 0, 0), (0, 0, -1)])
def test_a_seed_out_of_range_is_refused(seed: int, index: int, stream: int) -> None:
    with pytest.raises(InvalidInput, match="seed, sample index and stream"):
        standard_normal(seed, index, (4,), stream=stream)
