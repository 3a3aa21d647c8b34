"""DDIM (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

diffusers: DDIMScheduler with ``set_alpha_to_one=True`` and ``clip_sample=False``. With ``set_alpha_to_one=False`` (the
Stable Diffusion configuration) it ends at the first training timestep instead of at x_0. It steps to t - T // N
whatever the spacing, so the two differ where the spacing is not that wide: "linspace", and "trailing" unless N
divides T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Options, Sampler, check_share, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class DDIMOptions(Options):
    """``eta``: 0 is deterministic, 1 is DDPM's ancestral sampling."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_share("eta", self.eta)


def ddim(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: DDIMOptions) -> SolverTable:
    """x' = alpha' D + sqrt(sigma'² - s²) eps + s z, with s = eta times the posterior's standard deviation.

    Stated for any path through the ratio r = sigma / alpha, for which the posterior variance of x'/alpha' is
    r'² (1 - r'²/r²).
    """
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("ddim", path, prediction, max_evaluations=n, max_noises=n if options.eta else 0)
    x = table.x_T
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        eps = (x - points.alphas[i] * denoised) / points.sigmas[i]
        shrink = points.ratios[i + 1] / points.ratios[i]
        std = options.eta * points.sigmas[i + 1] * math.sqrt(max(0.0, 1 - shrink**2))
        x = points.alphas[i + 1] * denoised + math.sqrt(points.sigmas[i + 1] ** 2 - std**2) * eps
        if std > 0:
            x = x + std * table.noise()
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="ddim",
    summary="deterministic at eta 0, ancestral (DDPM) at eta 1",
    reference="Song et al. 2021, arXiv:2010.02502",
    order=1,
    build=ddim,
    options=DDIMOptions(),
    stochastic=True,
)
