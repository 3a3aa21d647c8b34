"""DPM-Solver-2 in Karras's variables: the midpoint rule in log sigma (Lu et al. 2022, arXiv:2206.00927, section 3.3).

diffusers: KDPM2DiscreteScheduler, where ``timestep_spacing`` is "leading" or "trailing" (see euler).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import finite_grid
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, recorded


def dpm_2(path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: Options) -> SolverTable:
    """y' = y + (r' - r) slope(sqrt(r r')), reached by an Euler step; the last step is Euler's."""
    points, n = finite_grid("dpm_2", path, timesteps), len(timesteps)
    table = TableWriter("dpm_2", path, prediction, max_evaluations=2 * n - 1)
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    for i in range(n):
        slope = (y - table.denoise(alphas[i] * y, timesteps[i])) / r[i]
        if i + 1 < n:
            middle = math.sqrt(r[i] * r[i + 1])
            timestep = float(path.timestep_of(middle))
            y_middle = y + (middle - r[i]) * slope
            slope = (y_middle - table.denoise(float(path.alpha_sigma(timestep)[0]) * y_middle, timestep)) / middle
        y = y + (r[i + 1] - r[i]) * slope
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="dpm_2",
    summary="second order, midpoint rule in log sigma, two evaluations a step",
    reference="Lu et al. 2022, arXiv:2206.00927; Karras et al. 2022, arXiv:2206.00364",
    order=2,
    build=dpm_2,
    options=Options(),
    evaluations=2,
    paths=DIFFUSIONS,
)
