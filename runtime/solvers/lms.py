"""Linear multistep: Adams-Bashforth with the actual, uneven steps in r = sigma / alpha (k-diffusion's "LMS").

diffusers: LMSDiscreteScheduler, where ``timestep_spacing`` is "leading" or "trailing" (see euler). It integrates the
polynomials by adaptive quadrature in float32; here they are integrated exactly.
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
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(3)  # exact for polynomials up to degree 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LMSOptions(Options):
    """``order``: how many slopes the polynomial runs through, 1 to 6."""

    order: int = 4

    def __post_init__(self) -> None:
        check_order("order", self.order, 6)


def lms(path: Path, prediction: Prediction, timesteps: Array, options: LMSOptions) -> SolverTable:
    """y' = y + ∫_r^r' p(s) ds, where p runs through the last slopes (y - D) / r."""
    points, n = finite_grid("lms", path, timesteps), len(timesteps)
    table = TableWriter("lms", path, prediction, max_evaluations=n)
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    slopes: list[Array] = []
    for i in range(n):
        slopes.append((y - table.denoise(alphas[i] * y, timesteps[i])) / r[i])
        order = min(options.order, i + 1)
        for k, weight in enumerate(_weights(r[i + 1 - order : i + 1][::-1], r[i], r[i + 1])):
            y = y + weight * slopes[-1 - k]
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


def _weights(nodes: Array, start: float, end: float) -> list[float]:
    """∫_start^end of each Lagrange polynomial of ``nodes``."""
    half = (end - start) / 2
    at = start + half * (_NODES + 1)
    weights = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        values = np.prod((at[:, None] - others) / (node - others), axis=1)
        weights.append(float(half * np.sum(_WEIGHTS * values)))
    return weights


SAMPLER = Sampler(
    name="lms",
    summary="linear multistep in sigma, fourth order, one evaluation a step",
    reference="Karras et al. 2022, arXiv:2206.00364; Adams-Bashforth with variable steps",
    order=4,
    build=lms,
    options=LMSOptions(),
    paths=DIFFUSIONS,
)
