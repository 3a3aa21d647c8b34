"""Histograms of magnitudes, and the largest number that a scale should represent, found from them.

Bins lie between neighbouring float32 numbers with three bits of mantissa: eight in every octave, from 2^-20 to 2^12.
Their number is a slice of the float's own bits, so sorting a tensor into them takes a shift and no logarithm, and a
histogram needs no range that would have to be known beforehand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.calibration.configs import Range

Array = npt.NDArray[Any]

LOW, HIGH = -20, 12  # powers of two; smaller magnitudes are counted in the first bin, larger ones in the last
_SHIFT = 20  # bits of a float32's mantissa beneath the three that tell bins apart
BINS = (HIGH - LOW) << 3
_FIRST = (127 + LOW) << 3
_PERCENTILE = 0.9999
_LINEAR = 2048  # bins of the divergence, as TensorRT's entropy calibrator has them
_CANDIDATES = 2.0 ** -np.linspace(0, 5, 81)  # of the largest magnitude: down to a thirty-second of it


def edges() -> Array:
    """(BINS + 1,) float64: where bins begin and end; the first begins at 0."""
    bits = (np.arange(BINS + 1, dtype=np.int64) + _FIRST) << _SHIFT
    found = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    found[0] = 0.0
    return found


def bins_of(values: Array) -> Array:
    """The bin of every magnitude; ``values`` is float32 and contiguous."""
    bits = values.view(np.int32) & np.int32(0x7FFFFFFF)
    np.right_shift(bits, _SHIFT, out=bits)
    bits -= np.int32(_FIRST)
    return np.clip(bits, 0, BINS - 1, out=bits)


def count_by_channel(values: Array) -> Array:
    """(C, BINS) counts of an array (n, C)."""
    channels = values.shape[1]
    index = bins_of(np.ascontiguousarray(values, np.float32))
    index += np.arange(channels, dtype=np.int32)[None] * np.int32(BINS)
    return np.bincount(index.reshape(-1), minlength=channels * BINS).reshape(channels, BINS)


def range_of(histogram: Array, peak: float, method: Range, levels: float = 127) -> float:
    """The largest magnitude that should be represented.

    Args:
        histogram: (BINS,) counts of magnitudes, or weights.
        peak: the largest magnitude that was seen.
        method: how to choose; the result is never larger than ``peak``.
        levels: positive numbers of the format, spaced evenly.
    """
    total = float(histogram.sum())
    if peak <= 0 or total <= 0 or method is Range.MIN_MAX:
        return peak
    if method is Range.PERCENTILE:
        at = int(np.searchsorted(np.cumsum(histogram), _PERCENTILE * total))
        return min(peak, float(edges()[min(at + 1, BINS)]))
    if method is Range.ENTROPY:
        return _least_divergence(histogram, peak, int(levels))
    return float(peak * _CANDIDATES[int(np.argmin(squared_error(histogram, peak, peak * _CANDIDATES, levels)))])


def squared_error(histogram: Array, peak: float, limits: Array, levels: float = 127) -> Array:
    """Summed squared error of rounding to ``levels`` steps up to each of ``limits`` and clipping beyond.

    Within a bin magnitudes are taken as spread evenly; what lies below half a step becomes zero and loses itself.
    """
    lows, highs = edges()[:-1], np.minimum(edges()[1:], peak)
    used = (np.asarray(histogram) > 0) & (highs > lows)
    lows, highs, counts = lows[used][None], highs[used][None], np.asarray(histogram, np.float64)[used][None]
    limits = np.asarray(limits, np.float64)[:, None]
    step = limits / levels
    own = (lows**2 + lows * highs + highs**2) / 3
    inside = np.minimum(step**2 / 12, own)
    near, far = np.maximum(lows, limits) - limits, highs - limits
    beyond = (near**2 + near * far + far**2) / 3
    share = np.clip((highs - limits) / (highs - lows), 0, 1)  # of the bin that is clipped
    errors = counts * ((1 - share) * inside + np.where(share > 0, share * beyond, 0.0))
    return np.asarray(errors.sum(axis=1))


def _least_divergence(histogram: Array, peak: float, levels: int) -> float:
    """The limit whose quantised histogram says most of the original one (Kullback-Leibler; Migacz 2017, TensorRT)."""
    linear = _spread(histogram, peak)
    filled = (linear > 0).astype(np.float64)
    best, least = peak, np.inf
    for end in range(levels + 1, _LINEAR + 1, max(1, levels // 16)):
        p = linear[:end].copy()
        p[-1] += linear[end:].sum()
        starts = np.linspace(0, end, levels + 2).astype(np.int64)[:-1]
        sizes = np.diff(np.append(starts, end))
        sums, counts = np.add.reduceat(linear[:end], starts), np.add.reduceat(filled[:end], starts)
        q = np.repeat(sums / np.maximum(counts, 1), sizes) * filled[:end]  # what a part holds, over its filled bins
        total_p, total_q = p.sum(), q.sum()
        if total_q <= 0:
            continue
        seen = (p > 0) & (q > 0)
        lost = p[(p > 0) & (q <= 0)].sum() / total_p  # what the quantised one says cannot happen
        ratio = (p[seen] / total_p) / (q[seen] / total_q)
        divergence = float(np.sum(p[seen] / total_p * np.log(ratio)) + 20 * lost)
        if divergence < least:
            least, best = divergence, peak * end / _LINEAR
    return float(best)


def _spread(histogram: Array, peak: float) -> Array:
    """The histogram in bins of one width up to ``peak``."""
    ends = np.minimum(edges(), peak)
    below = np.concatenate([[0.0], np.cumsum(np.asarray(histogram, np.float64))])
    grid = np.linspace(0, peak, _LINEAR + 1)
    return np.diff(np.interp(grid, ends, below))
