"""dpm_2 with fresh noise: the midpoint rule down below the next noise level, then noise up to it (k-diffusion).

diffusers: KDPM2AncestralDiscreteScheduler, where ``timestep_spacing`` is "leading" or "trailing" (see euler).
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
class DPM2AncestralOptions(Options):
    """``eta``: share of fresh noise. ``s_noise``: multiplies it."""

    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        check_positive("s_noise", self.s_noise)


def dpm_2_ancestral(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: DPM2AncestralOptions
) -> SolverTable:
    """The midpoint rule from r to ``down``, then ``up`` fresh noise; the last step is Euler's."""
    points, n = finite_grid("dpm_2_ancestral", path, timesteps), len(timesteps)
    table = TableWriter("dpm_2_ancestral", path, prediction, max_evaluations=2 * n - 1, max_noises=n)
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    for i in range(n):
        slope = (y - table.denoise(alphas[i] * y, timesteps[i])) / r[i]
        down, up = ancestral_split(r[i], r[i + 1], options.eta)
        if down > 0:
            middle = math.sqrt(r[i] * down)
            timestep = float(path.timestep_of(middle))
            y_middle = y + (middle - r[i]) * slope
            slope = (y_middle - table.denoise(float(path.alpha_sigma(timestep)[0]) * y_middle, timestep)) / middle
        y = y + (down - r[i]) * slope
        if up > 0:
            y = y + options.s_noise * up * table.noise()
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="dpm_2_ancestral",
    summary="dpm_2 with fresh noise at every step",
    reference="Lu et al. 2022, arXiv:2206.00927; Karras et al. 2022, arXiv:2206.00364",
    order=2,
    build=dpm_2_ancestral,
    options=DPM2AncestralOptions(),
    stochastic=True,
    evaluations=2,
    paths=DIFFUSIONS,
)
