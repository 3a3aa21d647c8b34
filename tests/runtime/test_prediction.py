"""Predictions: four names, one score."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.errors import InvalidInput
from lehr.runtime.parity import score
from lehr.runtime.paths import EDM, VP, BetaSchedule, LinearFlow, path_from_json
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies

# VELOCITY belongs to an interpolant and is tested with the paths that have one.
KINDS = [kind for kind in PredictionKind if kind is not PredictionKind.VELOCITY]
PATHS = [VP(), VP(schedule=BetaSchedule.SCALED_LINEAR), VP(schedule=BetaSchedule.COSINE), LinearFlow(), EDM()]


def output_of(prediction: Prediction, x_0: np.ndarray, eps: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """What a perfect network of each kind returns, from the definitions in the papers."""
    x_t = alpha * x_0 + sigma * eps
    data = prediction.sigma_data
    return {
        PredictionKind.EPSILON: eps,
        PredictionKind.SAMPLE: x_0,
        PredictionKind.V_PREDICTION: alpha * eps - sigma * x_0,
        PredictionKind.FLOW_PREDICTION: eps - x_0,
        PredictionKind.SCORE: -eps / sigma,
        PredictionKind.EDM: (x_0 - data**2 / (sigma**2 + data**2) * x_t) * np.sqrt(sigma**2 + data**2) / (sigma * data),
    }[prediction.kind]


@pytest.mark.parametrize("kind", KINDS)
@given(alpha=st.floats(0.01, 1), sigma=st.floats(0.01, 50), seed=st.integers(0, 1000))
def test_a_perfect_network_of_any_prediction_gives_back_x_0_and_one_score(kind, alpha, sigma, seed):
    alpha = 1.0 if kind is PredictionKind.EDM else alpha
    x_0, eps = np.random.default_rng(seed).standard_normal((2, 8))
    prediction = Prediction(kind=kind)
    x_t, output = alpha * x_0 + sigma * eps, output_of(prediction, x_0, eps, alpha, sigma)
    on_sample, on_output = prediction.denoised_coefficients(alpha, sigma)
    assert on_sample * x_t + on_output * output == pytest.approx(x_0, abs=1e-8 * (1 + sigma / alpha))
    seen = prediction.input_scale(alpha, sigma) * x_t
    assert score(prediction, alpha, sigma, seen, output) == pytest.approx(-eps / sigma, rel=1e-6, abs=1e-6 / sigma**2)


@pytest.mark.parametrize("kind", KINDS)
def test_score_gain_is_the_derivative_of_the_score(kind):
    prediction, alpha, sigma = Prediction(kind=kind), 1.0, 0.7
    x, output = np.array([0.3]), np.array([0.2])
    moved = score(prediction, alpha, sigma, x, output + 1e-3) - score(prediction, alpha, sigma, x, output)
    assert abs(moved[0]) == pytest.approx(1e-3 * prediction.score_gain(alpha, sigma), rel=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.to_json()))
def test_timesteps_number_the_noise_levels_of_a_path(path):
    timesteps = np.linspace(path.first_timestep, path.first_timestep * 0.1, 7)
    alpha, sigma = path.alpha_sigma(timesteps)
    assert np.all(np.diff(np.where(alpha > 0, sigma / np.maximum(alpha, 1e-300), np.inf)) < 0)
    inside = alpha > 0
    assert path.timestep_of(sigma[inside] / alpha[inside]) == pytest.approx(timesteps[inside], abs=1e-6)
    assert path_from_json(path.to_json()) == path


def test_vp_preserves_variance_and_agrees_with_ddpm_at_integers():
    alpha, sigma = VP().alpha_sigma([0, 500, 999])
    assert alpha**2 + sigma**2 == pytest.approx(1)
    betas = np.linspace(1e-4, 0.02, 1000)
    assert alpha**2 == pytest.approx(np.cumprod(1 - betas)[[0, 500, 999]])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VP(beta_start=0.5, beta_end=0.1), "beta_start"),
        (lambda: VP(num_train_timesteps=0), "num_train_timesteps"),
        (lambda: EDM(sigma_min=2, sigma_max=1), "sigma_min"),
        (lambda: LinearFlow(num_train_timesteps=0), "num_train_timesteps"),
        (lambda: Prediction(kind=PredictionKind.EDM, sigma_data=0), "sigma_data"),
        (lambda: path_from_json({"kind": "spiral"}), "unknown path"),
        (lambda: Dim(name="height", default=30, multiple=8), "no multiple"),
        (lambda: Dim(name="not a name", default=1), "identifier"),
    ],
)
def test_impossible_values_are_refused_by_name(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()


# ---------------------------------------------------------------------------------------------------- ModelSpec


def spec(**changes) -> ModelSpec:
    side = Dim(name="side", default=8, min=4, max=16, multiple=4)
    fields = {
        "name": "toy",
        "inputs": (
            TensorSpec(name="sample", shape=("batch", 1, "side", "side"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        ),
        "outputs": (TensorSpec(name="output", shape=("batch", 1, "side", "side"), varies=Varies.SAMPLE),),
        "dims": (BATCH, side),
        "path": VP(),
        "prediction": Prediction(kind=PredictionKind.EPSILON),
        "num_classes": 3,
        "null_class": 3,
    }
    return ModelSpec(**{**fields, **changes})


def feeds(batch=2, side=8, **changes):
    arrays = {
        "sample": np.zeros((batch, 1, side, side), np.float32),
        "timestep": np.zeros(batch, np.float32),
        "class_labels": np.zeros(batch, np.int64),
    }
    return {**arrays, **changes}


def test_a_spec_survives_json():
    assert ModelSpec.from_json(spec().to_json()) == spec()


def test_feeds_that_fit_bind_the_dimensions():
    assert spec().check_feeds(feeds(batch=5, side=12)) == {"batch": 5, "side": 12}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"timestep": np.zeros(3, np.float32)}, "batch is 3"),
        ({"timestep": np.zeros(2, np.float64)}, "float64"),
        ({"sample": np.zeros((2, 1, 8, 12), np.float32)}, "side is 12"),
        ({"sample": np.zeros((2, 1, 6, 6), np.float32)}, "multiple of 4"),
        ({"sample": np.zeros((2, 1, 32, 32), np.float32)}, "between 4 and 16"),
        ({"sample": np.zeros((2, 2, 8, 8), np.float32)}, "expected"),
        ({"sample": np.zeros((2, 8, 8), np.float32)}, "expected"),
        ({"class_labels": np.array([0, 4])}, "class label 4"),
        ({"class_labels": np.array([-1, 0])}, "class label -1"),
        ({"surprise": np.zeros(2)}, "surprise"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_by_name(wrong, says):
    with pytest.raises(InvalidInput, match=says):
        spec().check_feeds(feeds(**wrong))


def test_an_output_of_another_size_than_the_input_is_caught():
    bound = spec().check_feeds(feeds(side=12))
    with pytest.raises(InvalidInput, match="expected"):
        spec().check_outputs({"output": np.zeros((2, 1, 8, 8), np.float32)}, bound)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_classes": None}, "come together"),
        ({"dims": (BATCH,)}, "dims declare only"),
        ({"inputs": spec().inputs[:1]}, "at least a sample and a timestep"),
        ({"inputs": spec().inputs[::-1]}, "must start with the sample"),
    ],
)
def test_a_contradictory_spec_is_refused(changes, says):
    with pytest.raises(InvalidInput, match=says):
        spec(**changes)
