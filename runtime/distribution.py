"""Distances between sets of samples, in the feature space of a network the caller chose, and how sure they are.

Two sets may be *paired*: sample k of both was drawn from the same noise under the same condition. Then whatever the
draw did to one set it did to the other, and intervals that resample pairs are far narrower than those of two
independent draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[Any]

RESAMPLES = 200  # of a bootstrap; its 99 % percentile then rests on two values, which errs to the wide side


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with a two-sided confidence interval."""

    value: float
    low: float
    high: float


# --------------------------------------------------------------------------------------------------------- Fréchet


def frechet_distance(features: Array, reference: Array) -> float:
    """Fréchet distance of two Gaussians fitted to (N, D) and (M, D) features (Heusel et al. 2017, arXiv:1706.08500).

    |m_1 - m_2|² + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). With C = X^T X of centred features, the root's trace is the sum of
    the singular values of X_1 X_2^T, a matrix of N by M; where there are more samples than features it is that of the
    square roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric.

    Raises:
        InvalidInput: fewer than two samples on a side, or features of different width.
    """
    _check(features, reference)
    (first, mean_1), (second, mean_2) = _centred(features), _centred(reference)
    shift = float(np.sum((mean_1 - mean_2) ** 2))
    traces = float(np.sum(first**2) + np.sum(second**2))
    if min(len(first), len(second)) <= first.shape[1]:
        cross = float(np.linalg.svd(first @ second.T, compute_uv=False).sum())
    else:
        root = symmetric_root(first.T @ first)
        cross = float(np.sqrt(np.maximum(np.linalg.eigvalsh(root @ (second.T @ second) @ root), 0)).sum())
    return shift + traces - 2 * cross


def frechet_to_statistics(features: Array, mean: Array, covariance: Array) -> float:
    """The same distance of (N, D) features to a Gaussian of known mean (D,) and covariance (D, D)."""
    if len(features) < 2 or mean.shape != features.shape[1:] or covariance.shape != (*mean.shape, *mean.shape):
        raise InvalidInput(
            f"a Fréchet distance needs two samples and statistics of their width, got features {features.shape}, mean "
            f"{mean.shape} and covariance {covariance.shape}."
        )
    centred, own = _centred(features)
    # (C_1 C_2)^(1/2) has the singular values of X C_2^(1/2) for eigenvalues, so C_1's root is never taken.
    cross = float(np.linalg.svd(centred @ symmetric_root(covariance), compute_uv=False).sum())
    return float(np.sum((own - mean) ** 2) + np.sum(centred**2) + np.trace(covariance) - 2 * cross)


def paired_frechet(features: Array, reference: Array, confidence: float) -> Estimate:
    """Fréchet distance of paired sets with a bootstrap interval over pairs (percentile method, fixed seed)."""
    _check(features, reference, paired=True)
    rng, n = np.random.default_rng(0), len(features)
    draws = [frechet_distance(features[picked], reference[picked]) for picked in rng.integers(n, size=(RESAMPLES, n))]
    value, tail = frechet_distance(features, reference), (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def symmetric_root(matrix: Array) -> npt.NDArray[np.float64]:
    """The positive square root of a symmetric positive semi-definite matrix; rounding below zero counts as zero."""
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


# --------------------------------------------------------------------------------------------------------- kernel


def kernel_distance(features: Array, reference: Array, confidence: float) -> Estimate:
    """Squared maximum mean discrepancy under the cubic kernel (x·y / D + 1)³ (Bińkowski et al. 2018, arXiv:1801.01401).

    The unbiased estimate over pairs i ≠ j of two sets of equal size (Gretton et al. 2012, lemma 6), which may be
    negative, with the normal interval of a U-statistic: its variance is 4 / N times that of a sample's mean term.
    """
    _check(features, reference, paired=True)
    n = len(features)
    x, y = features.astype(np.float64), reference.astype(np.float64)

    def kernel(a: Array, b: Array) -> Array:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    terms = kernel(x, x) + kernel(y, y) - kernel(x, y) - kernel(y, x)
    np.fill_diagonal(terms, 0)
    means = terms.sum(axis=1) / (n - 1)
    value = float(means.mean())
    reach = quantile(confidence) * 2 * float(np.std(means, ddof=1)) / math.sqrt(n)
    return Estimate(value=value, low=value - reach, high=value + reach)


# ------------------------------------------------------------------------------------------------------------ means


def mean_interval(values: Array, confidence: float) -> Estimate:
    """Mean of (N,) values with the normal interval."""
    value = float(np.mean(values))
    reach = quantile(confidence) * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(value=value, low=value - reach, high=value + reach)


def cosine_similarity(first: Array, second: Array) -> npt.NDArray[np.float64]:
    """(N, D), (N, D) embeddings -> (N,) cosines, as CLIP scores are made (Hessel et al. 2021, arXiv:2104.08718)."""
    if first.shape != second.shape or first.ndim != 2:
        raise InvalidInput(f"embeddings of equal shape (N, D) expected, got {first.shape} and {second.shape}.")
    a, b = first.astype(np.float64), second.astype(np.float64)
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.sum(a * b, axis=1) / np.maximum(sizes, np.finfo(np.float64).tiny))


def quantile(confidence: float) -> float:
    """How many standard deviations a two-sided normal interval reaches."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _centred(features: Array) -> tuple[Array, Array]:
    """Features scaled so that X^T X is the unbiased covariance, and their mean."""
    wide = features.astype(np.float64)
    mean = wide.mean(axis=0)
    return (wide - mean) / math.sqrt(len(wide) - 1), mean


def _check(features: Array, reference: Array, *, paired: bool = False) -> None:
    if min(len(features), len(reference)) < 2 or features.ndim != 2 or features.shape[1:] != reference.shape[1:]:
        raise InvalidInput(
            f"a distance of distributions needs two samples a side and equal features (N, D), got {features.shape}, "
            f"{reference.shape}."
        )
    if paired and len(features) != len(reference):
        raise InvalidInput(f"paired sets must be of equal size, got {len(features)} and {len(reference)} samples.")
