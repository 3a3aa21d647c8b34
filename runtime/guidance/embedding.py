"""Distilled guidance: the scale is an input of the network, and one evaluation is a guided one.

Two inputs are known by their names in diffusers: ``guidance`` is the scale itself (FLUX), ``timestep_cond`` a sinusoid
of it (Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378, after Meng et al. 2023, arXiv:2210.03142).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance.evaluations import Evaluations
from lehr.runtime.guidance.plain import Evaluate
from lehr.runtime.guidance.setting import Guidance
from lehr.runtime.loop import Network
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import ModelSpec

Array = npt.NDArray[Any]

EMBEDDINGS = ("guidance", "timestep_cond")
_FACTOR, _LONGEST = 1000.0, 10_000.0  # of the sinusoid, as for timesteps


def embedding_names(spec: ModelSpec) -> tuple[str, ...]:
    """The inputs of a model that hold the guidance scale; empty for a model that was not distilled."""
    return tuple(tensor.name for tensor in spec.conditions if tensor.name in EMBEDDINGS)


def embedded_scale(spec: ModelSpec, guidance_scale: float, batch: int) -> dict[str, Array]:
    """The feed that tells a distilled model its scale: ``guidance`` (B,) or ``timestep_cond`` (B, dim).

    Raises:
        InvalidInput: a model without such an input, or one whose shape holds no embedding.
    """
    feeds: dict[str, Array] = {}
    for tensor in spec.conditions:
        if tensor.name == "guidance":
            feeds[tensor.name] = np.full(batch, guidance_scale, dtype=tensor.dtype.numpy)
        elif tensor.name == "timestep_cond":
            size = tensor.shape[-1]
            if len(tensor.shape) != 2 or not isinstance(size, int) or size < 4:
                raise InvalidInput(f"input 'timestep_cond' has shape {tensor.shape}, expected ('batch', size >= 4).")
            feeds[tensor.name] = np.tile(_sinusoid(guidance_scale - 1, size), (batch, 1)).astype(tensor.dtype.numpy)
    if not feeds:
        raise InvalidInput(
            f"{spec.name} takes no guidance scale as an input; inputs that hold one are named "
            f"{' or '.join(EMBEDDINGS)}."
        )
    return feeds


def _sinusoid(value: float, size: int) -> Array:
    """(size,) sines, then cosines, of 1000 ``value`` at geometric frequencies; an odd size ends in 0."""
    half = size // 2
    angles = _FACTOR * value * np.exp(-np.log(_LONGEST) / (half - 1) * np.arange(half))
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(size % 2)])


def distilled(
    evaluate: Evaluate,
    conditions: Mapping[str, Array],
    spec: ModelSpec,
    table: SolverTable,
    guidance: Guidance,
    *,
    batch: int,
    default_scale: float,
) -> Network:
    """A network for one loop at a time over ``table`` whose scale is an input, and may change along the loop.

    Raises:
        InvalidInput: rescale or a projection, which need two estimates; a schedule that does not fit the table.
    """
    if guidance.acts_on_denoised:
        raise InvalidInput(
            f"{spec.name} is told its guidance scale and returns one estimate; rescale and projection need two. "
            "Leave them out."
        )
    scales = guidance.scales(table, default_scale)
    feeds = {float(scale): embedded_scale(spec, float(scale), batch) for scale in np.unique(scales)}
    evaluations = Evaluations(table)

    def network(sample: Array, timestep: float) -> Array:
        scale = float(scales[evaluations.advance(timestep)])
        return evaluate(sample, timestep, {**conditions, **feeds[scale]})

    return network
