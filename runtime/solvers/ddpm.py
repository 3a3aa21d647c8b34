"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, equation 7 and section 3.2).

diffusers: DDPMScheduler with ``clip_sample=False`` and ``variance_type`` "fixed_small" or "fixed_large". It adds noise
to the final sample where the last timestep is not 0 (negligible for fixed_small); here the last step adds none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Options, Sampler, recorded


class Variance(str, Enum):
    """The two fixed variances of the reverse step; exact for a point mass and for unit-variance data."""

    FIXED_SMALL = "fixed_small"
    FIXED_LARGE = "fixed_large"


@dataclass(frozen=True, slots=True, kw_only=True)
class DDPMOptions(Options):
    """``variance``: of the injected noise."""

    variance: Variance = Variance.FIXED_SMALL


def ddpm(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: DDPMOptions) -> SolverTable:
    """The posterior of x' given x and x_0 = D, for any path.

    From x' to x the path scales by a = alpha/alpha' and adds variance beta = sigma² - a² sigma'², hence
    x' ~ N(alpha' beta/sigma² D + a sigma'²/sigma² x, sigma'²/sigma² beta). ``fixed_large`` takes beta itself.
    """
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("ddpm", path, prediction, max_evaluations=n, max_noises=n)
    x = table.x_T
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        scale = points.alphas[i] / points.alphas[i + 1]
        variance, variance_next = points.sigmas[i] ** 2, points.sigmas[i + 1] ** 2
        beta = variance - scale**2 * variance_next
        x = points.alphas[i + 1] * beta / variance * denoised + scale * variance_next / variance * x
        if i + 1 < n:
            small = options.variance is Variance.FIXED_SMALL
            x = x + math.sqrt(variance_next / variance * beta if small else beta) * table.noise()
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="ddpm",
    summary="ancestral sampling, noise at every step",
    reference="Ho et al. 2020, arXiv:2006.11239",
    order=1,
    build=ddpm,
    options=DDPMOptions(),
    stochastic=True,
)
