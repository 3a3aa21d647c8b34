"""DPM-Solver++(3M) for the reverse SDE, or the ODE at eta 0 (Lu et al. 2022, arXiv:2211.01095; k-diffusion's 3M SDE).

``exact`` integrates the parabola through the last three D exactly, which is third order. The code in circulation
(the authors', k-diffusion's, diffusers') halves the parabola's curvature: its ``D2`` is h² D''/2 where the integral's
coefficient belongs to h² D''. That leaves a second-order method with a small error; ``circulated`` reproduces it.

diffusers: DPMSolverMultistepScheduler with ``solver_order=3``: "dpmsolver++" is ``circulated`` at eta 0 (with
``solver_type`` as there for the second-order steps). "sde-dpmsolver++" has besides the wrong sign before the 1/2 in
the coefficient of ``D2`` and coincides with neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._exponential import decay, interpolation_weights, mass, slope_weight
from lehr.runtime.solvers._grid import Grid, grid
from lehr.runtime.solvers.sampler import (
    Final,
    LowerOrderFinal,
    Options,
    Sampler,
    SolverType,
    check_positive,
    recorded,
)

Array = npt.NDArray[np.float64]


class Curvature(str, Enum):
    """What the third-order step makes of D's second difference."""

    EXACT = "exact"
    CIRCULATED = "circulated"  # half of it


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMpp3MSDEOptions(Options):
    """``eta``, ``s_noise``: as in dpmpp_2m_sde. ``solver_type``: of the second-order steps at both ends."""

    eta: float = 1.0
    s_noise: float = 1.0
    curvature: Curvature = Curvature.EXACT
    solver_type: SolverType = SolverType.HEUN
    lower_order_final: LowerOrderFinal = LowerOrderFinal.FEW_STEPS
    final: Final = Final.ZERO

    def __post_init__(self) -> None:
        check_positive("eta", self.eta, zero=True)
        check_positive("s_noise", self.s_noise)


def dpmpp_3m_sde(path: Path, prediction: Prediction, timesteps: Array, options: DPMpp3MSDEOptions) -> SolverTable:
    """x' = (sigma'/sigma) e^{-eta h} x + alpha' Σ_k w_k D_k + sigma' sqrt(1 - e^{-2 eta h}) z."""
    points, n = grid(path, timesteps, final=options.final), len(timesteps)
    table = TableWriter("dpmpp_3m_sde", path, prediction, max_evaluations=n, max_noises=n)
    sigmas, alphas = points.sigmas, points.alphas
    x = table.x_T
    history: list[Array] = []
    for i in range(n):
        history.insert(0, table.denoise(x, timesteps[i]))
        h = points.lambdas[i + 1] - points.lambdas[i]
        x = sigmas[i + 1] / sigmas[i] * decay(h, options.eta) * x
        for weight, denoised in zip(_weights(points, i, n, options), history, strict=False):
            x = x + alphas[i + 1] * weight * denoised
        std = options.s_noise * sigmas[i + 1] * math.sqrt(mass(h, 2 * options.eta))
        if std > 0:
            x = x + std * table.noise()
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


def _weights(points: Grid, i: int, n: int, options: DPMpp3MSDEOptions) -> Array:
    """The weights of D_i, D_{i-1} and D_{i-2} in step i."""
    rate, lambdas = 1 + options.eta, points.lambdas
    h = lambdas[i + 1] - lambdas[i]
    order = points.history(i, 3)
    if options.lower_order_final.lowers(n):
        order = min(order, n - i)
    if order == 1 or not math.isfinite(h):
        return np.array([mass(h, rate)])
    if order == 2:
        slope = slope_weight(h, rate, options.solver_type) * h / (lambdas[i] - lambdas[i - 1])
        return np.array([mass(h, rate) + slope, -slope])
    nodes = lambdas[[i, i - 1, i - 2]]
    weights = interpolation_weights(nodes, lambdas[i], lambdas[i + 1], rate)
    if options.curvature is Curvature.CIRCULATED:
        # The parabola's second divided difference, times half of ∫ rate e^{rate (l - l')} (l - l_i)² dl.
        half = h**2 * (0.5 - slope_weight(h, rate, SolverType.HEUN) / (rate * h))
        differences = [1 / np.prod(nodes[k] - np.delete(nodes, k)) for k in range(3)]
        weights = weights - half * np.array(differences)
    return weights


SAMPLER = Sampler(
    name="dpmpp_3m_sde",
    summary="third order multistep on the reverse SDE; the ODE at eta 0",
    reference="Lu et al. 2022, arXiv:2211.01095",
    order=3,
    build=dpmpp_3m_sde,
    options=DPMpp3MSDEOptions(),
    stochastic=True,
)
