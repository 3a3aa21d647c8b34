"""Rounding to few bits: scales, the rounded numbers, and what they stand for.

Matrices are (K, N): K inputs of an output, N outputs, one scale for each output (and block of inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E4M3_LARGEST, E2M1_LARGEST = 448.0, 6.0
INT_LEVELS = {8: 127, 4: 7}
TINY = 2.0**-24  # the smallest scale, and fp16's smallest number; a channel of zeros keeps one that divides
_CLIPS = tuple(1 - 0.04 * k for k in range(11))  # shares of the largest weight tried as a block's limit
_LAZY = 128  # inputs rounded before the rest is corrected: one large product instead of many small ones
_DAMPING = 0.01  # of the mean of the diagonal, as the paper has it


def scales_of(peaks: Array, largest: float) -> Array:
    """float32 scales by which ``peaks`` become at most ``largest``; never zero.

    They are rounded up to 8 significant bits, and to multiples of fp16's smallest number, so that a graph whose rest is
    converted to fp16 or bf16 multiplies with the very same scales; it costs at most .07 dB.
    """
    exact = np.maximum(np.asarray(peaks, np.float64) / largest, TINY)
    mantissa, exponent = np.frexp(exact)
    short = np.ldexp(np.ceil(mantissa * 256) / 256, exponent)
    return np.asarray(np.maximum(np.ceil(short / TINY) * TINY, TINY), np.float32)


def affine(low: float, high: float) -> tuple[Array, int]:
    """The scale and the zero point by which int8 reaches from ``low`` to ``high``, to half a step at either end.

    Args:
        low: the smallest number, at most 0.
        high: the largest, at least 0.
    """
    scale = scales_of(np.array(high - low), 255.0)
    return scale, int(np.clip(np.rint(-128 - low / float(scale)), -128, 127))


def to_integers(values: Array, scale: Array, bits: int) -> Array:
    """Nearest integers of ``values / scale``, ties to even, within the format: int8, or ml_dtypes' int4."""
    kind = np.dtype(np.int8) if bits == 8 else np.dtype(ml_dtypes.int4)
    return nearest_integer(values / scale, bits).astype(np.int8).astype(kind)


def to_e4m3(values: Array, scale: Array | float) -> Array:
    """Nearest E4M3 numbers of ``values / scale``; beyond the largest they saturate."""
    return np.clip(values / scale, -E4M3_LARGEST, E4M3_LARGEST).astype(np.float32).astype(E4M3)


def to_e2m1(values: Array, scale: Array | float) -> Array:
    """Nearest E2M1 numbers of ``values / scale``; beyond the largest they saturate."""
    return np.clip(values / scale, -E2M1_LARGEST, E2M1_LARGEST).astype(np.float32).astype(E2M1)


def blocks_of(matrix: Array, block: int) -> Array:
    """(blocks, block, N) view of a (K, N) matrix, padded with zeros to whole blocks."""
    short = -len(matrix) % block
    padded = np.pad(matrix, ((0, short), (0, 0))) if short else matrix
    return padded.reshape(-1, block, matrix.shape[1])


def spread(scales: Array, block: int, length: int) -> Array:
    """(K, N): the scale of every element, from (blocks, N)."""
    return np.repeat(scales, block, axis=0)[:length]


def block_scales(matrix: Array, block: int, importance: Array, bits: int = 4) -> Array:
    """(blocks, N) float32 scales of a (K, N) matrix in integers, each block's limit of least weighed squared error.

    Args:
        matrix: the weight.
        block: inputs that share a scale.
        importance: (K,) what a squared error counts, such as the inputs' mean squares.
        bits: 4 or 8.
    """
    levels = INT_LEVELS[bits]
    parts = blocks_of(matrix, block)
    weight = blocks_of(np.asarray(importance, np.float64)[:, None], block)
    peaks = np.abs(parts).max(axis=1)
    best, least = scales_of(peaks, levels), np.full(peaks.shape, np.inf)
    for clip in _CLIPS:
        scale = scales_of(clip * peaks, levels)
        rounded = np.clip(np.rint(parts / scale[:, None]), -levels - 1, levels) * scale[:, None]
        error = (weight * (rounded - parts) ** 2).sum(axis=1)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best.astype(np.float32)


def nvfp4_scales(matrix: Array, block: int) -> tuple[Array, Array]:
    """(blocks, N) E4M3 scales of blocks, and the one float32 scale above them."""
    peaks = np.abs(blocks_of(matrix, block)).max(axis=1)
    top = scales_of(peaks.max(initial=0.0), E2M1_LARGEST * E4M3_LARGEST)
    found = to_e4m3(peaks / E2M1_LARGEST, top)
    # A block whose scale rounds to zero would lose its weights altogether; the smallest scale keeps the larger ones.
    smallest = np.array(2.0**-9, np.float32).astype(E4M3)
    return np.where(found.astype(np.float32) == 0, smallest, found).astype(E4M3), top


def gptq(matrix: Array, gram: Array, scales: Array, nearest: Callable[[Array], Array]) -> Array:
    """Round a weight so that later inputs make up for the errors of earlier ones (Frantar et al., arXiv:2210.17323).

    Args:
        matrix: (K, N) float32.
        gram: (K, K) mean products of the inputs.
        scales: (K, N) or (1, N), fixed beforehand.
        nearest: the number of the format, saturated, that is nearest to a scaled one.

    Returns:
        (K, N) float32, numbers of the format, before they are scaled.
    """
    scales = np.broadcast_to(scales, matrix.shape).astype(np.float64)
    gram = np.array(gram, np.float64)
    dead = np.diag(gram) <= 0
    gram[dead, dead] = 1.0
    gram[np.diag_indices(len(gram))] += _DAMPING * float(np.mean(np.diag(gram)))
    order = np.argsort(-np.diag(gram), kind="stable")  # inputs that matter most are rounded first
    upper = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T
    rest = matrix[order].astype(np.float64)
    result = np.empty(matrix.shape, np.float32)
    for begin in range(0, len(order), _LAZY):
        end = min(begin + _LAZY, len(order))
        errors = np.empty((end - begin, matrix.shape[1]))
        for k in range(begin, end):
            row = order[k]
            result[row] = nearest(rest[k] / scales[row])
            errors[k - begin] = (rest[k] - result[row] * scales[row]) / upper[k, k]
            rest[k + 1 : end] -= np.outer(upper[k, k + 1 : end], errors[k - begin])
        rest[end:] -= upper[begin:end, end:].T @ errors
    return result


def nearest_integer(values: Array, bits: int) -> Array:
    """Whole numbers of the format, ties to even."""
    levels = INT_LEVELS[bits]
    return np.clip(np.rint(values), -levels - 1, levels)


def nearest_e4m3(values: Array) -> Array:
    """E4M3 numbers as float32."""
    return to_e4m3(values, 1.0).astype(np.float32)


def nearest_e2m1(values: Array) -> Array:
    """E2M1 numbers as float32."""
    return to_e2m1(values, 1.0).astype(np.float32)
