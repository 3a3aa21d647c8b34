"""Latent consistency models: jump to x_0, add noise, jump again (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

On discrete timesteps the network's x_0 passes the boundary condition f = c_skip x + c_out D, with
c_skip = s² / (t² + s²) and c_out = t / sqrt(t² + s²), s = ``sigma_data`` and t the timestep times ``timestep_scaling``.

diffusers: LCMScheduler with ``clip_sample=False`` on spacing "distilled", which ``auto`` is here; FlowMatchLCMScheduler
on flows, without its ``scale_factors``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import VP, Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.schedules import Spacing
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import FLOWS, Options, Sampler, check_positive, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class LCMOptions(Options):
    """``sigma_data``, ``timestep_scaling``: of the boundary condition; they matter on discrete timesteps alone."""

    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        check_positive("sigma_data", self.sigma_data)
        check_positive("timestep_scaling", self.timestep_scaling)


def lcm(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: LCMOptions) -> SolverTable:
    """x' = alpha' f(x, t) + sigma' z; the last f is the sample."""
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("lcm", path, prediction, max_evaluations=n, max_noises=n)
    x = table.x_T
    for i in range(n):
        clean = table.denoise(x, timesteps[i])
        if isinstance(path, VP):
            scaled, data = timesteps[i] * options.timestep_scaling, options.sigma_data
            total = scaled**2 + data**2
            clean = data**2 / total * x + scaled / total**0.5 * clean
        x = clean
        if i + 1 < n:
            x = points.alphas[i + 1] * clean + points.sigmas[i + 1] * table.noise()
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="lcm",
    summary="consistency sampling of distilled models, 1 to 8 steps",
    reference="Luo et al. 2023, arXiv:2310.04378",
    order=1,
    build=lcm,
    options=LCMOptions(),
    stochastic=True,
    paths=(VP, *FLOWS),
    spacing=Spacing.DISTILLED,
)
