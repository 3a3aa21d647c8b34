"""Distances of distributions against closed forms and SciPy, and intervals against the truth they are to hold."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
import scipy.linalg
from hypothesis import strategies as st

from lehr.runtime.distribution import (
    cosine_similarity,
    frechet_distance,
    frechet_to_statistics,
    kernel_distance,
    mean_interval,
    paired_frechet,
)
from lehr.runtime.errors import InvalidInput
from lehr.runtime.sequential import FrechetBound, outside, radius


def by_scipy(a, b):
    mean_1, mean_2 = a.mean(axis=0), b.mean(axis=0)
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(one @ two)
    return float(np.sum((mean_1 - mean_2) ** 2) + np.trace(one + two - 2 * root.real))


@hypothesis.settings(max_examples=15)
@hypothesis.given(n=st.integers(30, 80), m=st.integers(30, 80), width=st.integers(2, 20), seed=st.integers(0, 99))
def test_the_frechet_distance_is_scipys_matrix_root(n, m, width, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, width)) @ rng.standard_normal((width, width)), rng.standard_normal((m, width)) + 0.3
    expected = by_scipy(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_to_statistics(a, b.mean(axis=0), np.cov(b, rowvar=False)) == pytest.approx(expected, rel=1e-6)


def test_both_ways_to_the_root_agree_where_features_outnumber_samples():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 50)), 1.5 * rng.standard_normal((25, 50)) + 0.2
    expected = frechet_to_statistics(a, b.mean(axis=0), np.cov(b, rowvar=False))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_is_the_mean_over_all_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((12, 5)), rng.standard_normal((12, 5)) + 0.5

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    pairs = [k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i in range(12) for j in range(12) if i != j]
    assert kernel_distance(x, y, 0.95).value == pytest.approx(np.mean(pairs), rel=1e-12)


def test_equal_sets_are_at_distance_zero_and_sure_of_it():
    x = np.random.default_rng(0).standard_normal((40, 8))
    for found in (paired_frechet(x, x, 0.99), kernel_distance(x, x, 0.99)):
        assert abs(found.value) < 1e-9
        assert found.high - found.low < 1e-9


def test_the_interval_of_the_kernel_distance_holds_the_truth_as_often_as_it_says():
    """Normal features of width 1 shifted by s: E k(x, y) follows from moments, so the truth is known."""
    shift, held = 1.5, 0

    def moment(a, b):  # E (xy + 1)^3 for independent x ~ N(a, 1), y ~ N(b, 1)
        third = [1, a, a * a + 1, a**3 + 3 * a]
        other = [1, b, b * b + 1, b**3 + 3 * b]
        return sum(math.comb(3, p) * third[p] * other[p] for p in range(4))

    truth = moment(0, 0) + moment(shift, shift) - 2 * moment(0, shift)
    for seed in range(120):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((300, 1)), rng.standard_normal((300, 1)) + shift
        found = kernel_distance(x, y, 0.9)
        held += found.low <= truth <= found.high
    assert 0.82 <= held / 120 <= 0.97


def test_paired_draws_are_told_apart_far_more_finely_than_independent_ones():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((100, 16))
    near = paired_frechet(x + 1e-3 * rng.standard_normal(x.shape), x, 0.99)
    apart = frechet_distance(x, rng.standard_normal((100, 16)))
    assert near.high < apart / 1000


def test_a_mean_and_its_interval_shrink_with_the_root_of_the_count():
    values = np.tile([0.0, 1.0], 50)
    found = mean_interval(values, 0.95)
    assert found.value == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5025 / 10, rel=1e-3)


def test_cosines_are_of_rows_and_zero_for_nothing():
    a = np.array([[1.0, 0], [1, 1], [0, 0]])
    b = np.array([[2.0, 0], [0, 3], [1, 0]])
    assert cosine_similarity(a, b) == pytest.approx([1, math.sqrt(0.5), 0])


@pytest.mark.parametrize("call", [frechet_distance, lambda a, b: kernel_distance(a, b, 0.9)])
def test_sets_that_cannot_be_compared_are_refused(call):
    x = np.zeros((4, 3))
    for other in (np.zeros((1, 3)), np.zeros((4, 2))):
        with pytest.raises(InvalidInput, match="equal features"):
            call(x, other)
    with pytest.raises(InvalidInput, match="equal size"):
        kernel_distance(x, np.zeros((5, 3)), 0.9)


# ------------------------------------------------------------------------------------------------------- sequences


def test_a_sequence_holds_at_all_looks_at_once():
    """An interval of the same level is left by one in three of these runs at some look; the sequence by few."""
    runs, looks, error = 400, range(50, 2001, 50), 0.05
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(runs, 2000))
    left = {"sequence": 0, "interval": 0}
    for row in values:
        means = {n: (row[:n].mean(), row[:n].std(ddof=1)) for n in looks}
        left["sequence"] += any(abs(m - 1) > radius(s, n, error, tuned_to=500) for n, (m, s) in means.items())
        left["interval"] += any(abs(m - 1) > 1.96 * s / math.sqrt(n) for n, (m, s) in means.items())
    assert left["sequence"] / runs <= error
    assert left["interval"] / runs > 3 * error


def test_a_run_that_ends_inside_its_window_is_hardly_ever_stopped_and_one_far_outside_soon():
    runs, total, error = 300, 2000, 0.02
    rng = np.random.default_rng(1)
    stopped = late = 0
    for _ in range(runs):
        values = rng.standard_normal(total)
        window = (float(values.mean()), 10.0)  # the whole run ends exactly on the edge: as hard as it gets
        stopped += any(
            outside(values[:n].mean(), values[:n].std(ddof=1), n, total, window, error, tuned_to=500)
            for n in range(100, total, 100)
        )
        n = 400
        late += not outside(values[:n].mean(), values[:n].std(ddof=1), n, total, (1.0, 2.0), error, tuned_to=500)
    assert stopped / runs <= error
    assert late == 0


def test_the_bound_of_a_frechet_distance_lies_below_it_and_meets_it_in_few_directions():
    rng = np.random.default_rng(0)
    for width in (16, 80):
        reference = np.diag(np.linspace(2.0, 0.1, width))
        x = rng.standard_normal((20_000, width)) * 1.2 + 0.1
        bound, _ = FrechetBound(np.zeros(width), reference).estimate(x)
        whole = frechet_to_statistics(x, np.zeros(width), reference)
        assert bound <= whole + 0.02
        if width == 16:
            assert bound == pytest.approx(whole, rel=0.02)


def test_the_spread_of_the_bound_is_what_repeated_draws_show():
    rng = np.random.default_rng(2)
    made = FrechetBound(np.zeros(8), np.diag(np.linspace(2, 0.5, 8)))
    draws = [made.estimate(rng.standard_normal((800, 8)) * 1.3 + 0.2) for _ in range(80)]
    values, spreads = np.array(draws).T
    assert np.mean(spreads) / math.sqrt(800) == pytest.approx(np.std(values), rel=0.25)
    truth = 8 * 0.04 + sum((1.3 - math.sqrt(v)) ** 2 for v in np.linspace(2, 0.5, 8))
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / math.sqrt(80))
