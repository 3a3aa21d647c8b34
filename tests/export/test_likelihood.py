"""Likelihoods of Gaussians, whose probability-flow ODE is solved in closed form on every path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lehr.export.likelihood import dequantise, log_likelihood
from lehr.runtime.errors import ExportFailed, InvalidInput
from lehr.runtime.paths import EDM, VE, VP, Curve, Interpolant, LinearFlow
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, SCORE, V_PREDICTION, Prediction, PredictionKind

STD, MEAN = 0.6, 0.3
GVP = Interpolant(curve=Curve.GVP)
CASES = [
    (VP(), EPSILON),
    (VP(zero_terminal_snr=True), V_PREDICTION),
    (LinearFlow(), FLOW_PREDICTION),
    (EDM(), Prediction(kind=PredictionKind.EDM)),
    (VE(), SCORE),
    (GVP, Prediction(kind=PredictionKind.VELOCITY, interpolant=GVP)),
]


def data(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return MEAN + STD * torch.randn(count, 1, 3, 3, generator=generator, dtype=torch.float64)


def network(path, prediction, covariance=None):
    """The exact denoiser of N(MEAN, STD²), or of a covariance (9, 9), as a network of ``prediction``."""
    own = STD**2 * torch.eye(9, dtype=torch.float64) if covariance is None else covariance

    def run(sample, timestep):
        alpha, sigma = (float(value) for value in path.alpha_sigma(float(timestep[0])))
        x_t = (sample / float(prediction.input_scale(alpha, sigma))).flatten(1)
        total = alpha**2 * own + sigma**2 * torch.eye(9, dtype=torch.float64)
        denoised = MEAN + alpha * (x_t - alpha * MEAN) @ torch.linalg.solve(total, own)
        on_sample, on_output = prediction.denoised_coefficients(alpha, sigma)
        return ((denoised - on_sample * x_t) / on_output).reshape(sample.shape)

    return run


def solved(path, x_0):
    """log p under the model: the ODE maps (y - mean) by the ratio of standard deviations, to the path's prior."""
    (a, s), (A, S) = ([float(v) for v in path.alpha_sigma(t)] for t in (path.last_timestep, path.first_timestep))
    growth = math.sqrt((A**2 * STD**2 + S**2) / (STD**2 + (s / a) ** 2))
    x_T = A * MEAN + growth * (x_0 - MEAN)
    prior = path.init_noise_sigma(path.first_timestep)
    log = -0.5 * (x_T / prior) ** 2 - math.log(prior) - 0.5 * math.log(2 * math.pi) + math.log(growth)
    return log.flatten(1).sum(1).numpy()


@pytest.mark.parametrize(("path", "prediction"), CASES, ids=lambda value: type(value).__name__)
def test_the_likelihood_of_a_gaussian_is_its_closed_form(path, prediction):
    x_0 = data()
    got = log_likelihood(network(path, prediction), path, prediction, x_0, rtol=1e-6, atol=1e-6)
    assert got.log_prob == pytest.approx(solved(path, x_0), abs=2e-4)
    log = -0.5 * ((x_0 - MEAN) / STD) ** 2 - math.log(STD) - 0.5 * math.log(2 * math.pi)
    assert got.log_prob == pytest.approx(log.flatten(1).sum(1).numpy(), abs=0.1)  # the prior and the last noise


def test_more_probes_bring_a_correlated_gaussian_nearer():
    root = torch.randn(9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = 0.2 * torch.eye(9, dtype=torch.float64) + 0.03 * root @ root.T
    x_0, path = data(2), LinearFlow()
    true = torch.distributions.MultivariateNormal(torch.full((9,), MEAN, dtype=torch.float64), covariance)
    expected = true.log_prob(x_0.flatten(1)).numpy()
    errors = []
    for probes in (1, 32):
        runs = [
            log_likelihood(
                network(path, FLOW_PREDICTION, covariance), path, FLOW_PREDICTION, x_0, probes=probes, seed=k
            ).log_prob
            - expected
            for k in range(3)
        ]
        errors.append(float(np.sqrt(np.mean(np.square(runs)))))
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.5


def test_bits_per_dimension_of_uniform_data_are_its_levels():
    path, x_0 = VP(), data(1)
    got = log_likelihood(network(path, EPSILON), path, EPSILON, x_0)
    uniform = type(got)(log_prob=np.array([9 * math.log(0.5)]), evaluations=1, dimensions=9)  # density of [-1, 1]
    assert uniform.bits_per_dim() == pytest.approx([8.0])
    assert got.bits_per_dim() == pytest.approx(-(got.log_prob / 9 / math.log(2)) + 7)


def test_dequantised_data_stays_in_its_cells():
    x_0 = torch.zeros(2, 1, 8, 8)
    spread = dequantise(x_0, seed=0)
    assert float(spread.abs().max()) <= 1 / 256
    assert float(spread.std()) == pytest.approx(2 / 256 / math.sqrt(12), rel=0.15)


def test_what_has_no_likelihood_is_refused():
    x_0 = data(1)
    with pytest.raises(InvalidInput, match="probe"):
        log_likelihood(network(VP(), EPSILON), VP(), EPSILON, x_0, probes=0)
    with pytest.raises(InvalidInput, match="0 samples"):
        log_likelihood(network(VP(), EPSILON), VP(), EPSILON, x_0[:0])
    for wrong in ({"rtol": 0.0}, {"atol": -1.0}, {"rtol": math.nan}):
        with pytest.raises(InvalidInput, match="positive tolerances"):
            log_likelihood(network(VP(), EPSILON), VP(), EPSILON, x_0, **wrong)
    with pytest.raises(InvalidInput, match="pure noise"):
        log_likelihood(network(LinearFlow(), EPSILON), LinearFlow(), EPSILON, x_0)
    with pytest.raises(ExportFailed, match="not finite"):
        log_likelihood(lambda x, t: x * math.nan, VP(), EPSILON, x_0)
