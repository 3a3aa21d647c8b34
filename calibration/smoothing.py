"""Factors that move what is hard to round from one side of a product to the other.

x W = (x / s)(s W) for any s of the input channels. SmoothQuant (Xiao et al., arXiv:2211.10438) takes
s = peak(x)^a / peak(W)^(1-a) to even out activations whose channels differ; AWQ (Lin et al., arXiv:2306.00978) takes
s = mean|x|^a so that weights which meet large activations are rounded finer. The exponent is chosen for each layer by
the error that it predicts, from the statistics alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.calibration.configs import Range, ZeroPoint
from lehr.calibration.histogram import squared_error
from lehr.calibration.numbers import INT_LEVELS
from lehr.calibration.observed import TensorStatistics

Array = npt.NDArray[Any]

_LEAST, _MOST = 1e-3, 1e3  # of a factor; further ones trade one overflow for another


def smooth(
    weights: Sequence[Array],
    statistics: TensorStatistics,
    alphas: Sequence[float],
    method: Range,
    zero: ZeroPoint = ZeroPoint.CENTRE,
) -> Array | None:
    """SmoothQuant's factors (C,) for products that read one tensor; None where none is better than none.

    Args:
        weights: of each product, (C, M) with everything that one channel is multiplied with in a row.
        statistics: of the tensor.
        alphas: exponents to choose from.
        method: how the range of the activation will be chosen.
        zero: where its integers will have their zero.
    """
    peaks = statistics.channel_peaks()
    tops = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64)
    alive = (peaks > 0) & (tops > 0)
    best, least = None, int8_error(weights, statistics, None, method, zero)
    for alpha in alphas:
        factors = np.ones(len(peaks))
        factors[alive] = peaks[alive] ** alpha / tops[alive] ** (1 - alpha)
        factors = _centred(factors, alive)
        error = int8_error(weights, statistics, factors, method, zero)
        if error < least:
            best, least = factors.astype(np.float32), error
    return best


def int8_error(
    weights: Sequence[Array],
    statistics: TensorStatistics,
    factors: Array | None,
    method: Range,
    zero: ZeroPoint = ZeroPoint.CENTRE,
) -> float:
    """Predicted mean squared error of the products, activations and weights rounded to 8 bits.

    Errors of different inputs are taken as independent: those of an activation are multiplied by the weight's square,
    those of a weight by the activation's mean square.
    """
    given = np.ones(len(statistics.mean)) if factors is None else np.asarray(factors, np.float64)
    histogram = statistics.divided(given) if factors is not None else statistics.by_channel.sum(axis=0)
    peak = float((statistics.channel_peaks() / given).max())
    low, high = statistics.interval_of(method, zero, divisors=None if factors is None else given)
    limit = max(-low, high, 1e-30)
    # As many positive numbers as would give this step if the zero were in the centre.
    steps = INT_LEVELS[8] if zero is ZeroPoint.CENTRE else 255 * limit / max(high - low, 1e-30)
    total = float(histogram.sum())
    own = float(squared_error(histogram, peak, np.array([limit]), steps)[0]) / total
    square = statistics.square / given**2
    error = 0.0
    for weight in weights:
        scaled = weight * given[:, None]
        step = np.abs(scaled).max(axis=0) / INT_LEVELS[8]  # of each column, at most the output's own
        error += own * float((scaled**2).sum()) + float(square.sum()) * float((step**2).sum()) / 12
    return error


def awq(matrix_error: Any, statistics: TensorStatistics, alphas: Sequence[float]) -> Array | None:
    """AWQ's factors (C,); None where none is better than none.

    Args:
        matrix_error: function of factors (C,) or None, the weighed squared error of the rounded weight.
        statistics: of the tensor that is multiplied.
        alphas: exponents to choose from.
    """
    magnitude = statistics.magnitude
    alive = magnitude > 0
    best, least = None, float(matrix_error(None))
    for alpha in alphas:
        if alpha == 0:
            continue
        factors = np.ones(len(magnitude))
        factors[alive] = magnitude[alive] ** alpha
        factors = _centred(factors, alive)
        error = float(matrix_error(factors))
        if error < least:
            best, least = factors.astype(np.float32), error
    return best


def _centred(factors: Array, alive: Array) -> Array:
    """Around one: a common factor changes nothing but the numbers' size."""
    if not alive.any():
        return factors
    centre = float(np.exp(np.mean(np.log(factors[alive]))))
    scaled = np.where(alive, factors / centre, 1.0)
    return np.clip(scaled, _LEAST, _MOST)
