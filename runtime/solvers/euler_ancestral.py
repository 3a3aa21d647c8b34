"""Euler with fresh noise: decay below the next noise level, then add noise up to it (k-diffusion's "ancestral").

At eta 1 one step draws from the posterior of y = x / alpha given D, so this is DDPM's sampling in Karras's variables.

diffusers: EulerAncestralDiscreteScheduler, where ``timestep_spacing`` is "leading" or "trailing" (see euler).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import ancestral_split, grid
from lehr.runtime.solvers.sampler import Options, Sampler, check_positive, check_share, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class EulerAncestralOptions(Options):
    """``eta``: share of fresh noise. ``s_noise``: multiplies it."""

    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        check_positive("s_noise", self.s_noise)


def euler_ancestral(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: EulerAncestralOptions
) -> SolverTable:
    """y' = D + down eps + s_noise up z, where down² + up² = r'²."""
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("euler_ancestral", path, prediction, max_evaluations=n, max_noises=n)
    x = table.x_T
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        eps = (x - points.alphas[i] * denoised) / points.sigmas[i]
        down, up = ancestral_split(points.ratios[i], points.ratios[i + 1], options.eta)
        x = points.alphas[i + 1] * (denoised + down * eps)
        if up > 0:
            x = x + points.alphas[i + 1] * options.s_noise * up * table.noise()
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="euler_ancestral",
    summary="Euler with fresh noise at every step",
    reference="Karras et al. 2022, arXiv:2206.00364; Ho et al. 2020, arXiv:2006.11239",
    order=1,
    build=euler_ancestral,
    options=EulerAncestralOptions(),
    stochastic=True,
)
