"""What stochastic samplers draw: the mean and covariance of data known in closed form.

For Gaussian data D is affine in x, so a table maps its noises affinely to the sample and the law of the sample
follows without drawing. A mixture of two-dimensional Gaussians, where it is not, is sampled.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lehr.runtime.loop import sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.paths import EDM, VP, LinearFlow, Path
from lehr.runtime.prediction import SAMPLE
from lehr.runtime.schedules import Flow, Karras, Schedule, Spacing
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import sampler, samplers, solver_table
from lehr.runtime.solvers.ddpm import Variance
from lehr.runtime.solvers.euler_maruyama import Diffusion, LastStep
from lehr.runtime.solvers.predictor_corrector import Predictor
from lehr.runtime.solvers.sa_solver import Weights

Array = npt.NDArray[np.float64]

MEAN, SPREAD = 0.4, 0.6


def posterior_mean(x: Array, alpha: float, sigma: float) -> Array:
    """D for N(MEAN, SPREAD²) on coefficients (1, noises …)."""
    total = (alpha * SPREAD) ** 2 + sigma**2
    denoised = alpha * SPREAD**2 / total * x
    denoised[0] += MEAN * sigma**2 / total
    return denoised


def consistency(x: Array, alpha: float, sigma: float) -> Array:
    """The probability-flow ODE's map to x_0, which a consistency model learns."""
    scale = SPREAD / math.sqrt((alpha * SPREAD) ** 2 + sigma**2)
    clean = scale * x
    clean[0] += MEAN * (1 - scale * alpha)
    return clean


def law(table: SolverTable, network: Any = posterior_mean) -> tuple[float, float]:
    """(mean, standard deviation) of the final sample, started from the path's own marginal."""
    noises = np.eye(2 + table.num_noises)[2:]
    start = np.zeros(2 + table.num_noises)
    start[:2] = table.alphas[0] * MEAN, math.hypot(table.alphas[0] * SPREAD, table.sigmas[0])
    outputs = np.zeros((len(table), len(start)))
    for i in range(len(table)):
        row = table.start[i] * start + table.outputs[i] @ outputs + table.noises[i] @ noises
        outputs[i] = network(row, table.alphas[i], table.sigmas[i])
    final = table.start[-1] * start + table.outputs[-1] @ outputs + table.noises[-1] @ noises
    return float(final[0]), float(np.linalg.norm(final[1:]))


def table_of(name: str, path: Path, steps: int, changes: dict[str, Any]) -> SolverTable:
    spacing: Spacing | Schedule = Spacing.AUTO
    if isinstance(path, EDM):
        spacing = Karras()
    elif isinstance(path, LinearFlow):
        spacing = Flow(end=0.005)
    options = replace(sampler(name).options, **changes)
    return solver_table(name, path, SAMPLE, steps, spacing=spacing, options=options)


# ------------------------------------------------------------------------------------------------ the law, exactly

EDM_PATH, VP_PATH, FLOW = EDM(), VP(), LinearFlow()
# Sampler, options, path, largest error of the standard deviation at 160 steps, order in the number of steps.
REVERSE_SDES: list[tuple[str, dict[str, Any], Path, float, float]] = [
    ("ddpm", {}, EDM_PATH, 0.03, 1),
    ("ddpm", {}, VP_PATH, 0.03, 1),
    ("ddpm", {"variance": Variance.FIXED_LARGE}, VP_PATH, 0.01, 1),
    ("ddim", {"eta": 1.0}, FLOW, 0.02, 1),
    ("ddim", {"eta": 0.5}, FLOW, 0.01, 1),
    ("euler_ancestral", {}, EDM_PATH, 0.03, 1),
    ("dpm_2_ancestral", {}, EDM_PATH, 0.002, 2),
    ("dpmpp_sde", {}, EDM_PATH, 0.001, 2),
    ("dpmpp_2s", {"eta": 1.0}, EDM_PATH, 0.002, 2),
    ("dpmpp_2m_sde", {}, EDM_PATH, 0.002, 2),
    ("dpmpp_2m_sde", {"eta": 0.5}, EDM_PATH, 0.002, 2),
    ("dpmpp_2m_sde", {}, FLOW, 0.002, 2),
    ("dpmpp_3m_sde", {}, EDM_PATH, 0.0005, 1),
    ("sa_solver", {"eta": 0.5}, EDM_PATH, 0.001, 2),
    ("sa_solver", {}, FLOW, 0.003, 2),
    ("edm_stochastic", {"s_noise": 1.0}, EDM_PATH, 0.005, 1),
    ("predictor_corrector", {}, EDM_PATH, 0.02, 1),
    ("predictor_corrector", {}, VP_PATH, 0.01, 1),
    ("predictor_corrector", {"corrector_steps": 0}, EDM_PATH, 0.03, 1),
    ("predictor_corrector", {"predictor": Predictor.ANCESTRAL, "snr": 0.05}, EDM_PATH, 0.03, 0.9),
    *[("euler_maruyama", {"diffusion": form}, VP_PATH, 0.01, 1) for form in Diffusion],
    *[("euler_maruyama", {"diffusion": form}, FLOW, 0.005, 1) for form in (Diffusion.SIGMA, Diffusion.DECREASING)],
    ("euler_maruyama", {"eta": 0.3}, FLOW, 0.005, 1),
    ("euler_maruyama", {"last_step": LastStep.MEAN}, FLOW, 0.005, 1),
]


@pytest.mark.parametrize("name, changes, path, bound, order", REVERSE_SDES)
def test_a_reverse_sde_draws_the_data_and_converges(
    name: str, changes: dict[str, Any], path: Path, bound: float, order: float
) -> None:
    coarse, fine = (law(table_of(name, path, steps, changes)) for steps in (80, 160))
    assert fine[0] == pytest.approx(MEAN, abs=1e-9)
    assert abs(fine[1] - SPREAD) < bound
    assert math.log2(abs(coarse[1] - SPREAD) / abs(fine[1] - SPREAD)) > order - 0.2


def test_langevin_dynamics_settle_on_the_data_with_more_steps_at_each_level() -> None:
    # What is left of a wider level's spread falls as one over the time spent at each level.
    path, errors = EDM(sigma_min=0.05, sigma_max=3), []
    for steps in (10, 20, 40):
        mean, spread = law(table_of("annealed_langevin", path, 20, {"step_size": 0.1, "steps_per_level": steps}))
        assert mean == pytest.approx(MEAN, abs=1e-9)
        errors.append(abs(spread - SPREAD))
    assert errors[0] > 1.8 * errors[1] > 1.8 * 1.8 * errors[2]
    assert errors[2] < 0.04 * SPREAD


def test_the_shortened_weights_of_sa_solver_blow_up_the_spread_at_few_steps() -> None:
    spreads = [law(table_of("sa_solver", EDM_PATH, 10, {"weights": weights}))[1] / SPREAD for weights in Weights]
    assert spreads[0] < 2 < 8 < spreads[1]


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_true_consistency_function_is_sampled_exactly_at_any_number_of_steps(steps: int) -> None:
    for name, path in (("multistep_consistency", VP_PATH), ("multistep_consistency", FLOW), ("lcm", FLOW)):
        assert law(table_of(name, path, steps, {}), consistency) == pytest.approx((MEAN, SPREAD), abs=1e-9)
    # LCM's boundary condition keeps a share c_skip = (0.5 / 10 t)² of x.
    assert law(table_of("lcm", VP_PATH, steps, {}), consistency) == pytest.approx((MEAN, SPREAD), abs=1e-5)


# ------------------------------------------------------------------------------------------------ the law, sampled

SHARES = np.array([0.25, 0.75])
CENTRES = np.array([[-1.2, 0.5], [0.8, -0.3]])
COVARIANCES = np.array([[[0.20, 0.08], [0.08, 0.10]], [[0.15, -0.05], [-0.05, 0.30]]])
DATA_MEAN = SHARES @ CENTRES
DATA_COVARIANCE = (
    np.einsum("k,kij->ij", SHARES, COVARIANCES)
    + np.einsum("k,ki,kj->ij", SHARES, CENTRES, CENTRES)
    - np.outer(DATA_MEAN, DATA_MEAN)
)
COUNT = 2500


def mixture_network(path: Path) -> Any:
    def denoised(x: Array, timestep: float) -> Array:
        alpha, sigma = (float(value) for value in path.alpha_sigma(timestep))
        offsets = x[:, None, :] - alpha * CENTRES  # (B, K, 2)
        totals = alpha**2 * COVARIANCES + sigma**2 * np.eye(2)
        solved = np.einsum("kij,bkj->bki", np.linalg.inv(totals), offsets)
        log = np.log(SHARES) - 0.5 * np.log(np.linalg.det(totals)) - 0.5 * np.einsum("bki,bki->bk", offsets, solved)
        weight = np.exp(log - log.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        return np.einsum("bk,bki->bi", weight, CENTRES + alpha * np.einsum("kij,bkj->bki", COVARIANCES, solved))

    return denoised


MIXTURE_CASES: list[tuple[str, dict[str, Any], Path, int]] = [
    ("ddpm", {}, VP_PATH, 250),
    ("ddim", {"eta": 1.0}, FLOW, 150),
    ("euler_ancestral", {}, VP_PATH, 250),
    ("dpm_2_ancestral", {}, EDM_PATH, 80),
    ("dpmpp_sde", {}, EDM_PATH, 60),
    ("dpmpp_2s", {"eta": 1.0}, EDM_PATH, 60),
    ("dpmpp_2m_sde", {}, EDM_PATH, 80),
    ("dpmpp_3m_sde", {}, EDM_PATH, 60),
    ("sa_solver", {}, EDM_PATH, 80),
    ("edm_stochastic", {"s_noise": 1.0}, EDM_PATH, 100),
    ("annealed_langevin", {"steps_per_level": 15}, EDM(sigma_min=0.05, sigma_max=3), 20),
    ("predictor_corrector", {}, VP_PATH, 120),
    ("euler_maruyama", {}, FLOW, 120),
]


@pytest.mark.parametrize("name, changes, path, steps", MIXTURE_CASES, ids=[case[0] for case in MIXTURE_CASES])
def test_a_mixture_of_gaussians_comes_out_with_its_mean_and_covariance(
    name: str, changes: dict[str, Any], path: Path, steps: int
) -> None:
    table = table_of(name, path, steps, changes)
    x_T = batch_normal(11, range(1), (COUNT, 2))[0].astype(np.float64) * table.init_noise_sigma

    def noise(j: int) -> Array:
        return batch_normal(11, range(1), (COUNT, 2), stream=1 + j)[0].astype(np.float64)

    drawn = sample(mixture_network(path), table, x_T, injected=noise)
    # Four and a half standard errors; the discretisation's share of the spread is some 2 % at these step counts.
    error = 4.5 * np.sqrt(np.diag(DATA_COVARIANCE) / COUNT)
    assert np.all(np.abs(drawn.mean(axis=0) - DATA_MEAN) < error)
    fourth = np.sqrt((np.outer(np.diag(DATA_COVARIANCE), np.diag(DATA_COVARIANCE)) + DATA_COVARIANCE**2) / COUNT)
    bias = 0.04 * np.sqrt(np.outer(np.diag(DATA_COVARIANCE), np.diag(DATA_COVARIANCE)))
    assert np.all(np.abs(np.cov(drawn.T) - DATA_COVARIANCE) < 4.5 * fourth + bias)
    left = np.mean(drawn @ (CENTRES[0] - CENTRES[1]) > 0.5 * np.sum(CENTRES[0] ** 2 - CENTRES[1] ** 2))
    assert abs(left - SHARES[0]) < 0.06


def test_every_stochastic_sampler_is_held_against_a_known_law() -> None:
    consistency_samplers = {"lcm", "multistep_consistency"}
    jumps = {"tcd"}  # made for networks that jump along the trajectory; at eta 0 it is ddim, held in test_solvers
    covered = {case[0] for case in REVERSE_SDES} | {"annealed_langevin"} | consistency_samplers | jumps
    assert covered == {name for name, one in samplers().items() if one.stochastic}
