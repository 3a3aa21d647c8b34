"""UniPC: a unified predictor-corrector (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6, data prediction).

The corrector uses the evaluation that the next step needs anyway, so it is free and raises the order by one.

diffusers: UniPCMultistepScheduler with ``predict_x0=True`` and ``final_sigmas_type`` as ``final``, on the same integer
timesteps (see dpmpp_2m). On flows that start at pure noise it moves the start to sigma = 1 - 1e-6; here the start is
left out of the interpolation.
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
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Final, LowerOrderFinal, Options, Sampler, check_order, recorded

Array = npt.NDArray[np.float64]


class BFunction(str, Enum):
    """B(h) of the paper's equation 8."""

    BH1 = "bh1"  # h
    BH2 = "bh2"  # e^h - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class UniPCOptions(Options):
    """``order``: of the predictor; ``corrector_from``: the first step that is corrected, N or more for none."""

    order: int = 2
    solver_type: BFunction = BFunction.BH2
    corrector_from: int = 0
    lower_order_final: LowerOrderFinal = LowerOrderFinal.ALWAYS
    final: Final = Final.ZERO

    def __post_init__(self) -> None:
        check_order("order", self.order, 5)
        check_order("corrector_from + 1", self.corrector_from + 1, 10_000)


def unipc(path: Path, prediction: Prediction, timesteps: Array, options: UniPCOptions) -> SolverTable:
    """UniP-p, then UniC-p once D is known at the new point."""
    points, n = grid(path, timesteps, final=options.final), len(timesteps)
    table = TableWriter("unipc", path, prediction, max_evaluations=n)
    lambdas, shrink = points.lambdas, points.sigmas[1:] / points.sigmas[:-1]
    x, start, order = table.x_T, table.x_T, 1
    history: list[Array] = []  # D, newest first

    def step(i: int, nodes: Array, outputs: list[Array], rhos: Array) -> Array:
        """From point i to i + 1, with D known at ``nodes``, r = (lambda - lambda_i) / h, beside point i itself."""
        h = lambdas[i + 1] - lambdas[i]
        total = math.expm1(-h) * outputs[0]
        for rho, r, output in zip(rhos, nodes, outputs[1:], strict=True):
            total = total + _b(-h, options.solver_type) * rho / r * (output - outputs[0])
        return np.asarray(shrink[i] * start - points.alphas[i + 1] * total)

    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        if i > options.corrector_from and _correctable(lambdas[i] - lambdas[i - 1], options.solver_type):
            nodes = np.append(_nodes(lambdas, i - 1, order), 1.0)
            rhos = np.array([0.5]) if order == 1 else _rhos(nodes, lambdas[i - 1] - lambdas[i], options.solver_type)
            x = step(i - 1, nodes, [history[0], *history[1:order], denoised], rhos)
        history.insert(0, denoised)
        start, order = x, points.history(i, options.order)
        if options.lower_order_final.lowers(n):
            order = min(order, n - i)
        if not math.isfinite(lambdas[i + 1]):
            order = 1
        nodes = _nodes(lambdas, i, order)
        rhos = np.array([0.5]) if order == 2 else _rhos(nodes, lambdas[i] - lambdas[i + 1], options.solver_type)
        x = step(i, nodes, history[:order], rhos)
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


def _nodes(lambdas: Array, i: int, order: int) -> Array:
    """(order - 1,) where D is known before point i, in steps from it."""
    earlier = np.array([lambdas[i - 1 - k] for k in range(order - 1)])
    return np.asarray((earlier - lambdas[i]) / (lambdas[i + 1] - lambdas[i]))


def _b(hh: float, solver_type: BFunction) -> float:
    return float(hh) if solver_type is BFunction.BH1 else math.expm1(hh)


def _correctable(h: float, solver_type: BFunction) -> bool:
    """From pure noise h is infinite; e^-h - 1 is not, and the corrector is then the trapezoidal rule in 1 / r."""
    return math.isfinite(h) or solver_type is BFunction.BH2


def _rhos(nodes: Array, hh: float, solver_type: BFunction) -> Array:
    """Solve Σ_k rho_k r_k^(j-1) = j! phi_{j+1}(hh) hh / B(hh), j = 1 … p (equation 11)."""
    if not len(nodes):
        return nodes
    phi, factorial = math.expm1(hh) / hh - 1, 1
    right = []
    for j in range(1, len(nodes) + 1):
        right.append(phi * factorial / _b(hh, solver_type))
        factorial *= j + 1
        phi = phi / hh - 1 / factorial
    return np.asarray(np.linalg.solve(nodes[None, :] ** np.arange(len(nodes))[:, None], np.array(right)))


SAMPLER = Sampler(
    name="unipc",
    summary="multistep predictor with a free corrector, third order, one evaluation a step",
    reference="Zhao et al. 2023, arXiv:2302.04867",
    order=3,
    build=unipc,
    options=UniPCOptions(),
)
