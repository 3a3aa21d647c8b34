"""Exponential integrators: the linear part of the diffusion ODE exactly, D by interpolation.

With lambda = ln(alpha / sigma) the solution from s to t (Lu et al. 2022, arXiv:2211.01095, proposition 4.1, here
with a share tau² of the reverse SDE's noise as in Xue et al. 2023, arXiv:2305.14267) is

    x_t = (sigma_t / sigma_s) e^{-tau² h} x_s + alpha_t ∫_s^t q e^{q (lambda - lambda_t)} D(lambda) dlambda
          + sigma_t sqrt(1 - e^{-2 tau² h}) z,           h = lambda_t - lambda_s,  q = 1 + tau².

A method is a choice of polynomial for D. At the ends h is infinite (alpha = 0 at pure noise, sigma = 0 at x_0);
there only a constant D is defined, and the formulas below hold with e^{-h} = 0.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lehr.runtime.solvers.sampler import SolverType

Array = npt.NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_NODES, _WEIGHTS = (_NODES - 1) / 2, _WEIGHTS / 2  # on [-1, 0]


def decay(h: float, rate: float) -> float:
    """e^{-rate h}; 1 at rate 0 even for infinite h."""
    return math.exp(-rate * h) if rate else 1.0


def mass(h: float, rate: float) -> float:
    """1 - e^{-rate h}, the integral's weight on a constant D; 0 at rate 0 even for infinite h."""
    return -math.expm1(-rate * h) if rate else 0.0


def slope_weight(h: float, rate: float, solver_type: SolverType) -> float:
    """(1/h) ∫_s^t rate e^{rate (l - t)} (l - s) dl, the integral's weight on h D'; or the midpoint rule's estimate."""
    if solver_type is SolverType.MIDPOINT:
        return 0.5 * mass(h, rate)
    return 1 - mass(h, rate) / (rate * h)


def interpolation_weights(nodes: Array, start: float, end: float, rate: float) -> Array:
    """w_j = ∫_start^end rate e^{rate (l - end)} L_j(l) dl for the Lagrange polynomials L_j of ``nodes``.

    Args:
        nodes: (p,) distinct and finite.
        start: finite.
        end: finite.
        rate: q above; -1 for integrals over r = e^{-lambda}.
    """
    h = end - start
    moments = _moments(rate * h, len(nodes))
    powers = ((nodes - end) / h)[None, :] ** np.arange(len(nodes))[:, None]
    return np.asarray(np.linalg.solve(powers, moments))


def _moments(rate_h: float, count: int) -> Array:
    """∫_{-1}^0 c e^{c v} v^k dv for k < count, c = rate_h; by parts, or by quadrature where that would cancel."""
    if abs(rate_h) < 2:
        integrand = rate_h * np.exp(rate_h * _NODES) * _WEIGHTS
        return np.array([np.sum(integrand * _NODES**k) for k in range(count)])
    moments = [-math.expm1(-rate_h)]
    for k in range(1, count):
        moments.append(-((-1) ** k) * math.exp(-rate_h) - k / rate_h * moments[-1])
    return np.array(moments)
