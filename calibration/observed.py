"""What is known of activations: of each tensor that layers read, and of a whole graph; gathered by :mod:`.observers`.

Shape legend: K buckets, C channels, D inputs of one output (C, or C times the kernel of a convolution).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.calibration.configs import Range, ZeroPoint
from lehr.calibration.histogram import BINS, range_of
from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """One tensor.

    Attributes:
        axis: of the channels.
        low, high: the smallest and largest number.
        lows, highs: (C,) float32, those of each channel.
        peak: (K, C) float32, the largest magnitude.
        histogram: (K, BINS) float64, how many magnitudes lie in each bin.
        by_channel: (C, BINS) float64, the same over all buckets, weighed.
        mean, magnitude, square: (C,) float64, weighed means of x, |x| and x².
        weights: (K,) float64, what one number of each bucket counts.
    """

    axis: int
    low: float
    high: float
    lows: Array
    highs: Array
    peak: Array
    histogram: Array
    by_channel: Array
    mean: Array
    magnitude: Array
    square: Array
    weights: Array

    def channel_peaks(self) -> Array:
        """(C,) the largest magnitude of each channel at any timestep."""
        return np.asarray(self.peak.max(axis=0), np.float64)

    def block_peaks(self, block: int) -> Array:
        """(ceil(C / block),) the largest magnitude of ``block`` consecutive channels."""
        return np.maximum.reduceat(self.channel_peaks(), np.arange(0, self.peak.shape[1], block))

    def interval_of(self, method: Range, zero: ZeroPoint, *, divisors: Array | None = None) -> tuple[float, float]:
        """The smallest and largest number that one int8 scale of the whole tensor should represent.

        Args:
            method: as of :meth:`range_of`.
            zero: with :data:`.ZeroPoint.CENTRE` the two are opposite numbers.
            divisors: as there.
        """
        if zero is ZeroPoint.CENTRE:
            limit = self.range_of(method, divisors=divisors)
            return -limit, limit
        given = 1.0 if divisors is None else np.asarray(divisors, np.float64)
        low, high = min(0.0, float((self.lows / given).min())), max(0.0, float((self.highs / given).max()))
        levels = 255 * max(-low, high) / (high - low) if high > low else 127.0
        limit = self.range_of(method, levels=levels, divisors=divisors)
        return max(low, -limit), min(high, limit)

    def range_of(self, method: Range, *, levels: float = 127, divisors: Array | None = None) -> float:
        """The largest magnitude that one scale of the whole tensor should represent.

        Args:
            method: see :class:`lehr.calibration.configs.Range`.
            levels: positive numbers of the format.
            divisors: (C,) what channels are divided by first, rounded to whole bins for the histogram.
        """
        if divisors is None:
            return range_of(self.weights @ self.histogram, float(self.peak.max()), method, levels)
        peak = float((self.channel_peaks() / divisors).max())
        return range_of(self.divided(divisors), peak, method, levels)

    def divided(self, divisors: Array) -> Array:
        """(BINS,) the weighed histogram of the tensor with its channels divided by ``divisors``, to a bin's width."""
        moved = np.round(8 * np.log2(divisors)).astype(np.int64)
        place = np.clip(np.arange(BINS)[None] - moved[:, None], 0, BINS - 1)
        return np.bincount(place.reshape(-1), weights=self.by_channel.reshape(-1), minlength=BINS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What was observed.

    Attributes:
        tensors: by name, in the step graph.
        grams: layer -> (D, D) float64, weighed mean of the products of its inputs, for rounding that needs them.
        without_gram: layers for which they were asked and cannot be: grouped convolutions, or too many inputs.
        timesteps: (K, 2) float64, the first and last timestep of each bucket.
        evaluations, samples: how much was looked at.
        digest: SHA-256 of what determines them: the data and the graph.
    """

    tensors: Mapping[str, TensorStatistics]
    grams: Mapping[str, Array]
    timesteps: Array
    evaluations: int
    samples: int
    digest: str
    without_gram: frozenset[str] = frozenset()

    def of(self, name: str) -> TensorStatistics:
        """Those of a tensor; raises InvalidInput for one that was not observed."""
        if name not in self.tensors:
            raise InvalidInput(
                f"tensor {name!r} was not observed, so it has no range ({len(self.tensors)} tensors were). "
                "The statistics are of another graph: calibrate again."
            )
        return self.tensors[name]
