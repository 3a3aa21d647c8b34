"""DPM-Solver++ for the reverse SDE, single step of second order (k-diffusion's "DPM++ SDE", midpoint r = 1/2).

A step evaluates the network at the middle of log sigma, reached by an ancestral step, and takes the whole ancestral
step with the D found there. Both steps' noises are increments of one Brownian motion in sigma, hence correlated.

diffusers: DPMSolverSDEScheduler, where ``timestep_spacing`` is "leading" or "trailing" (see euler), given the same
Brownian motion; it draws its own from torchsde's tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import ancestral_split, finite_grid
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, check_positive, check_share, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMppSDEOptions(Options):
    """``eta``: share of fresh noise. ``s_noise``: multiplies it."""

    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        check_positive("s_noise", self.s_noise)


def dpmpp_sde(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: DPMppSDEOptions
) -> SolverTable:
    """y' = D_mid + (down / r) (y - D_mid) + up z, with D_mid found at sqrt(r r'); the last step is Euler's."""
    points, n = finite_grid("dpmpp_sde", path, timesteps), len(timesteps)
    table = TableWriter("dpmpp_sde", path, prediction, max_evaluations=2 * n - 1, max_noises=2 * n)
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    for i in range(n):
        denoised = table.denoise(alphas[i] * y, timesteps[i])
        if i + 1 == n:
            y = denoised
            break
        middle = math.sqrt(r[i] * r[i + 1])
        timestep = float(path.timestep_of(middle))
        down, up = ancestral_split(r[i], middle, options.eta)
        y_middle = denoised + down / r[i] * (y - denoised)
        if up > 0:
            first = table.noise()
            y_middle = y_middle + options.s_noise * up * first
        denoised = table.denoise(float(path.alpha_sigma(timestep)[0]) * y_middle, timestep)
        down, up = ancestral_split(r[i], r[i + 1], options.eta)
        y = denoised + down / r[i] * (y - denoised)
        if up > 0:
            share = (r[i] - middle) / (r[i] - r[i + 1])  # of the Brownian motion's time that has passed by the middle
            increment = math.sqrt(share) * first + math.sqrt(1 - share) * table.noise()
            y = y + options.s_noise * up * increment
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="dpmpp_sde",
    summary="second order single step on the reverse SDE, two evaluations a step",
    reference="Lu et al. 2022, arXiv:2211.01095",
    order=2,
    build=dpmpp_sde,
    options=DPMppSDEOptions(),
    stochastic=True,
    evaluations=2,
    paths=DIFFUSIONS,
)
