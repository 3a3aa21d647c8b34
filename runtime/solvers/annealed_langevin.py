"""Annealed Langevin dynamics: several Langevin steps at each noise level, then the next level.

Song & Ermon 2020, arXiv:2006.09011, algorithm 1; the step size is proportional to sigma² (section 3.4).
In y = x / alpha and r = sigma / alpha the score is (D - y) / r², so a step of size ``step_size`` r² is
y += step_size (D - y) + sqrt(2 step_size) r z. One last evaluation denoises.

diffusers: no scheduler.
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
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, check_order, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnealedLangevinOptions(Options):
    """``steps_per_level``: evaluations at each noise level. ``step_size``: share of the way to D a step goes.

    Noise of the level before shrinks by (1 - step_size)^steps_per_level; it should fall faster than the levels. The
    spread of the data comes out too wide by an amount that falls as 1 / (steps_per_level step_size) and 1 / levels.
    """

    steps_per_level: int = 5
    step_size: float = 0.2

    def __post_init__(self) -> None:
        check_order("steps_per_level", self.steps_per_level, 1000)
        if not 0 < self.step_size < 1:
            raise InvalidInput(f"step_size must lie in (0, 1), got {self.step_size}.")


def annealed_langevin(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: AnnealedLangevinOptions
) -> SolverTable:
    """Algorithm 1 over the levels of ``timesteps``, with the final denoising step."""
    points, n = finite_grid("annealed_langevin", path, timesteps), len(timesteps)
    steps = n * options.steps_per_level
    table = TableWriter("annealed_langevin", path, prediction, max_evaluations=steps + 1, max_noises=steps)
    y = table.x_T / points.alphas[0]
    for i in range(n):
        for _ in range(options.steps_per_level):
            y = y + options.step_size * (table.denoise(points.alphas[i] * y, timesteps[i]) - y)
            y = y + math.sqrt(2 * options.step_size) * points.ratios[i] * table.noise()
    y = table.denoise(points.alphas[n - 1] * y, timesteps[n - 1])
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="annealed_langevin",
    summary="Langevin steps at falling noise levels",
    reference="Song & Ermon 2020, arXiv:2006.09011",
    order=1,
    build=annealed_langevin,
    options=AnnealedLangevinOptions(),
    stochastic=True,
    evaluations=5,
    paths=DIFFUSIONS,
)
