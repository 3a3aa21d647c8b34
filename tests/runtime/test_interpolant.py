"""SiT's interpolants and the velocity prediction, against the definitions by numerical differentiation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Curve, Interpolant, LinearFlow, path_from_json
from lehr.runtime.prediction import FLOW_PREDICTION, Prediction, PredictionKind

CURVES = pytest.mark.parametrize("curve", list(Curve))
INSIDE = st.floats(0.02, 0.98)


def velocity_of(curve: Curve) -> Prediction:
    return Prediction(kind=PredictionKind.VELOCITY, interpolant=Interpolant(curve=curve))


@CURVES
@given(t=INSIDE, x_0=st.floats(-3, 3), eps=st.floats(-3, 3))
def test_velocity_gives_back_the_clean_sample_it_was_made_from(curve: Curve, t: float, x_0: float, eps: float) -> None:
    path, h = Interpolant(curve=curve), 1e-6

    def point(time: float) -> float:
        alpha, sigma = path.alpha_sigma(time)
        return float(alpha * x_0 + sigma * eps)

    velocity = (point(t + h) - point(t - h)) / (2 * h)
    alpha, sigma = (float(value) for value in path.alpha_sigma(t))
    on_sample, on_output = velocity_of(curve).denoised_coefficients(alpha, sigma)
    assert on_sample * point(t) + on_output * velocity == pytest.approx(x_0, abs=1e-7)


@CURVES
@given(t=st.floats(0, 1, exclude_max=True))
def test_timestep_is_recovered_from_the_noise_to_signal_ratio(curve: Curve, t: float) -> None:
    path = Interpolant(curve=curve)
    alpha, sigma = path.alpha_sigma(t)
    with np.errstate(divide="ignore", over="ignore"):
        assert path.timestep_of(sigma / alpha) == pytest.approx(t, abs=1e-9)


@CURVES
def test_noise_lies_at_zero_and_data_at_one(curve: Curve) -> None:
    path = Interpolant(curve=curve)
    alpha, sigma = path.alpha_sigma([path.first_timestep, 1.0])
    assert alpha[0] < 0.01
    assert sigma[0] > 0.99
    assert (alpha[1], sigma[1]) == (1, 0)
    assert path.init_noise_sigma(path.first_timestep) == pytest.approx(math.hypot(alpha[0], sigma[0]))


@CURVES
def test_velocity_coefficients_are_finite_at_both_ends_and_the_clean_end_returns_the_sample(curve: Curve) -> None:
    alpha, sigma = Interpolant(curve=curve).alpha_sigma(np.array([0.0, 1.0]))
    on_sample, on_output = velocity_of(curve).denoised_coefficients(alpha, sigma)
    assert np.isfinite([*on_sample, *on_output]).all()
    assert (on_sample[1], on_output[1]) == (1, 0)


@given(t=INSIDE)
def test_straight_velocity_is_the_negated_flow_prediction_of_the_same_point(t: float) -> None:
    alpha, sigma = (float(value) for value in Interpolant().alpha_sigma(t))
    flow_alpha, flow_sigma = (float(value) for value in LinearFlow(num_train_timesteps=1).alpha_sigma(1 - t))
    assert (alpha, sigma) == pytest.approx((flow_alpha, flow_sigma))
    straight = velocity_of(Curve.LINEAR).denoised_coefficients(alpha, sigma)
    flow = FLOW_PREDICTION.denoised_coefficients(alpha, sigma)
    assert straight == pytest.approx((flow[0], -flow[1]))


@CURVES
def test_path_and_prediction_survive_json(curve: Curve) -> None:
    path = Interpolant(curve=curve, beta_min=0.2, beta_max=10.0)
    assert path_from_json(path.to_json()) == path
    prediction = Prediction(kind=PredictionKind.VELOCITY, interpolant=path)
    assert Prediction.from_json(prediction.to_json()) == prediction


def test_velocity_without_a_path_and_a_path_without_velocity_are_refused() -> None:
    with pytest.raises(InvalidInput, match="come together"):
        Prediction(kind=PredictionKind.VELOCITY)
    with pytest.raises(InvalidInput, match="come together"):
        Prediction(kind=PredictionKind.EPSILON, interpolant=Interpolant())
    with pytest.raises(InvalidInput, match="must be an interpolant"):
        Prediction.from_json({"kind": "velocity", "interpolant": LinearFlow().to_json()})


def test_interpolant_refuses_betas_out_of_order() -> None:
    with pytest.raises(InvalidInput, match="beta_min"):
        Interpolant(curve=Curve.VP, beta_min=20.0, beta_max=0.1)
