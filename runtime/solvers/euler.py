"""Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without noise).

With y = x / alpha and r = sigma / alpha the ODE is dy/dr = (y - D) / r, and a step leaves D and eps as they are:
x' = alpha' D + sigma' eps. That is DDIM at eta 0, and Euler's method on a straight flow; written so it also starts
at pure noise.

diffusers: EulerDiscreteScheduler, where ``timestep_spacing`` is "leading" or "trailing". With "linspace" it visits
fractional timesteps and interpolates sigma between training timesteps, where ours are rounded.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Options, Sampler, recorded


def euler(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: Options) -> SolverTable:
    """x' = alpha' D + sigma' eps with eps = (x - alpha D) / sigma."""
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("euler", path, prediction, max_evaluations=n)
    x = table.x_T
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        eps = (x - points.alphas[i] * denoised) / points.sigmas[i]
        x = points.alphas[i + 1] * denoised + points.sigmas[i + 1] * eps
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="euler",
    summary="first order on the probability-flow ODE; the same as ddim at eta 0",
    reference="Karras et al. 2022, arXiv:2206.00364",
    order=1,
    build=euler,
    options=Options(),
)
