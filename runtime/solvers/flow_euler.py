"""Euler's method on a rectified flow (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206).

On a straight flow Euler's method leaves x_0 and eps as they are, so this is euler under the name flow users expect.
On SiT's curved interpolants it is exact for straight paths in u = sigma / (alpha + sigma), where SiT's own Euler
steps in t.

diffusers: FlowMatchEulerDiscreteScheduler given ``sigmas`` 1, 1 - 1/N, … (as its FLUX pipeline does). Without them it
spaces the sigmas from 1 to the shifted 1 / T and shifts them a second time: schedule Flow(shift, end) here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import FLOWS, Options, Sampler, recorded


def flow_euler(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: Options) -> SolverTable:
    """dy/du = eps - x_0 with y = x / (alpha + sigma); the velocity (y - D) / u is a flow network's own output."""
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("flow_euler", path, prediction, max_evaluations=n)
    u, scale = points.flow_times, points.alphas + points.sigmas
    y = table.x_T / scale[0]
    for i in range(n):
        velocity = (y - table.denoise(scale[i] * y, timesteps[i])) / u[i]
        y = y + (u[i + 1] - u[i]) * velocity
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="flow_euler",
    summary="first order on a straight flow",
    reference="Esser et al. 2024, arXiv:2403.03206",
    order=1,
    build=flow_euler,
    options=Options(),
    paths=FLOWS,
)
