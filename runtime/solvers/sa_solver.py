"""SA-Solver: stochastic Adams predictor and corrector (Xue et al. 2023, arXiv:2305.14267, algorithm 1).

In data prediction. Predictor and corrector of a step share its noise. The authors' code gives the slope of D the weight
q h²/2 in second-order predictors and correctors, in place of the integral: ``weights`` shortened. The order stays, but
at eta 1 and ten steps the spread of Gaussian data comes out ten times too large, so exact is the default here.

diffusers: SASolverScheduler is ``weights`` shortened with ``final`` sigma_min and a ``tau_func`` that is ``eta`` where
``tau_min`` <= sigma / alpha <= ``tau_max`` and 0 elsewhere; its default is 1 on timesteps 200 … 800. It draws its noise
at every step, used or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._exponential import decay, interpolation_weights, mass
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import (
    Final,
    LowerOrderFinal,
    Options,
    Sampler,
    check_order,
    check_positive,
    recorded,
)

Array = npt.NDArray[np.float64]


class Weights(str, Enum):
    """What second-order predictors and correctors make of D's slope."""

    EXACT = "exact"
    SHORTENED = "shortened"


@dataclass(frozen=True, slots=True, kw_only=True)
class SASolverOptions(Options):
    """``eta``: the paper's tau, 1 is the reverse SDE; it holds where tau_min <= sigma/alpha <= tau_max, else 0."""

    eta: float = 1.0
    tau_min: float = 0.0
    tau_max: float | None = None
    predictor_order: int = 2
    corrector_order: int = 2
    weights: Weights = Weights.EXACT
    lower_order_final: LowerOrderFinal = LowerOrderFinal.ALWAYS
    final: Final = Final.ZERO

    def __post_init__(self) -> None:
        check_positive("eta", self.eta, zero=True)
        check_order("predictor_order", self.predictor_order, 4)
        check_order("corrector_order", self.corrector_order, 4)
        check_positive("tau_min", self.tau_min, zero=True)
        if self.tau_max is not None and not self.tau_min <= self.tau_max:
            raise InvalidInput(f"need tau_min <= tau_max, got {self.tau_min} and {self.tau_max}.")

    def tau(self, ratio: float) -> float:
        """tau at a noise-to-signal ratio."""
        inside = self.tau_min <= ratio and (self.tau_max is None or ratio <= self.tau_max)
        return self.eta if inside else 0.0


def sa_solver(path: Path, prediction: Prediction, timesteps: Array, options: SASolverOptions) -> SolverTable:
    """x' = (sigma'/sigma) e^{-tau² h} x + alpha' Σ_k w_k D_k + sigma' sqrt(1 - e^{-2 tau² h}) z."""
    points, n = grid(path, timesteps, final=options.final), len(timesteps)
    table = TableWriter("sa_solver", path, prediction, max_evaluations=n, max_noises=n)
    lambdas = points.lambdas
    x = table.x_T
    carried, order, squared_tau = x, 1, 0.0  # the last step's decayed start with its noise, corrector order and tau²
    history: list[Array] = []  # D, newest first
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        history.insert(0, denoised)
        if i > 0 and math.isfinite(lambdas[i - 1]):
            nodes = np.array([lambdas[i - k] for k in range(order)])
            weights = _weights(nodes, lambdas[i - 1], lambdas[i], 1 + squared_tau, options.weights)
            x = carried + points.alphas[i] * _sum(weights, history)
        squared_tau, h = options.tau(points.ratios[i]) ** 2, lambdas[i + 1] - lambdas[i]
        carried = points.sigmas[i + 1] / points.sigmas[i] * decay(h, squared_tau) * x
        std = points.sigmas[i + 1] * math.sqrt(mass(h, 2 * squared_tau))
        if std > 0:
            carried = carried + std * table.noise()
        predictor, order = points.history(i, options.predictor_order), points.history(i + 1, options.corrector_order)
        if options.lower_order_final.lowers(n):
            predictor, order = min(predictor, n - i), min(order, n - i + 1)
        if predictor == 1 or not math.isfinite(h):
            weights = np.array([mass(h, 1 + squared_tau)])
        else:
            nodes = np.array([lambdas[i - k] for k in range(predictor)])
            weights = _weights(nodes, lambdas[i], lambdas[i + 1], 1 + squared_tau, options.weights)
        x = carried + points.alphas[i + 1] * _sum(weights, history)
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


def _sum(weights: Array, history: list[Array]) -> Array:
    """Σ_k w_k D_k over the newest D."""
    return np.asarray(np.tensordot(weights, np.array(history[: len(weights)]), axes=1))


def _weights(nodes: Array, start: float, end: float, rate: float, weights: Weights) -> Array:
    """Weights of D at ``nodes``; the shortened ones of two nodes give its slope the weight rate h²/2."""
    if len(nodes) != 2 or weights is Weights.EXACT:
        return interpolation_weights(nodes, start, end, rate)
    h, gap = end - start, nodes[0] - nodes[1]
    total = mass(h, rate)
    if nodes[0] == end:  # corrector: the slope is counted from the end, -(h mass - rate h²/2)
        return np.array([rate * h / 2, total - rate * h / 2])
    slope = rate * h**2 / 2 / gap
    return np.array([total + slope, -slope])


SAMPLER = Sampler(
    name="sa_solver",
    summary="stochastic Adams predictor-corrector on the reverse SDE, one evaluation a step",
    reference="Xue et al. 2023, arXiv:2305.14267",
    order=2,
    build=sa_solver,
    options=SASolverOptions(),
    stochastic=True,
)
