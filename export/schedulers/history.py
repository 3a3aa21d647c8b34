"""What multistep schedulers keep of an evaluation: the x_0 estimate or the noise estimate, in their own rounding.

diffusers computes both with float32 coefficients. A table whose D agrees with the scheduler's to the last bit has
the short recurrence that the scheduler itself is; one that rounds alpha and sigma afresh has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Vector = npt.NDArray[np.float64]
Pair = tuple[float, float]  # coefficients on the evaluation's input and on its output

_LISTS = ("model_outputs", "derivatives", "ets")
_EXACT, _SAME = 1e-13, 1e-4  # of the larger coefficient: a multiple in float64; the same quantity in float32


def kept_quantity(scheduler: Any, row: Vector, output_at: int) -> Pair | None:
    """The newest entry of the scheduler's history in terms of this evaluation alone, or None.

    Args:
        scheduler: after its step.
        row: (V,) the network's input as a vector.
        output_at: where F stands in a vector.
    """
    history = next((getattr(scheduler, name) for name in _LISTS if getattr(scheduler, name, None)), None)
    newest = history[-1] if isinstance(history, list) else None
    if not isinstance(newest, torch.Tensor):
        return None
    vector = newest.reshape(-1, newest.shape[-1])[0].numpy()
    if len(vector) != len(row) or vector[output_at] == 0:
        return None
    rest = vector.copy()
    rest[output_at] = 0
    on_input = float(rest @ row / (row @ row))
    if np.abs(rest - on_input * row).max() > _EXACT * np.abs(vector).max():
        return None
    return on_input, float(vector[output_at])


def exact_denoised(
    kept: Mapping[int, Pair], from_input: Vector, from_output: Vector, alphas: Vector, sigmas: Vector, scale: Vector
) -> dict[int, Pair]:
    """D in the scheduler's rounding, for the evaluations whose kept quantity is D or eps = (x_t - alpha D) / sigma.

    Args:
        kept: evaluation -> the kept quantity's coefficients.
        from_input: (N,) D's coefficient on the input by the prediction's formula.
        from_output: (N,) likewise on F.
        alphas: (N,) alpha_t.
        sigmas: (N,) sigma_t.
        scale: (N,) the input over x_t.
    """
    exact = {}
    for i, (on_input, on_output) in kept.items():
        if _same((on_input, on_output), (from_input[i], from_output[i])):
            exact[i] = (on_input, on_output)
        elif alphas[i] > 0 and sigmas[i] > 0:
            on_sample = 1 / scale[i]
            noise = ((on_sample - alphas[i] * from_input[i]) / sigmas[i], -alphas[i] * from_output[i] / sigmas[i])
            if _same((on_input, on_output), noise):
                exact[i] = ((on_sample - sigmas[i] * on_input) / alphas[i], -sigmas[i] * on_output / alphas[i])
    return exact


def _same(one: Pair, other: Pair) -> bool:
    size = max(abs(other[0]), abs(other[1]))
    return abs(one[0] - other[0]) <= _SAME * size and abs(one[1] - other[1]) <= _SAME * size
