"""DPM-Solver++(2M): second-order multistep in log-SNR (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

diffusers: DPMSolverMultistepScheduler with ``algorithm_type="dpmsolver++"``, ``solver_order=2`` on the same integer
timesteps (its "linspace" and "leading" spacings divide by N + 1, ours by N and N - 1). With Karras sigmas it rounds
the timestep it tells the network; here the network is told the exact one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._exponential import slope_weight
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Final, LowerOrderFinal, Options, Sampler, SolverType, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMpp2MOptions(Options):
    """``solver_type``: weight of D's slope. ``lower_order_final``: order of the last step, for ``final`` sigma_min."""

    solver_type: SolverType = SolverType.MIDPOINT
    lower_order_final: LowerOrderFinal = LowerOrderFinal.FEW_STEPS
    final: Final = Final.ZERO


def dpmpp_2m(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: DPMpp2MOptions
) -> SolverTable:
    """x' = (sigma'/sigma) x - alpha' (e^-h - 1) D_2M, with lambda = ln(alpha/sigma) and h = lambda' - lambda.

    D_2M = D + h/(2 h_before) (D - D_before) for the midpoint type. The first step has no history and a step to
    sigma 0 has an infinite h; both are first order.
    """
    points, n = grid(path, timesteps, final=options.final), len(timesteps)
    table = TableWriter("dpmpp_2m", path, prediction, max_evaluations=n)
    lambdas, sigmas, alphas = points.lambdas, points.sigmas, points.alphas
    x, before = table.x_T, np.zeros_like(table.x_T)
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        h = lambdas[i + 1] - lambdas[i]
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-h) * denoised
        second_order = points.history(i, 2) == 2 and not (i + 1 == n and options.lower_order_final.lowers(n))
        if second_order and math.isfinite(h):
            slope = (denoised - before) / (lambdas[i] - lambdas[i - 1])
            x = x + alphas[i + 1] * slope_weight(h, 1.0, options.solver_type) * h * slope
        before = denoised
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="dpmpp_2m",
    summary="second order multistep, one evaluation a step",
    reference="Lu et al. 2022, arXiv:2211.01095",
    order=2,
    build=dpmpp_2m,
    options=DPMpp2MOptions(),
)
