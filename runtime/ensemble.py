"""Base and refiner: two networks share one schedule, the second takes over where the first ends.

SDXL's ensemble of experts (Podell et al. 2023, arXiv:2307.01952, section 2.5). The table is cut at a timestep
(:mod:`lehr.runtime.table_cut`); the noise of both halves is that of the whole loop, so a refiner that is the base
again draws what one loop draws, exactly for one-step methods.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.pipeline import OnStep, Pipeline
from lehr.runtime.request import Request
from lehr.runtime.table_cut import row_below, split

Array = npt.NDArray[Any]


def draw(
    base: Pipeline,
    refiner: Pipeline,
    request: Request,
    *,
    high_noise_fraction: float = 0.8,
    refiner_request: Request | None = None,
    on_step: OnStep | None = None,
) -> Array:
    """Samples of two networks in turn.

    Args:
        base: draws from noise, at timesteps in the first ``high_noise_fraction`` of the path.
        refiner: goes on from there; of the same path, prediction and sample as the base.
        request: what to draw.
        high_noise_fraction: between 0 and 1, diffusers' ``denoising_end``.
        refiner_request: conditions and guidance of the refiner where they are others; its table, noise and number
            of samples are always those of ``request``.
        on_step: as a pipeline's; each network counts its own evaluations.

    Returns:
        (N, C, H, W) float32.

    Raises:
        InvalidInput: a fraction at which one network has nothing to do, a sampler that cannot be cut there, networks
            of different paths, or a request that one of them cannot meet.
    """
    if not 0 < high_noise_fraction < 1:
        raise InvalidInput(f"the fraction of the base must lie between 0 and 1, got {high_noise_fraction}.")
    if refiner.denoiser.spec.sample.shape != base.denoiser.spec.sample.shape:
        raise InvalidInput(
            f"the refiner's sample is {refiner.denoiser.spec.sample.shape}, the base's "
            f"{base.denoiser.spec.sample.shape}; they must be equal."
        )
    if request.init is not None or request.noisy is not None:
        raise InvalidInput("base and refiner start from noise; for img2img run the refiner alone on the base's sample.")
    table = base.table(request)
    first, last = base.denoiser.spec.path.first_timestep, base.denoiser.spec.path.last_timestep
    row = row_below(table, first - high_noise_fraction * (first - last))
    begin, end = split(table, row)
    latents = base(replace(request, table=begin), on_step=on_step)
    goes_on = replace(
        refiner_request or request,
        num=request.count,
        seed=request.seed,
        seeds=request.seeds,
        table=end,
        noisy=latents,
        first_noise=request.first_noise + begin.num_noises,
    )
    return refiner(goes_on, on_step=on_step)
