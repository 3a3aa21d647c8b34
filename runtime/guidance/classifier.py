"""Classifier guidance (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4 and algorithm 2).

The gradient of log p(y | x_t) is added to the score: D grows by s sigma² / alpha times it, and the output by that
over ``denoised_from_output``; for an epsilon prediction this is the paper's eps - s sigma grad.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance.evaluations import Evaluations
from lehr.runtime.guidance.plain import Evaluate
from lehr.runtime.loop import Network
from lehr.runtime.solver_table import SolverTable

Array = npt.NDArray[Any]


def classifier_guided(
    network: Network, gradient: Evaluate, conditions: Mapping[str, Array], table: SolverTable, scale: float
) -> Network:
    """``network`` with a classifier's gradient added, for one loop at a time over ``table``.

    Args:
        network: of the loop, guided or not.
        gradient: ``gradient(x_t, timestep, conditions)`` returns the gradient of log p(y | x_t) in x_t.
        conditions: what the gradient is taken for, such as ``class_labels`` (B,).
        table: the solver table that the loop runs.
        scale: s; 0 is none.

    Raises:
        InvalidInput: a scale that is not finite, or a table that asks for an estimate of x_0 out of pure noise,
            where the classifier's share is infinite.
    """
    if not math.isfinite(scale):
        raise InvalidInput(f"the classifier's scale must be finite, got {scale}.")
    at_noise = np.flatnonzero((table.alphas == 0) | (table.denoised_from_output == 0))
    if at_noise.size:
        raise InvalidInput(
            f"classifier guidance needs a signal, but evaluation {at_noise[0]} of {table.sampler} (timestep "
            f"{table.timesteps[at_noise[0]]:g}) has alpha {table.alphas[at_noise[0]]:g}; start below pure noise."
        )
    shares = scale * table.sigmas**2 / (table.alphas * table.denoised_from_output)
    input_scales = np.asarray(table.prediction.input_scale(table.alphas, table.sigmas))
    evaluations = Evaluations(table)

    def guided(sample: Array, timestep: float) -> Array:
        i = evaluations.advance(timestep)
        output: Array = network(sample, timestep).copy()
        x_t = sample / sample.dtype.type(input_scales[i])
        output[:, : sample.shape[1]] += sample.dtype.type(shares[i]) * gradient(x_t, timestep, conditions)
        return output

    return guided
