"""Parity: how far an engine is from eager, measured in score space and in pictures.

Level L1 compares one evaluation at several timesteps by the error of the score estimate relative to its size,
so the number means the same for epsilon, x_0, v and flow models. Level L2 compares whole loops on the same noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.prediction import Prediction

Array = npt.NDArray[Any]
SSIM_WINDOW = 7  # pixels, uniform
WORST = 1e9  # stands for "not finite", which JSON cannot say


# ---------------------------------------------------------------------------------------------------- L1, step


def score(
    prediction: Prediction, alpha: float, sigma: float, network_input: Array, output: Array
) -> npt.NDArray[np.float64]:
    """The score estimate (alpha D - x_t) / sigma², from what the network saw and returned."""
    x_t = network_input.astype(np.float64) / prediction.input_scale(alpha, sigma)
    if alpha == 0:
        return -x_t / sigma**2  # pure noise: the score no longer depends on the network
    on_sample, on_output = prediction.denoised_coefficients(alpha, sigma)
    denoised = on_sample * x_t + on_output * output.astype(np.float64)
    return np.asarray((alpha * denoised - x_t) / sigma**2)


def relative_error(reference: Array, other: Array) -> float:
    """|other - reference| / |reference| in the Euclidean norm, worst sample of the batch, at most :data:`WORST`."""
    worst = 0.0
    for ref, got in zip(reference.astype(np.float64), other.astype(np.float64), strict=True):
        size, error = float(np.linalg.norm(ref)), float(np.linalg.norm(got - ref))
        if not math.isfinite(error):
            return WORST
        worst = max(worst, error / size if size > 0 else WORST if error > 0 else 0.0)
    return min(worst, WORST)


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal to quantisation noise of an evaluation, dB: 10 log10(Σ ref² / Σ (ref - x)²), held within ±999.

    Outputs with more channels than the reference (a learned variance) are compared in the reference's.
    """
    wide = reference.astype(np.float64)
    noise = float(np.sum((other[:, : reference.shape[1]].reshape(reference.shape) - wide) ** 2))
    return decibels(float(np.sum(wide**2)), noise) if math.isfinite(noise) else -999.0


# ---------------------------------------------------------------------------------------------- L2, trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleParity:
    """Distance of final samples: the worst sample for each measure.

    Attributes:
        psnr_db: peak signal-to-noise ratio, the peak being the width of the model's value range.
        snr_db: variance of the reference over the mean squared error, so that a flat background does not flatter.
        ssim: structural similarity (Wang et al. 2004), mean over channels and positions.
        cosine: of the samples as vectors.
        max_abs: largest difference of one value.
    """

    psnr_db: float
    snr_db: float
    ssim: float
    cosine: float
    max_abs: float


def compare(reference: Array, other: Array, value_range: tuple[float, float]) -> SampleParity:
    """Compare (N, C, H, W) samples; equal samples give 999 dB, samples with NaN the worst value of each."""
    peak = value_range[1] - value_range[0]
    measured = [
        _compare_one(ref, got, peak)
        for ref, got in zip(reference.astype(np.float64), other.astype(np.float64), strict=True)
    ]
    psnr, snr, similarity, cosine, largest = zip(*measured, strict=True)
    return SampleParity(
        psnr_db=min(psnr), snr_db=min(snr), ssim=min(similarity), cosine=min(cosine), max_abs=max(largest)
    )


def _compare_one(ref: Array, got: Array, peak: float) -> tuple[float, float, float, float, float]:
    if not np.all(np.isfinite(got)):
        return -999.0, -999.0, -1.0, -1.0, WORST
    error = float(np.mean((got - ref) ** 2))
    norms = float(np.linalg.norm(ref) * np.linalg.norm(got))
    cosine = float(np.sum(ref * got)) / norms if norms > 0 else 1.0 if error == 0 else 0.0
    return (
        decibels(peak**2, error),
        decibels(float(np.var(ref)), error),
        ssim(ref, got, peak),
        cosine,
        float(np.max(np.abs(got - ref))),
    )


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), held within ±999."""
    if noise <= 0:
        return 999.0
    return max(-999.0, 10 * math.log10(signal / noise)) if signal > 0 else -999.0


def ssim(reference: Array, other: Array, peak: float) -> float:
    """Mean structural similarity of two (C, H, W) arrays with a uniform window; 1 for equal arrays.

    The window shrinks to the array where that is smaller. Constants K1 = 0.01, K2 = 0.03 (Wang et al. 2004).
    """
    window = (min(SSIM_WINDOW, reference.shape[-2]), min(SSIM_WINDOW, reference.shape[-1]))
    c_1, c_2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2

    def mean(values: Array) -> Array:
        views = np.lib.stride_tricks.sliding_window_view(values, window, axis=(-2, -1))
        return np.asarray(views.mean(axis=(-2, -1)))

    mean_r, mean_o = mean(reference), mean(other)
    var_r, var_o = mean(reference**2) - mean_r**2, mean(other**2) - mean_o**2
    covariance = mean(reference * other) - mean_r * mean_o
    similarity = ((2 * mean_r * mean_o + c_1) * (2 * covariance + c_2)) / (
        (mean_r**2 + mean_o**2 + c_1) * (var_r + var_o + c_2)
    )
    return float(similarity.mean())
