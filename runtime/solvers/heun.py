"""Heun's method on the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

diffusers: HeunDiscreteScheduler with ``clip_sample=False``, where ``timestep_spacing`` is "leading" or "trailing"
(see euler).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import finite_grid
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, recorded


def heun(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: Options) -> SolverTable:
    """An Euler step, then the same step with the mean of the slopes at both ends; the last step is Euler's."""
    points, n = finite_grid("heun", path, timesteps), len(timesteps)
    table = TableWriter("heun", path, prediction, max_evaluations=2 * n - 1)
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    for i in range(n):
        slope = (y - table.denoise(alphas[i] * y, timesteps[i])) / r[i]
        y_next = y + (r[i + 1] - r[i]) * slope
        if i + 1 < n:
            slope_next = (y_next - table.denoise(alphas[i + 1] * y_next, timesteps[i + 1])) / r[i + 1]
            y_next = y + (r[i + 1] - r[i]) * 0.5 * (slope + slope_next)
        y = y_next
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="heun",
    summary="second order, two evaluations a step",
    reference="Karras et al. 2022, arXiv:2206.00364",
    order=2,
    build=heun,
    options=Options(),
    evaluations=2,
    paths=DIFFUSIONS,
)
