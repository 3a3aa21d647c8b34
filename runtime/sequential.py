"""Looking at a statistic while it is still being gathered, without paying for every look.

A confidence *sequence* holds at all sample sizes at once, so a run may end as soon as it is clear, at whatever look
that is. The one used here is the asymptotic sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas ("Time-uniform
central limit theory and asymptotic confidence sequences", 2024), which assumes a finite variance and little more;
Robbins' normal mixture lies behind it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.distribution import symmetric_root
from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[Any]

GROUPS = 10  # of the jackknife that takes the bias of a finite sample away
COMPONENTS = 32  # directions of the reference that a Fréchet distance is bounded in


def radius(deviation: float, n: int, error: float, *, tuned_to: int) -> float:
    """Half-width of the sequence for a mean of ``n`` values.

    Args:
        deviation: the values' standard deviation.
        n: how many values.
        error: chance that the mean ever lies outside, over all n.
        tuned_to: the n at which the sequence is narrowest.
    """
    if n < 1 or not 0 < error < 1:
        raise InvalidInput(f"a confidence sequence needs n >= 1 and an error in (0, 1), got {n} and {error}.")
    rho = (-2 * math.log(error) + math.log(1 - 2 * math.log(error))) / tuned_to
    return deviation * math.sqrt(2 * (n * rho + 1) / (n**2 * rho) * math.log(math.sqrt(n * rho + 1) / error))


def outside(
    mean: float, deviation: float, n: int, final: int, window: tuple[float, float], error: float, *, tuned_to: int
) -> bool:
    """Whether the mean of ``final`` values cannot end inside ``window``, from the first ``n`` of them.

    The sequence holds at ``n`` and at ``final``, so the two means differ by no more than both half-widths.
    """
    reach = sum(radius(deviation, k, error, tuned_to=tuned_to) for k in (n, final))
    return mean - reach > window[1] or mean + reach < window[0]


class FrechetBound:
    """A lower bound of the Fréchet distance to known statistics, as a mean that a sequence can follow.

    Projecting two Gaussians never moves them apart (it contracts the Wasserstein distance), so the distance in the
    leading directions of the reference is a lower bound of the whole one; in few directions its estimate is nearly
    linear in the sample, with a small bias that a jackknife takes away. The gradient in the covariance C is
    I - R (R C R)^(-1/2) R with R² the reference's.

    Args:
        mean: (D,) of the reference.
        covariance: (D, D).
    """

    def __init__(self, mean: Array, covariance: Array) -> None:
        values, vectors = np.linalg.eigh(covariance.astype(np.float64))
        self._directions = vectors[:, np.argsort(values)[::-1][:COMPONENTS]]
        self._mean = self._directions.T @ mean.astype(np.float64)
        self._root = symmetric_root(self._directions.T @ covariance.astype(np.float64) @ self._directions)

    @property
    def fewest(self) -> int:
        """Samples below which nothing is said: a covariance of this many directions is not known from fewer."""
        return 5 * GROUPS * max(1, int(self._directions.shape[1]) // GROUPS)

    def estimate(self, features: Array) -> tuple[float, float]:
        """(N, D) -> the bound without its bias, and the standard deviation of a sample's influence on it."""
        x = features.astype(np.float64) @ self._directions
        whole = self._distance(x)
        groups = np.arange(len(x)) % GROUPS
        left = [self._distance(x[groups != g]) for g in range(GROUPS)]
        value = GROUPS * whole - (GROUPS - 1) * float(np.mean(left))
        return value, float(np.std(self._influence(x), ddof=1))

    def _distance(self, x: Array) -> float:
        centred = (x - x.mean(axis=0)) / math.sqrt(len(x) - 1)
        cross = float(np.linalg.svd(centred @ self._root, compute_uv=False).sum())
        shift = float(np.sum((x.mean(axis=0) - self._mean) ** 2))
        return shift + float(np.sum(centred**2)) + float(np.sum(self._root**2)) - 2 * cross

    def _influence(self, x: Array) -> Array:
        mean = x.mean(axis=0)
        centred = x - mean
        values, vectors = np.linalg.eigh(self._root @ np.cov(x, rowvar=False).reshape(len(mean), -1) @ self._root)
        kept = values > 1e-12 * max(float(values[-1]), np.finfo(np.float64).tiny)
        inverse = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
        gradient = np.eye(len(mean)) - self._root @ inverse @ self._root
        return np.asarray(2 * centred @ (mean - self._mean) + np.einsum("ni,ij,nj->n", centred, gradient, centred))
