"""Parity measures against independent statements, and their worst cases."""

from __future__ import annotations

import numpy as np
import pytest

from lehr.runtime.distribution import frechet_distance
from lehr.runtime.errors import InvalidInput
from lehr.runtime.parity import WORST, compare, relative_error, sqnr_db, ssim

scipy_linalg = pytest.importorskip("scipy.linalg")
RANGE = (-1.0, 1.0)


def pictures(seed: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 2, 16, 12)).astype(np.float32)


def test_equal_samples_are_at_the_top_of_every_scale():
    same = compare(pictures(0), pictures(0), RANGE)
    assert (same.psnr_db, same.snr_db, same.max_abs) == (999.0, 999.0, 0.0)
    assert same.ssim == pytest.approx(1)
    assert same.cosine == pytest.approx(1)


def test_psnr_and_snr_follow_their_definitions_and_report_the_worst_sample():
    reference, other = pictures(0), pictures(0)
    other[1] += 0.01
    other[2] += 0.1
    parity = compare(reference, other, RANGE)
    assert parity.psnr_db == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-3)
    assert parity.snr_db == pytest.approx(10 * np.log10(np.var(reference[2].astype(float)) / 0.01), abs=1e-3)
    assert parity.max_abs == pytest.approx(0.1, abs=1e-6)


def test_a_flat_background_flatters_psnr_but_not_snr():
    reference = np.full((1, 1, 16, 16), -1.0)
    reference[..., 8, 8] = 1.0
    parity = compare(reference, np.full_like(reference, -1.0), RANGE)
    assert parity.psnr_db > 20
    assert parity.snr_db < 1


def test_values_that_are_not_finite_are_the_worst_there_is():
    broken = pictures(0)
    broken[1, 0, 0, 0] = np.nan
    parity = compare(pictures(0), broken, RANGE)
    assert (parity.psnr_db, parity.max_abs) == (-999.0, WORST)
    assert relative_error(pictures(0), broken) == WORST


def test_relative_error_takes_the_worst_sample():
    reference = np.ones((2, 4))
    assert relative_error(reference, reference * np.array([[1.0], [1.5]])) == pytest.approx(0.5)


def test_ssim_equals_a_direct_evaluation_of_its_formula():
    a, b = pictures(1)[0], pictures(2)[0]
    total = []
    for c in range(2):
        for y in range(16 - 6):
            for x in range(12 - 6):
                p, q = (z[c, y : y + 7, x : x + 7].astype(float) for z in (a, b))
                c_1, c_2 = 0.02**2, 0.06**2
                cov = np.mean(p * q) - p.mean() * q.mean()
                total.append(
                    (2 * p.mean() * q.mean() + c_1)
                    * (2 * cov + c_2)
                    / ((p.mean() ** 2 + q.mean() ** 2 + c_1) * (p.var() + q.var() + c_2))
                )
    assert ssim(a.astype(float), b.astype(float), 2.0) == pytest.approx(np.mean(total), abs=1e-9)


def test_frechet_distance_equals_the_formula_with_scipys_matrix_root():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 6)), rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)) + 0.3
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c_a + c_b - 2 * scipy_linalg.sqrtm(c_a @ c_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_needs_two_samples_of_equal_width():
    with pytest.raises(InvalidInput, match="two samples"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


def test_the_reference_decides_the_error_and_extra_channels_are_left_out() -> None:
    reference = np.ones((2, 1, 2, 2), np.float32)
    learned = np.concatenate([reference * 1.1, np.full_like(reference, 50)], axis=1)
    assert sqnr_db(reference, learned) == pytest.approx(20, abs=0.01)
