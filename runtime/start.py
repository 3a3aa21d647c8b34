"""Loops that start from a given sample: img2img (SDEdit, Meng et al. 2022, arXiv:2108.01073) and inpainting.

Inpainting holds the known region by its x_0 estimate: wherever the mask is 0, D is the given sample, so the loop
itself keeps that region at alpha_t x_0 + sigma_t eps, the noise level of every evaluation, in any sampler. For DDIM
this equals blending the latent after each step (Lugmayr et al. 2022, arXiv:2201.09865, equation 8, with one noise).
:class:`Known` also has that blending itself, which is what diffusers' pipelines do.

Shape legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance.evaluations import Evaluations
from lehr.runtime.loop import Network
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.table_cut import tail

Array = npt.NDArray[Any]


class Known(str, Enum):
    """How inpainting holds the known region."""

    ESTIMATE = "estimate"  # its x_0 estimate is the given sample
    INPUT = "input"  # the network is shown it at its noise level, from the second evaluation on, as diffusers does


def check_strength(strength: float) -> None:
    """Raise InvalidInput unless ``strength`` lies in (0, 1]."""
    if not 0 < strength <= 1:
        raise InvalidInput(f"the strength must lie in (0, 1], got {strength}; 1 redraws the whole sample.")


def start_step(num_inference_steps: int, strength: float) -> int:
    """How many of the first steps img2img leaves out, as diffusers counts: the last ``int(steps * strength)`` stay.

    Raises:
        InvalidInput: a strength outside (0, 1], or one so small that no step is left.
    """
    check_strength(strength)
    kept = min(int(num_inference_steps * strength), num_inference_steps)
    if kept < 1:
        raise InvalidInput(
            f"strength {strength:g} leaves none of {num_inference_steps} steps; use at least "
            f"{1 / num_inference_steps:.3g}, or more steps."
        )
    return num_inference_steps - kept


def begun_late(table: SolverTable, strength: float) -> SolverTable:
    """What img2img runs of a table made for the whole path: its last share of steps, whatever a step evaluates.

    Raises:
        InvalidInput: as :func:`start_step`, or a sampler that cannot be cut there.
    """
    whole = not {"begins_at", "ends_before"} & set(table.options)
    steps = table.options.get("num_inference_steps") if whole else None
    if not (isinstance(steps, int) and 1 <= steps <= len(table) + 1):
        steps = len(table)
    return tail(table, min(start_step(steps, strength) * max(1, round(len(table) / steps)), len(table) - 1))


def fit_sample(given: Array, shape: tuple[int, ...], what: str) -> Array:
    """A (C, H, W) or (B, C, H, W) array of one sample, or as many as ``shape`` (B, C, H, W) says, as float32.

    Raises:
        InvalidInput: another shape, or values that are not finite.
    """
    array = np.asarray(given)
    if array.shape not in (shape, shape[1:], (1, *shape[1:])):
        raise InvalidInput(
            f"{what} has shape {array.shape}, expected {shape[1:]}, the model's sample, or {shape} for one each. "
            "Resize it first."
        )
    if not np.all(np.isfinite(array)):
        raise InvalidInput(f"{what} holds values that are not finite.")
    return np.broadcast_to(array.astype(np.float32), shape)


def fit_mask(given: Array, shape: tuple[int, ...]) -> Array:
    """A mask, 1 where the sample is redrawn and 0 where it is known, for samples of ``shape`` (B, C, H, W).

    Args:
        given: (H, W), (1, H, W), (C, H, W), or (B, …) of the last two; boolean, or numbers in [0, 1].
        shape: of the samples.

    Raises:
        InvalidInput: a mask of another shape, or values outside [0, 1].
    """
    array = np.asarray(given)
    one = (1, *shape[2:])
    if array.shape not in (shape[2:], one, shape[1:], (shape[0], *one), shape, (1, *one), (1, *shape[1:])):
        raise InvalidInput(
            f"the mask has shape {array.shape}, expected {shape[2:]}, {one}, {shape[1:]} or one each of {shape[0]} "
            "samples: the size of the model's sample. Resize it first."
        )
    mask = array.astype(np.float32)
    if not np.all((mask >= 0) & (mask <= 1)):
        raise InvalidInput("the mask holds values outside [0, 1]; 1 is redrawn, 0 is kept.")
    return np.broadcast_to(mask, shape)


def noised(table: SolverTable, x_0: Array, noise: Array) -> Array:
    """alpha x_0 + sigma eps at the table's first evaluation: what its loop starts from."""
    alpha, sigma = np.float32(table.alphas[0]), np.float32(table.sigmas[0])
    x_t: Array = alpha * x_0 + sigma * noise
    return x_t


def keep_known(network: Network, table: SolverTable, x_0: Array, mask: Array) -> Network:
    """``network`` with mask D + (1 - mask) x_0 for D, for one loop at a time over ``table``.

    Args:
        network: of the loop.
        table: the solver table that the loop runs, from :func:`noised`.
        x_0: (B, C, H, W) the known sample.
        mask: (B, C, H, W), 1 where it is redrawn.
    """
    evaluations = Evaluations(table)

    def held(sample: Array, timestep: float) -> Array:
        i = evaluations.advance(timestep)
        output: Array = network(sample, timestep).copy()
        on_input, on_output = float(table.denoised_from_input[i]), float(table.denoised_from_output[i])
        if on_output == 0:
            return output
        known = (x_0.astype(np.float64) - on_input * sample) / on_output
        prediction = output[:, : sample.shape[1]]
        prediction[...] = mask * prediction + (1 - mask) * known
        return output

    return held


def show_known(network: Network, table: SolverTable, x_0: Array, mask: Array, noise: Array) -> Network:
    """``network`` shown alpha x_0 + sigma eps in the known region from the second evaluation on, one loop at a time.

    The loop is linear element by element, so what it does to the known region itself reaches no other element: for a
    mask of 0 and 1 this is diffusers' blending after every step, whatever the sampler.

    Args:
        network: of the loop.
        table: the solver table that the loop runs.
        x_0: (B, C, H, W) the known sample.
        mask: (B, C, H, W), 1 where it is redrawn.
        noise: (B, C, H, W) eps, the noise that the loop starts from.
    """
    evaluations = Evaluations(table)
    scales = np.asarray(table.prediction.input_scale(table.alphas, table.sigmas))

    def shown(sample: Array, timestep: float) -> Array:
        i = evaluations.advance(timestep)
        if i > 0:
            alpha, sigma = np.float32(table.alphas[i] * scales[i]), np.float32(table.sigmas[i] * scales[i])
            sample = (mask * sample + (1 - mask) * (alpha * x_0 + sigma * noise)).astype(sample.dtype)
        return network(sample, timestep)

    return shown
