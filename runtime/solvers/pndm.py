"""PNDM: pseudo linear multistep, DDIM steps along averaged eps (Liu et al. 2022, arXiv:2202.09778, equations 12, 13).

The Adams-Bashforth weights are those of equal steps in sigma / alpha, which no schedule has: the order is two.

diffusers: PNDMScheduler with ``set_alpha_to_one=True``, "leading" spacing and epsilon predictions; ``skip_prk_steps``
is ``warmup`` "plms". With ``set_alpha_to_one=False`` (the Stable Diffusion configuration) it ends at the first training
timestep. Of other predictions it averages the network's outputs, which are not eps. It always steps by T // N, puts
Runge-Kutta's middle on a whole timestep, and fails below 4 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import finite_grid
from lehr.runtime.solvers.ipndm import ADAMS_BASHFORTH
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, recorded

Array = npt.NDArray[np.float64]


class Warmup(str, Enum):
    """How the first steps are made, before there is a history."""

    PLMS = "plms"  # one step of Heun's kind, then rising orders
    RUNGE_KUTTA = "runge_kutta"  # three steps of four evaluations each (the paper's)


@dataclass(frozen=True, slots=True, kw_only=True)
class PNDMOptions(Options):
    """``warmup``: how the history is built."""

    warmup: Warmup = Warmup.PLMS


def pndm(path: Path, prediction: Prediction, timesteps: Array, options: PNDMOptions) -> SolverTable:
    """x' = transfer(x, eps') with eps' a weighted mean of the last four eps."""
    n = len(finite_grid("pndm", path, timesteps))
    table = TableWriter("pndm", path, prediction, max_evaluations=n + 9)

    def eps_at(x: Array, timestep: float) -> Array:
        alpha, sigma = path.alpha_sigma(timestep)
        return np.asarray((x - float(alpha) * table.denoise(x, timestep)) / float(sigma))

    def transfer(x: Array, eps: Array, here: float, there: float | None) -> Array:
        alpha, sigma = path.alpha_sigma(here)
        alpha_next, sigma_next = (1.0, 0.0) if there is None else path.alpha_sigma(there)
        return np.asarray(float(alpha_next) / float(alpha) * (x - float(sigma) * eps) + float(sigma_next) * eps)

    x = table.x_T
    history: list[Array] = []  # eps, newest first
    for i in range(n):
        here, there = float(timesteps[i]), (float(timesteps[i + 1]) if i + 1 < n else None)
        history.insert(0, eps_at(x, here))
        if there is not None and options.warmup is Warmup.RUNGE_KUTTA and i < 3:
            middle = (here + there) / 2
            second = eps_at(transfer(x, history[0], here, middle), middle)
            third = eps_at(transfer(x, second, here, middle), middle)
            fourth = eps_at(transfer(x, third, here, there), there)
            mean = (history[0] + 2 * second + 2 * third + fourth) / 6
        elif there is not None and options.warmup is Warmup.PLMS and i == 0:
            mean = (history[0] + eps_at(transfer(x, history[0], here, there), there)) / 2
        else:
            mean = sum((w * eps for w, eps in zip(ADAMS_BASHFORTH[min(i, 3)], history, strict=False)), 0 * x)
        x = transfer(x, mean, here, there)
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="pndm",
    summary="pseudo linear multistep of equal timesteps (PLMS)",
    reference="Liu et al. 2022, arXiv:2202.09778",
    order=2,
    build=pndm,
    options=PNDMOptions(),
    paths=DIFFUSIONS,
)
