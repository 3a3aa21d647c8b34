"""DEIS: exponential Adams-Bashforth in eps (Zhang & Chen 2023, arXiv:2204.13902, equation 15; tAB in log rho).

diffusers: DEISMultistepScheduler, which ends at sigma_min (``final`` sigma_min), on the same integer timesteps (see
dpmpp_2m). With ``final`` zero, the default here, the last step is first order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._exponential import interpolation_weights
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Final, LowerOrderFinal, Options, Sampler, check_order, recorded

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DEISOptions(Options):
    """``order``: how many eps the polynomial in ln r runs through, 1 to 4."""

    order: int = 3
    lower_order_final: LowerOrderFinal = LowerOrderFinal.FEW_STEPS
    final: Final = Final.ZERO

    def __post_init__(self) -> None:
        check_order("order", self.order, 4)


def deis(path: Path, prediction: Prediction, timesteps: Array, options: DEISOptions) -> SolverTable:
    """x'/alpha' = x/alpha + ∫_r^r' p(ln s) ds, where p runs through the last eps."""
    points, n = grid(path, timesteps, final=options.final), len(timesteps)
    table = TableWriter("deis", path, prediction, max_evaluations=n)
    alphas, sigmas, lambdas = points.alphas, points.sigmas, points.lambdas
    x = table.x_T
    history: list[Array] = []  # eps, newest first
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        history.insert(0, (x - alphas[i] * denoised) / sigmas[i])
        order = points.history(i, options.order)
        if options.lower_order_final.lowers(n):
            order = min(order, n - i)
        if order == 1 or not math.isfinite(lambdas[i + 1]):
            x = alphas[i + 1] * denoised + sigmas[i + 1] * history[0]
            continue
        nodes = np.array([lambdas[i - k] for k in range(order)])
        # dr = -r dlambda and r = e^-lambda, so the integral is r' times the weights at rate -1.
        x = alphas[i + 1] / alphas[i] * x
        for weight, eps in zip(interpolation_weights(nodes, lambdas[i], lambdas[i + 1], -1.0), history, strict=False):
            x = x + sigmas[i + 1] * weight * eps
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="deis",
    summary="exponential multistep in eps, third order, one evaluation a step",
    reference="Zhang & Chen 2023, arXiv:2204.13902",
    order=3,
    build=deis,
    options=DEISOptions(),
)
