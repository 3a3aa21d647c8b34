"""Karras's stochastic sampler (Karras et al. 2022, arXiv:2206.00364, algorithm 2): Heun with "churn".

Before a step noise is added, from r to (1 + gamma) r; the step then starts from there. The defaults are the paper's
for ImageNet 64 x 64 (table 5). A level that churn would lift above the path's noisiest is not churned.

diffusers: no scheduler has it. EulerDiscreteScheduler and EDMEulerScheduler take ``s_churn`` but are first order and
tell the network the level before churn; at s_churn 0 this is heun.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import finite_grid
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, check_positive, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class EDMStochasticOptions(Options):
    """``s_churn``: gamma is s_churn / N, at most sqrt(2) - 1, where s_min <= r <= s_max; ``s_noise`` scales noise."""

    s_churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003

    def __post_init__(self) -> None:
        check_positive("s_churn", self.s_churn, zero=True)
        check_positive("s_noise", self.s_noise)
        if not 0 <= self.s_min <= self.s_max:
            raise InvalidInput(f"need 0 <= s_min <= s_max, got {self.s_min} and {self.s_max}.")


def edm_stochastic(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: EDMStochasticOptions
) -> SolverTable:
    """Algorithm 2, in y = x / alpha and r = sigma / alpha."""
    points, n = finite_grid("edm_stochastic", path, timesteps), len(timesteps)
    table = TableWriter("edm_stochastic", path, prediction, max_evaluations=2 * n - 1, max_noises=n)
    gamma = min(options.s_churn / n, math.sqrt(2) - 1)
    alpha, sigma = path.alpha_sigma(path.first_timestep)
    highest = float(sigma / alpha) if alpha > 0 else math.inf
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    for i in range(n):
        lifted, timestep, alpha_hat = r[i], timesteps[i], alphas[i]
        if gamma > 0 and options.s_min <= r[i] <= options.s_max and (1 + gamma) * r[i] <= highest:
            lifted = (1 + gamma) * r[i]
            timestep = float(path.timestep_of(lifted))
            alpha_hat = float(path.alpha_sigma(timestep)[0])
            y = y + math.sqrt(lifted**2 - r[i] ** 2) * options.s_noise * table.noise()
        slope = (y - table.denoise(alpha_hat * y, timestep)) / lifted
        y_next = y + (r[i + 1] - lifted) * slope
        if i + 1 < n:
            slope_next = (y_next - table.denoise(alphas[i + 1] * y_next, timesteps[i + 1])) / r[i + 1]
            y_next = y + (r[i + 1] - lifted) * 0.5 * (slope + slope_next)
        y = y_next
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="edm_stochastic",
    summary="Heun with noise added before each step (churn)",
    reference="Karras et al. 2022, arXiv:2206.00364",
    order=2,
    build=edm_stochastic,
    options=EDMStochasticOptions(),
    stochastic=True,
    evaluations=2,
    paths=DIFFUSIONS,
)
