"""Orders of convergence, measured on a Gaussian mixture whose score is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lehr.runtime.loop import Step, sample
from lehr.runtime.paths import EDM, VP, Curve, Interpolant, LinearFlow, Path
from lehr.runtime.prediction import SAMPLE
from lehr.runtime.schedules import Flow, Karras, Polyexponential, Schedule, Timesteps, timesteps
from lehr.runtime.solvers import sampler, solver_table
from lehr.runtime.solvers._exponential import interpolation_weights
from lehr.runtime.solvers.dpmpp_3m_sde import Curvature
from lehr.runtime.solvers.pndm import Warmup
from lehr.runtime.solvers.sa_solver import Weights
from lehr.runtime.solvers.sampler import SolverType
from lehr.runtime.solvers.unipc import BFunction

integrate = pytest.importorskip("scipy.integrate")

Array = npt.NDArray[np.float64]

SHARES, MEANS, SPREADS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.25, 0.35])
STARTS = np.linspace(-2, 2, 21)
STEPS = (64, 128)


def denoised(y: Array, r: float) -> Array:
    """E[x_0 | x_0 + r eps = y] of the mixture."""
    if math.isinf(r):
        return np.full_like(y, SHARES @ MEANS)
    y = y[..., None]
    variance = SPREADS**2 + r**2
    log = np.log(SHARES) - 0.5 * np.log(variance) - 0.5 * (y - MEANS) ** 2 / variance
    weight = np.exp(log - log.max(axis=-1, keepdims=True))
    mean = (MEANS * r**2 + y * SPREADS**2) / variance
    return np.asarray((weight * mean).sum(axis=-1) / weight.sum(axis=-1))


def network(path: Path) -> Callable[[Array, float], Array]:
    def evaluate(x: Array, timestep: float) -> Array:
        alpha, sigma = (float(value) for value in path.alpha_sigma(timestep))
        return denoised(x / alpha, sigma / alpha) if alpha else denoised(x, math.inf)

    return evaluate


@cache
def solution(path: Path, first: float, last: float) -> Array:
    """x at ``last`` on the probability-flow ODE from STARTS at ``first``, to 1e-12, in u = sigma / (alpha + sigma)."""
    alpha, sigma = path.alpha_sigma([first, last])
    u = sigma / (alpha + sigma)

    def slope(at: float, y: Array) -> Array:
        return (
            (y - denoised(y / (1 - at), at / (1 - at) if at < 1 else math.inf)) / at if at < 1 else y - SHARES @ MEANS
        )

    start = STARTS * path.init_noise_sigma(first) / (alpha[0] + sigma[0])
    run = integrate.solve_ivp(slope, u, start, method="DOP853", rtol=1e-12, atol=1e-13)
    return np.asarray(run.y[:, -1] * (alpha[1] + sigma[1]))


def error(name: str, path: Path, steps: int, schedule: Schedule, changes: dict[str, Any]) -> float:
    """Root mean square error at the last evaluation, so that the step to sigma 0 is left out."""
    options = replace(sampler(name).options, **changes)
    table = solver_table(name, path, SAMPLE, steps, spacing=schedule, options=options)
    visited = timesteps(path, steps, schedule)
    reached: list[Array] = []

    def keep(step: Step) -> None:
        if step.timestep == visited[-1]:
            reached.append(step.sample)

    sample(network(path), table, (STARTS * table.init_noise_sigma)[:, None], on_step=keep)
    return float(np.sqrt(np.mean((reached[-1][:, 0] - solution(path, visited[0], visited[-1])) ** 2)))


def order(name: str, path: Path, schedule: Callable[[int], Schedule], **changes: Any) -> float:
    coarse, fine = (error(name, path, steps, schedule(steps), changes) for steps in STEPS)
    return math.log(coarse / fine) / math.log(STEPS[1] / STEPS[0])


# ------------------------------------------------------------------------------------------------------- orders

PLACES: dict[str, tuple[Path, Callable[[int], Schedule]]] = {
    "edm": (EDM(sigma_min=0.02), lambda steps: Karras()),
    "edm-exponential": (EDM(sigma_min=0.02), lambda steps: Polyexponential()),
    "vp": (VP(), lambda steps: Timesteps(np.linspace(999, 20, steps).tolist())),
    "flow": (LinearFlow(), lambda steps: Flow(end=0.02)),
    "sit-gvp": (Interpolant(curve=Curve.GVP), lambda steps: Flow(end=0.02)),
}

FIRST = [
    ("euler", {}, ("edm", "vp", "flow", "sit-gvp")),
    ("ddim", {}, ("edm", "vp", "flow")),
    ("flow_euler", {}, ("flow", "sit-gvp")),
    ("euler_maruyama", {"eta": 0.0}, ("edm", "flow")),
]
SECOND = [
    ("heun", {}, ("edm", "vp")),
    ("edm_stochastic", {"s_churn": 0.0}, ("edm",)),
    ("flow_heun", {}, ("edm", "vp", "flow", "sit-gvp")),
    ("dpm_2", {}, ("edm", "vp")),
    ("dpm_2_ancestral", {"eta": 0.0}, ("edm",)),
    ("dpmpp_2m", {}, ("edm", "vp", "flow", "sit-gvp")),
    ("dpmpp_2m", {"solver_type": SolverType.HEUN}, ("edm", "vp")),
    ("dpmpp_2m_sde", {"eta": 0.0}, ("edm",)),
    ("dpmpp_2s", {}, ("edm", "vp")),
    ("dpmpp_2s", {"solver_type": SolverType.HEUN}, ("edm",)),
    ("dpmpp_sde", {"eta": 0.0}, ("edm", "vp")),
    ("lms", {"order": 2}, ("edm", "vp")),
    ("deis", {"order": 2}, ("edm", "vp")),
    ("unipc", {"order": 1}, ("edm-exponential",)),
    ("unipc", {"order": 2, "corrector_from": 999}, ("edm-exponential",)),
    ("sa_solver", {"eta": 0.0, "weights": Weights.SHORTENED}, ("edm",)),
    ("pndm", {}, ("edm-exponential",)),
    ("pndm", {"warmup": Warmup.RUNGE_KUTTA}, ("edm-exponential",)),
    ("ipndm", {}, ("edm-exponential",)),
]
AT_LEAST_TWO_AND_A_HALF = [
    ("dpmpp_3m_sde", {"eta": 0.0}, ("edm", "edm-exponential", "vp", "flow")),
    ("unipc", {}, ("edm", "edm-exponential", "flow", "sit-gvp")),
    ("unipc", {"solver_type": BFunction.BH1}, ("edm", "edm-exponential")),
    ("unipc", {"order": 3}, ("edm", "edm-exponential", "vp")),
    ("deis", {}, ("edm", "edm-exponential", "vp")),
    ("deis", {"order": 4}, ("edm-exponential",)),
    ("lms", {"order": 3}, ("edm", "vp")),
    ("lms", {}, ("edm", "vp")),
    ("sa_solver", {"eta": 0.0, "predictor_order": 3, "corrector_order": 4}, ("edm", "edm-exponential")),
]


def cases(table: list[tuple[str, dict[str, Any], tuple[str, ...]]]) -> list[Any]:
    return [
        pytest.param(name, changes, place, id="-".join([name, *(str(v) for v in changes.values()), place]))
        for name, changes, places in table
        for place in places
    ]


@pytest.mark.parametrize("name, changes, place", cases(FIRST))
def test_first_order_methods_are_of_first_order(name: str, changes: dict[str, Any], place: str) -> None:
    assert 0.9 < order(name, *PLACES[place], **changes) < 1.2


@pytest.mark.parametrize("name, changes, place", cases(SECOND))
def test_second_order_methods_are_of_second_order(name: str, changes: dict[str, Any], place: str) -> None:
    assert 1.8 < order(name, *PLACES[place], **changes) < 2.4


@pytest.mark.parametrize("name, changes, place", cases(AT_LEAST_TWO_AND_A_HALF))
def test_third_order_methods_reach_two_and_a_half(name: str, changes: dict[str, Any], place: str) -> None:
    assert order(name, *PLACES[place], **changes) > 2.5


def test_a_sampler_of_higher_order_is_closer_at_the_same_number_of_steps() -> None:
    path, schedule = PLACES["edm-exponential"]
    names = ["euler", "dpmpp_2m", "unipc"]
    errors = [error(name, path, 64, schedule(64), {}) for name in names]
    assert errors[0] > 10 * errors[1] > 50 * errors[2]


def test_the_circulated_third_order_formula_converges_at_second_order() -> None:
    # It halves the parabola's curvature; the exact integral of the same parabola is of third order.
    place = PLACES["edm-exponential"]
    assert order("dpmpp_3m_sde", *place, eta=0.0, curvature=Curvature.CIRCULATED) < 2.2
    assert order("dpmpp_3m_sde", *place, eta=0.0, curvature=Curvature.EXACT) > 2.9


def test_the_shortened_weights_of_sa_solver_leave_a_larger_error() -> None:
    path, schedule = PLACES["edm-exponential"]
    exact, shortened = (error("sa_solver", path, 32, schedule(32), {"eta": 0.0, "weights": w}) for w in Weights)
    assert shortened > 1.5 * exact


# ---------------------------------------------------------------------------------- the integrals they are made of


@pytest.mark.parametrize("rate", [-1.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("h", [1e-3, 0.4, 1.9, 2.1, 6.0])
def test_interpolation_weights_are_the_integrals_of_lagrange_polynomials(h: float, rate: float) -> None:
    start, end = -0.3, -0.3 + h
    for count in (1, 2, 3, 4):
        nodes = start - h * np.array([0.0, 0.9, 2.1, 2.8])[:count]

        def integrand(at: float, k: int, nodes: Array = nodes) -> float:
            others = np.delete(nodes, k)
            return float(rate * math.exp(rate * (at - end)) * np.prod((at - others) / (nodes[k] - others)))

        expected = [integrate.quad(integrand, start, end, args=(k,), epsabs=1e-14)[0] for k in range(count)]
        assert np.allclose(interpolation_weights(nodes, start, end, rate), expected, rtol=1e-9, atol=1e-13)
