"""The variance-exploding path of score-SDE, against its definition and diffusers' ``ScoreSdeVeScheduler``."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import ScoreSdeVeScheduler
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import VE, path_from_json
from lehr.runtime.prediction import SCORE
from lehr.runtime.schedules import Spacing, timesteps

SIGMA = st.floats(0.01, 50.0)


@given(sigma=SIGMA, x_0=st.floats(-3, 3), eps=st.floats(-3, 3))
def test_the_score_of_a_known_sample_gives_it_back(sigma: float, x_0: float, eps: float) -> None:
    alpha_t, sigma_t = (float(value) for value in VE().alpha_sigma(sigma))
    x_t = alpha_t * x_0 + sigma_t * eps
    on_sample, on_output = SCORE.denoised_coefficients(alpha_t, sigma_t)
    assert (alpha_t, sigma_t) == (1.0, sigma)
    assert on_sample * x_t + on_output * (-eps / sigma) == pytest.approx(x_0, abs=1e-12 * (1 + sigma**2))


@given(sigma=SIGMA)
def test_the_network_is_fed_sigma(sigma: float) -> None:
    path = VE()
    assert path.timestep_of(sigma) == sigma
    assert path.init_noise_sigma(sigma) == sigma


def test_exponential_spacing_is_the_geometric_sequence_of_score_sde() -> None:
    scheduler = ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=30.0)
    scheduler.set_sigmas(17)  # its discrete_sigmas is float32
    ours = timesteps(VE(sigma_min=0.02, sigma_max=30.0), 17, Spacing.EXPONENTIAL)
    np.testing.assert_allclose(ours, scheduler.discrete_sigmas.flip(0).numpy(), rtol=1e-6)


def test_json_round_trip() -> None:
    path = VE(sigma_min=0.02, sigma_max=348.0)
    assert path_from_json(path.to_json()) == path
    assert (path.first_timestep, path.last_timestep) == (348.0, 0.02)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_noise_levels_must_be_positive_and_grow(low: float, high: float) -> None:
    with pytest.raises(InvalidInput, match="sigma_min < sigma_max"):
        VE(sigma_min=low, sigma_max=high)
