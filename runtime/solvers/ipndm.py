"""iPNDM: DDIM steps along Adams-Bashforth means of eps, without a warm-up (Zhang & Chen 2023, arXiv:2204.13902).

The weights are those of equal steps in r = sigma / alpha, which no schedule has: the order is two. lms has the weights
of the actual steps.

diffusers: IPNDMScheduler on its own grid (alpha = sqrt(1 - sin^4), v predictions); equal on a grid that starts below
pure noise. At pure noise, where it starts, it divides by alpha = 1e-8 and loses the x_0 estimate of the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import finite_grid
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, check_order, recorded

Array = npt.NDArray[np.float64]

# Newest slope first, for orders 1 to 4.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IPNDMOptions(Options):
    """``order``: how many eps are averaged, 1 to 4."""

    order: int = 4

    def __post_init__(self) -> None:
        check_order("order", self.order, 4)


def ipndm(path: Path, prediction: Prediction, timesteps: Array, options: IPNDMOptions) -> SolverTable:
    """y' = y + (r' - r) eps', with y = x / alpha and eps' a weighted mean of the last eps."""
    points, n = finite_grid("ipndm", path, timesteps), len(timesteps)
    table = TableWriter("ipndm", path, prediction, max_evaluations=n)
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    history: list[Array] = []  # eps, newest first
    for i in range(n):
        history.insert(0, (y - table.denoise(alphas[i] * y, timesteps[i])) / r[i])
        for weight, eps in zip(ADAMS_BASHFORTH[min(i, options.order - 1)], history, strict=False):
            y = y + (r[i + 1] - r[i]) * weight * eps
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="ipndm",
    summary="linear multistep with the weights of equal steps",
    reference="Zhang & Chen 2023, arXiv:2204.13902",
    order=2,
    build=ipndm,
    options=IPNDMOptions(),
    paths=DIFFUSIONS,
)
