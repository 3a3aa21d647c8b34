"""DPM-Solver++(2M) for the reverse SDE (Lu et al. 2022, arXiv:2211.01095, section 5; ``eta`` as in k-diffusion).

diffusers: DPMSolverMultistepScheduler with ``algorithm_type="sde-dpmsolver++"``, ``solver_order=2``, which is eta 1
(see dpmpp_2m for the timesteps). It draws one noise more, for the last step, and multiplies it by zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._exponential import decay, mass, slope_weight
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import (
    Final,
    LowerOrderFinal,
    Options,
    Sampler,
    SolverType,
    check_positive,
    recorded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMpp2MSDEOptions(Options):
    """``eta``: 0 is dpmpp_2m, 1 the reverse SDE. ``s_noise`` multiplies the noise; the others as in dpmpp_2m."""

    eta: float = 1.0
    s_noise: float = 1.0
    solver_type: SolverType = SolverType.MIDPOINT
    lower_order_final: LowerOrderFinal = LowerOrderFinal.FEW_STEPS
    final: Final = Final.ZERO

    def __post_init__(self) -> None:
        check_positive("eta", self.eta, zero=True)
        check_positive("s_noise", self.s_noise)


def dpmpp_2m_sde(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: DPMpp2MSDEOptions
) -> SolverTable:
    """x' = (sigma'/sigma) e^{-eta h} x + alpha' (1 - e^{-(1 + eta) h}) D_2M + sigma' sqrt(1 - e^{-2 eta h}) z."""
    points, n = grid(path, timesteps, final=options.final), len(timesteps)
    table = TableWriter("dpmpp_2m_sde", path, prediction, max_evaluations=n, max_noises=n)
    lambdas, sigmas, alphas, rate = points.lambdas, points.sigmas, points.alphas, 1 + options.eta
    x, before = table.x_T, np.zeros_like(table.x_T)
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        h = lambdas[i + 1] - lambdas[i]
        x = sigmas[i + 1] / sigmas[i] * decay(h, options.eta) * x + alphas[i + 1] * mass(h, rate) * denoised
        second_order = points.history(i, 2) == 2 and not (i + 1 == n and options.lower_order_final.lowers(n))
        if second_order and math.isfinite(h):
            slope = (denoised - before) / (lambdas[i] - lambdas[i - 1])
            x = x + alphas[i + 1] * slope_weight(h, rate, options.solver_type) * h * slope
        std = options.s_noise * sigmas[i + 1] * math.sqrt(mass(h, 2 * options.eta))
        if std > 0:
            x = x + std * table.noise()
        before = denoised
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="dpmpp_2m_sde",
    summary="second order multistep on the reverse SDE",
    reference="Lu et al. 2022, arXiv:2211.01095",
    order=2,
    build=dpmpp_2m_sde,
    options=DPMpp2MSDEOptions(),
    stochastic=True,
)
