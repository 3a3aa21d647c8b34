"""Noise, per sample and counter-based: the same seed gives the same picture at any batch size, on any machine.

Sample k of seed s draws from its own Philox stream (Salmon et al. 2011) with key (s, k); the j-th noise of a
loop starts at counter j * 2^192. numpy keeps a generator's raw bits stable across versions, but not the algorithm
behind ``standard_normal``, so normals are made here: each from 32 bits, by the inverse of the normal distribution
in Wichura's rational approximation (AS 241, Applied Statistics 37, 1988; routine PPND7, relative error 5e-7).
It uses nothing but + - * / and sqrt, which IEEE 754 rounds alike everywhere, so the numbers are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput

START = 0  # stream of the starting noise; injected noise j uses stream 1 + j
_MAX = 2**63

# AS 241, PPND7: numerators and denominators, highest power first; the denominators' constant term is 1.
_CENTRE = ((59.109374720, 159.29113202, 50.434271938, 3.3871327179), (67.187563600, 78.757757664, 17.895169469, 1.0))
_TAIL = ((0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777), (0.12021132975, 0.73700164250, 1.0))
_CENTRE_LIMIT = 0.180625  # 0.425²: |u - 1/2| up to 0.425, 85 % of the draws, is the centre


def standard_normal(seed: int, index: int, shape: tuple[int, ...], *, stream: int = START) -> npt.NDArray[np.float32]:
    """Unit normals of one sample; a smaller shape's numbers are the first ones of a larger shape's.

    Args:
        seed: 0 … 2^63 - 1.
        index: number of the sample within the seed.
        shape: of one sample, without the batch.
        stream: which noise of the loop.
    """
    if not (0 <= seed < _MAX and 0 <= index < _MAX and 0 <= stream < _MAX):
        raise InvalidInput(f"seed, sample index and stream must lie in 0 … 2^63 - 1, got {seed}, {index}, {stream}.")
    count = math.prod(shape)
    bits = np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    raw = bits.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<i4")[:count]
    return _inverse_normal(raw).reshape(shape)


def batch_normal(
    seed: int, indices: Sequence[int], shape: tuple[int, ...], *, stream: int = START
) -> npt.NDArray[np.float32]:
    """(len(indices), *shape): the noises of several samples."""
    return np.stack([standard_normal(seed, index, shape, stream=stream) for index in indices])


# ---------------------------------------------------------------------------------------------- bits to normals


def _inverse_normal(raw: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The normal quantile of u = 1/2 + (raw + 1/2) / 2^32, which is never 0 or 1; extremes are ±6.3."""
    q = raw.astype(np.float32)
    q += np.float32(0.5)
    q *= np.float32(2.0**-32)
    r = np.multiply(q, q)
    np.subtract(np.float32(_CENTRE_LIMIT), r, out=r)
    normal = _polynomial(_CENTRE[0], r)
    normal *= q
    normal /= _polynomial(_CENTRE[1], r)
    tail = np.flatnonzero(r < 0)
    if tail.size:
        normal[tail] = _tail_quantile(raw[tail])
    return normal


def _tail_quantile(raw: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """The same beyond the centre, in float64: near 0 and 1 a float32 no longer tells 32-bit numbers apart."""
    q = (raw + 0.5) * 2.0**-32
    t = np.sqrt(-_log(0.5 - np.abs(q))) - 1.6
    quantile: npt.NDArray[np.float64] = np.copysign(_polynomial(_TAIL[0], t) / _polynomial(_TAIL[1], t), q)
    return quantile


def _log(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """ln p to 2e-10: mantissa m and exponent e, with ln m = 2 artanh((m - 1) / (m + 1)); libraries differ in theirs."""
    mantissa, exponent = np.frexp(p)
    s = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(tuple(1 / k for k in range(17, 0, -2)), s * s)
    return np.asarray(exponent * math.log(2) + 2 * s * series)


def _polynomial(coefficients: Sequence[float], x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Horner's scheme in x's dtype, in place."""
    total: npt.NDArray[Any] = np.multiply(x, x.dtype.type(coefficients[0]))
    for coefficient in coefficients[1:-1]:
        total += x.dtype.type(coefficient)
        total *= x
    total += x.dtype.type(coefficients[-1])
    return total
