"""What a solver table does besides linear algebra: element-wise operations, each named.

On the x_0 estimate: clipping, and the dynamic thresholding of Imagen (Saharia et al. 2022, arXiv:2205.11487,
section 2.3). On the injected noise: the variance that the network itself predicts in a second half of its channels
(Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15; the samplers of ADM and DiT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput, RunFailed

Array = npt.NDArray[np.floating[Any]]


# ---------------------------------------------------------------------------------------- on the x_0 estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """D -> clip(D, -limit, limit) (diffusers' ``clip_sample``)."""

    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise InvalidInput(f"the clipping limit must be positive, got {self.limit}")

    def __call__(self, denoised: Array) -> Array:
        return np.clip(denoised, -self.limit, self.limit)

    def __str__(self) -> str:
        return f"clipped to ±{self.limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicThreshold:
    """D -> clip(D, -s, s) / s, with s the ``ratio`` quantile of a sample's |D|, held between 1 and ``max_value``."""

    ratio: float = 0.995
    max_value: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise InvalidInput(f"the thresholding ratio is a quantile and must lie in [0, 1], got {self.ratio}")
        if not self.max_value > 0:
            raise InvalidInput(f"the largest threshold must be positive, got {self.max_value}")

    def __call__(self, denoised: Array) -> Array:
        """(B, …) to (B, …); every sample has its own threshold, so a batch changes nothing."""
        flat = np.abs(denoised.reshape(len(denoised), -1))
        quantile = np.quantile(flat, self.ratio, axis=1)
        threshold = np.minimum(np.maximum(quantile, 1), self.max_value).astype(denoised.dtype)
        threshold = threshold.reshape(-1, *[1] * (denoised.ndim - 1))
        thresholded: Array = np.clip(denoised, -threshold, threshold) / threshold
        return thresholded

    def __str__(self) -> str:
        return f"thresholded at its {self.ratio:g} quantile (at most {self.max_value:g})"


DenoisedOp = Clip | DynamicThreshold
_OPS: dict[str, type[Clip | DynamicThreshold]] = {"clip": Clip, "dynamic_threshold": DynamicThreshold}


def op_to_json(op: DenoisedOp | None) -> dict[str, Any] | None:
    """A dictionary that :func:`op_from_json` reads."""
    if op is None:
        return None
    return {"kind": next(name for name, kind in _OPS.items() if type(op) is kind), **asdict(op)}


def op_from_json(data: Mapping[str, Any] | None) -> DenoisedOp | None:
    """Rebuild an operation; raises InvalidInput for a kind or a field that does not exist."""
    if data is None:
        return None
    fields = {key: float(value) for key, value in data.items() if key != "kind"}
    if data["kind"] not in _OPS:
        raise InvalidInput(f"unknown operation on the x_0 estimate {data['kind']!r}; known: {', '.join(_OPS)}.")
    try:
        return _OPS[data["kind"]](**fields)
    except TypeError as e:
        raise InvalidInput(f"operation {data['kind']!r} has no such fields: {e}.") from e


# -------------------------------------------------------------------------------------- on the injected noise


class LearnedVariance(str, Enum):
    """What the second half of the network's channels, v, does to the noise injected after that evaluation."""

    LOG_RANGE = "log_range"  # z -> exp(slope v) z: v interpolates between two log variances (ADM, DiT)
    DIRECT = "direct"  # z -> sqrt(v) z: v is the variance
    UNUSED = "unused"  # the sampler ignores v

    def scale(self, noise: Array, variance: Array, slope: float) -> Array:
        """The noise with its learned standard deviation; ``slope`` is the table's, for this noise.

        Raises:
            RunFailed: the network predicts a negative variance.
        """
        if self is LearnedVariance.UNUSED:
            return noise
        if self is LearnedVariance.LOG_RANGE:
            return np.asarray(noise * np.exp(variance * variance.dtype.type(slope)))
        if np.any(variance < 0):
            raise RunFailed(
                f"the network predicts a negative variance ({variance.min():.3g}), but this sampler takes its square "
                "root. Check that the model was trained with learned variances (not with a learned range)."
            )
        return np.asarray(noise * np.sqrt(variance))
