"""Trajectory consistency distillation: jump past the next timestep, then diffuse back to it.

Zheng et al. 2024, arXiv:2402.19159, algorithm 3 (strategic stochastic sampling); ``eta`` is the paper's gamma.

diffusers: TCDScheduler on spacing "distilled", which ``auto`` is here, with ``final`` sigma_min: it ends at timestep 0
with that timestep's remainder of noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import VP, LinearFlow, Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.schedules import Spacing
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Final, Options, Sampler, check_share, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class TCDOptions(Options):
    """``eta``: how far past the next timestep to jump, as a share of it; 0 is deterministic."""

    eta: float = 0.3
    final: Final = Final.ZERO

    def __post_init__(self) -> None:
        check_share("eta", self.eta)


def tcd(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: TCDOptions) -> SolverTable:
    """x_s = alpha_s D + sigma_s eps at timestep s = (1 - eta) t', then x' = (alpha'/alpha_s) x_s plus noise."""
    points, n = grid(path, timesteps, final=options.final), len(timesteps)
    table = TableWriter("tcd", path, prediction, max_evaluations=n, max_noises=n)
    x = table.x_T
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        eps = (x - points.alphas[i] * denoised) / points.sigmas[i]
        alpha, sigma = points.alphas[i + 1], points.sigmas[i + 1]
        if i + 1 == n or options.eta == 0:
            x = alpha * denoised + sigma * eps
            continue
        beyond = (1 - options.eta) * timesteps[i + 1]
        alpha_s, sigma_s = path.alpha_sigma(math.floor(beyond) if isinstance(path, VP) else beyond)
        back = alpha / float(alpha_s)
        x = alpha * denoised + back * float(sigma_s) * eps
        x = x + math.sqrt(max(0.0, sigma**2 - (back * float(sigma_s)) ** 2)) * table.noise()
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="tcd",
    summary="trajectory consistency sampling of distilled models, 1 to 20 steps",
    reference="Zheng et al. 2024, arXiv:2402.19159",
    order=1,
    build=tcd,
    options=TCDOptions(),
    stochastic=True,
    paths=(VP, LinearFlow),
    spacing=Spacing.DISTILLED,
)
