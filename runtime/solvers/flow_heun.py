"""Heun's method on a flow: in u = sigma / (alpha + sigma), in which every path is straight, so it may start at noise.

diffusers: FlowMatchHeunDiscreteScheduler on its own sigmas (see flow_euler), without its churn, which adds noise but
no signal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Options, Sampler, recorded


def flow_heun(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: Options) -> SolverTable:
    """An Euler step, then the same step with the mean of the velocities at both ends; the last step is Euler's."""
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("flow_heun", path, prediction, max_evaluations=2 * n - 1)
    u, scale = points.flow_times, points.alphas + points.sigmas
    y = table.x_T / scale[0]
    for i in range(n):
        velocity = (y - table.denoise(scale[i] * y, timesteps[i])) / u[i]
        y_next = y + (u[i + 1] - u[i]) * velocity
        if i + 1 < n:
            velocity_next = (y_next - table.denoise(scale[i + 1] * y_next, timesteps[i + 1])) / u[i + 1]
            y_next = y + (u[i + 1] - u[i]) * 0.5 * (velocity + velocity_next)
        y = y_next
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="flow_heun",
    summary="second order on a straight flow, two evaluations a step",
    reference="Esser et al. 2024, arXiv:2403.03206; Karras et al. 2022, arXiv:2206.00364",
    order=2,
    build=flow_heun,
    options=Options(),
    evaluations=2,
)
