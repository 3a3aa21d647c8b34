"""Euler-Maruyama on the reverse SDE of a flow, with SiT's diffusion coefficients (Ma et al. 2024, arXiv:2401.08740).

In y = x / (alpha + sigma) and u = sigma / (alpha + sigma), in which every path is straight, any w(u) >= 0 gives an SDE
with the flow's marginals, run from u = 1 to 0: dy = (v - w s) du + sqrt(2 w) dB, v = (y - D) / u, s = -eps / u.

diffusers: no scheduler. SiT's own loop is this one on a linear interpolant, with ``last_step`` mean or denoise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Options, Sampler, check_positive, recorded


class Diffusion(str, Enum):
    """The diffusion coefficient w(u), SiT's ``--diffusion-form``."""

    CONSTANT = "constant"
    SBDM = "sbdm"  # that of the diffusion model with these marginals
    SIGMA = "sigma"
    LINEAR = "linear"
    DECREASING = "decreasing"
    INCREASING_DECREASING = "increasing-decreasing"


class LastStep(str, Enum):
    """What the step to u = 0 is."""

    DENOISE = "denoise"  # the x_0 estimate (SiT's "Tweedie" and "Euler", which agree)
    MEAN = "mean"  # the SDE's step without its noise


_COEFFICIENT: dict[Diffusion, Callable[[float], float]] = {
    Diffusion.CONSTANT: lambda u: 1.0,
    Diffusion.SBDM: lambda u: u / (1 - u) if u < 1 else math.inf,
    Diffusion.SIGMA: lambda u: u,
    Diffusion.LINEAR: lambda u: u,
    Diffusion.DECREASING: lambda u: 0.25 * (math.cos(math.pi * (1 - u)) + 1) ** 2,
    Diffusion.INCREASING_DECREASING: lambda u: math.sin(math.pi * (1 - u)) ** 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EulerMaruyamaOptions(Options):
    """``diffusion``: the form of w; ``eta``: multiplies it, SiT's ``--diffusion-norm``; 0 is flow_euler."""

    eta: float = 1.0
    diffusion: Diffusion = Diffusion.SIGMA
    last_step: LastStep = LastStep.DENOISE

    def __post_init__(self) -> None:
        check_positive("eta", self.eta, zero=True)


def euler_maruyama(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: EulerMaruyamaOptions
) -> SolverTable:
    """y' = y - (u - u') (v - w s) + sqrt(2 w (u - u')) z."""
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("euler_maruyama", path, prediction, max_evaluations=n, max_noises=n)
    u, scale = points.flow_times, points.alphas + points.sigmas
    y = table.x_T / scale[0]
    for i in range(n):
        denoised = table.denoise(scale[i] * y, timesteps[i])
        if i + 1 == n and options.last_step is LastStep.DENOISE:
            y = denoised
            break
        w = options.eta * _COEFFICIENT[options.diffusion](u[i]) if options.eta else 0.0
        if not math.isfinite(w):
            raise InvalidInput(
                f"diffusion {options.diffusion.value!r} is infinite at pure noise, where this schedule starts; "
                "start below it, or use diffusion 'sigma'."
            )
        velocity, step = (y - denoised) / u[i], u[i] - u[i + 1]
        score = -(y - (1 - u[i]) * denoised) / u[i] ** 2
        y = y - step * (velocity - w * score)
        if i + 1 < n and w > 0:
            y = y + math.sqrt(2 * w * step) * table.noise()
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="euler_maruyama",
    summary="first order on a flow's reverse SDE, with a choice of diffusion coefficients",
    reference="Ma et al. 2024, arXiv:2401.08740",
    order=1,
    build=euler_maruyama,
    options=EulerMaruyamaOptions(),
    stochastic=True,
)
