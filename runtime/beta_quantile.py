"""The inverse of the Beta distribution, for one schedule; SciPy has it, but the runtime has numpy alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[np.float64]


def beta_quantile(probability: npt.ArrayLike, a: float, b: float) -> Array:
    """x with I_x(a, b) = probability, elementwise, by Newton's method inside a shrinking bracket."""
    if not (0.05 <= a <= 50 and 0.05 <= b <= 50):
        raise InvalidInput(f"the Beta distribution's parameters must lie in 0.05 … 50, got {a} and {b}")
    p = np.atleast_1d(np.asarray(probability, dtype=np.float64))
    quantile = np.where(p >= 1, 1.0, 0.0)
    inner = (p > 0) & (p < 1)
    if inner.any():
        quantile[inner] = _newton(p[inner], a, b)
    return quantile


def _newton(p: Array, a: float, b: float) -> Array:
    low, high, x = np.zeros_like(p), np.ones_like(p), np.full_like(p, a / (a + b))
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    for _ in range(100):
        excess = incomplete_beta(x, a, b) - p
        low, high = np.where(excess < 0, x, low), np.where(excess < 0, high, x)
        density = np.exp((a - 1) * np.log(x) + (b - 1) * np.log1p(-x) - log_beta)
        step = x - excess / density
        following = np.where((step > low) & (step < high), step, 0.5 * (low + high))
        following = np.clip(following, 1e-300, 1 - 1e-16)
        moved = float(np.max(np.abs(following - x), initial=0.0))
        x = following
        if moved <= 1e-13:
            break
    return x


def incomplete_beta(x: Array, a: float, b: float) -> Array:
    """I_x(a, b) for 0 < x < 1, by its continued fraction (NIST Handbook, 8.17.22) where that converges fast."""
    mirrored = x > (a + 1) / (a + b + 2)
    y, c, d = np.where(mirrored, 1 - x, x), np.where(mirrored, b, a), np.where(mirrored, a, b)
    log_front = c * np.log(y) + d * np.log1p(-y) - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    value = np.exp(log_front) / c * _fraction(y, c, d)
    return np.asarray(np.where(mirrored, 1 - value, value))


def _fraction(x: Array, a: Array, b: Array) -> Array:
    """1 / (1 + d_1 / (1 + d_2 / (1 + …))), evaluated from the inside out."""
    total = np.ones_like(x)
    for m in range(24 + int(4 * np.sqrt(max(a.max(), b.max()))), 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        total = 1 + odd / (1 + even / total)
    return 1 / total
