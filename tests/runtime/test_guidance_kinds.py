"""Guidance beyond the plain kind: against diffusers' formulas, in closed form, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance import (
    Guidance,
    Projection,
    classifier_free,
    classifier_guided,
    distilled,
    embedded_scale,
    guided,
)
from lehr.runtime.loop import sample
from lehr.runtime.paths import EDM, VP, LinearFlow
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, SCORE, V_PREDICTION, Prediction, PredictionKind
from lehr.runtime.prediction import SAMPLE as X_0
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import BATCH, DType, ModelSpec, Sampling, TensorSpec, Varies

X = np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)
C, U = {"c": np.array([1.0, 2.0, 3.0])}, {"c": np.zeros(3)}
KINDS = [
    (VP(), EPSILON),
    (VP(), V_PREDICTION),
    (VP(), X_0),
    (LinearFlow(), FLOW_PREDICTION),
    (EDM(), Prediction(kind=PredictionKind.EDM)),
]


def evaluate(x, timestep, conditions):
    """A network whose answer depends on everything it is given, element by element."""
    return (np.tanh(x) + timestep / 3e3 + np.sin(x * conditions["c"][:, None, None, None])).astype(x.dtype)


def table_of(path, prediction, steps=6):
    return solver_table("flow_euler" if isinstance(path, LinearFlow) else "euler", path, prediction, steps)


def denoised(table, i, x, output):
    return table.denoised_from_input[i] * x.astype(np.float64) + table.denoised_from_output[i] * output


def first_evaluation(guidance, path=VP(), prediction=V_PREDICTION, **more):  # noqa: B008
    table = table_of(path, prediction)
    network = guided(evaluate, C, U, table, guidance, **more)
    t = float(table.timesteps[0])
    return table, denoised(table, 0, X, network(X, t)), *(denoised(table, 0, X, evaluate(X, t, c)) for c in (C, U))


# --------------------------------------------------------------------------------------------------- each kind


@pytest.mark.parametrize(("path", "prediction"), KINDS)
def test_a_projection_that_keeps_everything_is_plain_guidance(path, prediction):
    table = table_of(path, prediction)
    keep = guided(evaluate, C, U, table, Guidance(scale=3.0, projection=Projection(parallel=1.0)))
    plain = classifier_free(evaluate, C, U, 3.0)
    x_T = (X * table.init_noise_sigma).astype(np.float32)
    assert sample(keep, table, x_T) == pytest.approx(sample(plain, table, x_T), rel=2e-4, abs=2e-4)


def apg(d_c, d_u, scale, eta, norm_threshold):
    """Algorithm 1 of the paper, written from its text for one sample."""
    difference = (d_c - d_u).ravel()
    if norm_threshold:
        difference = difference * min(1, norm_threshold / np.linalg.norm(difference))
    unit = d_c.ravel() / np.linalg.norm(d_c)
    parallel = (difference @ unit) * unit
    return (d_c.ravel() + (scale - 1) * (difference - parallel + eta * parallel)).reshape(d_c.shape)


@given(
    scale=st.floats(0, 12),
    eta=st.floats(0, 1),
    threshold=st.one_of(st.none(), st.floats(0.1, 20)),
)
def test_projected_guidance_is_the_papers_algorithm_sample_by_sample(scale, eta, threshold):
    if scale == 1:
        return
    setting = Guidance(scale=scale, projection=Projection(parallel=eta, norm_threshold=threshold))
    _, got, d_c, d_u = first_evaluation(setting)
    for k in range(len(X)):
        assert got[k] == pytest.approx(apg(d_c[k], d_u[k], scale, eta, threshold), rel=1e-4, abs=1e-4)


def test_momentum_adds_the_running_difference_and_is_forgotten_by_the_next_loop():
    table = table_of(VP(), X_0, 4)
    setting = Guidance(scale=2.0, projection=Projection(parallel=1.0, momentum=-0.5))
    network = guided(evaluate, C, U, table, setting)
    loops = []
    for _ in range(2):
        running, got = 0.0, []
        for t in table.timesteps.tolist():
            with_condition, without = evaluate(X, t, C), evaluate(X, t, U)
            running = (with_condition - without) - 0.5 * running
            got.append(network(X, t))
            assert got[-1] == pytest.approx(with_condition + running, rel=1e-5, abs=1e-5)
        loops.append(np.array(got))
    assert np.array_equal(*loops)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_on_a_network_that_predicts_the_sample_is_diffusers_function(phi):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    table = table_of(VP(), X_0)
    t = float(table.timesteps[0])
    with_condition, without = (torch.from_numpy(evaluate(X, t, c)) for c in (C, U))
    plain = without + 5.0 * (with_condition - without)
    expected = module.rescale_noise_cfg(plain, with_condition, guidance_rescale=phi).numpy()
    got = guided(evaluate, C, U, table, Guidance(scale=5.0, rescale=phi))(X, t)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_full_rescale_gives_the_conditional_estimates_deviation_on_any_prediction():
    for path, prediction in KINDS[:2]:
        _, got, d_c, _ = first_evaluation(Guidance(scale=6.0, rescale=1.0), path, prediction)
        assert got.std(axis=(1, 2, 3)) == pytest.approx(d_c.std(axis=(1, 2, 3)), rel=1e-3)


@pytest.mark.parametrize(("path", "prediction"), KINDS)
def test_an_interval_guides_where_the_noise_ratio_lies_in_it_and_saves_the_other_half(path, prediction):
    table = table_of(path, prediction, 8)
    with np.errstate(divide="ignore"):
        ratio = table.sigmas / table.alphas
    low, high = float(ratio[5]), float(ratio[2])
    batches = []

    def counted(x, timestep, conditions):
        batches.append(len(x))
        return evaluate(x, timestep, conditions)

    network = guided(counted, C, U, table, Guidance(scale=4.0, interval=(low, high)))
    outputs = [network(X, float(t)) for t in table.timesteps]
    assert batches == [3, 3, 6, 6, 6, 6, 3, 3]
    for i, t in enumerate(table.timesteps.tolist()):
        expected = classifier_free(evaluate, C, U, 4.0 if 2 <= i <= 5 else 1.0)(X, t)
        assert outputs[i] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_an_interval_up_to_infinity_holds_pure_noise():
    table = table_of(LinearFlow(), FLOW_PREDICTION)
    assert Guidance(scale=2.0, interval=(0.0, math.inf)).scales(table, 1.0).tolist() == [2.0] * 6
    assert Guidance(scale=2.0, interval=(0.0, 1e9)).scales(table, 1.0).tolist() == [1.0] + [2.0] * 5


def test_a_schedule_gives_each_evaluation_its_scale():
    table = table_of(VP(), EPSILON, 3)
    network = guided(evaluate, C, U, table, Guidance(schedule=(1.0, 2.0, 7.0)))
    for scale, t in zip((1.0, 2.0, 7.0), table.timesteps.tolist(), strict=True):
        assert network(X, t) == pytest.approx(classifier_free(evaluate, C, U, scale)(X, t), rel=1e-5, abs=1e-5)


def test_a_guide_of_its_own_gives_what_is_subtracted():
    def guide(x, timestep, conditions):
        assert conditions == {}
        return (0.1 * x).astype(x.dtype)

    table = table_of(VP(), EPSILON)
    t = float(table.timesteps[0])
    got = guided(evaluate, C, {}, table, Guidance(scale=3.0), guide=guide)(X, t)
    assert got == pytest.approx(0.1 * X + 3 * (evaluate(X, t, C) - 0.1 * X), rel=1e-5, abs=1e-5)


def test_a_learned_variance_beside_the_prediction_stays_the_conditions_own():
    def wide(x, timestep, conditions):
        return np.concatenate([evaluate(x, timestep, conditions), evaluate(x, 2 * timestep, conditions)], axis=1)

    table = table_of(VP(), EPSILON)
    t = float(table.timesteps[0])
    own = wide(X, t, C)[:, 2:]
    for network in (
        classifier_free(wide, C, U, 3.0),
        guided(wide, C, U, table, Guidance(scale=3.0, projection=Projection())),
    ):
        assert np.array_equal(network(X, t)[:, 2:], own)


def test_guidance_does_not_depend_on_the_batch():
    setting = Guidance(scale=4.0, rescale=0.5, projection=Projection(norm_threshold=2.0, momentum=-0.5))
    table = table_of(VP(), EPSILON)
    together = sample(guided(evaluate, C, U, table, setting), table, X)
    for k in range(3):
        one = guided(evaluate, {"c": C["c"][k : k + 1]}, {"c": U["c"][:1]}, table, setting)
        assert sample(one, table, X[k : k + 1])[0] == pytest.approx(together[k], rel=1e-5, abs=1e-5)


# ------------------------------------------------------------------------------------------- distilled, classifier


def distilled_spec(name: str, shape: tuple[int | str, ...]) -> ModelSpec:
    return ModelSpec(
        name="distilled",
        inputs=(
            TensorSpec(name="sample", shape=("batch", 2, 4, 4), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name=name, shape=shape, varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", 2, 4, 4), varies=Varies.SAMPLE),),
        dims=(BATCH,),
        path=VP(),
        prediction=EPSILON,
        sampling=Sampling(guidance_scale=3.5),
    )


@pytest.mark.parametrize("size", [256, 33])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_embedded_scale_is_diffusers_sinusoid(size, scale):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    w = torch.tensor([scale - 1, scale - 1], dtype=torch.float64)
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, w, embedding_dim=size, dtype=torch.float64).numpy()
    got = embedded_scale(distilled_spec("timestep_cond", ("batch", size)), scale, 2)["timestep_cond"]
    assert got == pytest.approx(expected, abs=2e-4)  # diffusers rounds the frequencies to float32, times 1000 w


def test_a_distilled_model_is_told_its_scale_at_each_evaluation():
    spec, told = distilled_spec("guidance", ("batch",)), []

    def network(feeds):
        told.append(feeds["guidance"].tolist())
        return {"output": np.zeros_like(feeds["sample"])}

    draw = Pipeline(Denoiser(spec, network))
    draw(Request(num_inference_steps=2, num=2))
    draw(Request(num_inference_steps=2, guidance_scale=6.0))
    draw(Request(num_inference_steps=2, guidance=Guidance(schedule=(2.0, 4.0))))
    assert told == [[3.5, 3.5], [3.5, 3.5], [6.0], [6.0], [2.0], [4.0]]
    with pytest.raises(InvalidInput, match="one estimate"):
        draw(Request(guidance=Guidance(rescale=0.5)))


def test_a_model_without_such_an_input_takes_no_embedded_scale():
    with pytest.raises(InvalidInput, match="takes no guidance scale"):
        embedded_scale(distilled_spec("text", ("batch", 4)), 2.0, 1)
    spec, setting = distilled_spec("guidance", ("batch",)), Guidance(schedule=(1.0,))
    with pytest.raises(InvalidInput, match="schedule"):
        distilled(evaluate, {}, spec, table_of(VP(), EPSILON), setting, batch=1, default_scale=1.0)


@pytest.mark.parametrize(("path", "prediction"), [kind for kind in KINDS if kind[1] is not FLOW_PREDICTION])
def test_classifier_guidance_adds_the_gradient_to_the_score(path, prediction):
    table = table_of(path, prediction)
    i, seen = 2, []

    def gradient(x_t, timestep, conditions):
        seen.append(x_t)
        return (np.cos(x_t) * conditions["y"]).astype(x_t.dtype)

    def network(x, timestep):
        return evaluate(x, timestep, C)

    both = classifier_guided(network, gradient, {"y": 2.0}, table, 1.5)
    for t in table.timesteps[:i].tolist():
        both(X, t)
    t, alpha, sigma = (float(v[i]) for v in (table.timesteps, table.alphas, table.sigmas))
    x_t = X / prediction.input_scale(alpha, sigma)
    outputs = (network(X, t), both(X, t))
    scores = [(alpha * denoised(table, i, X, output) - x_t) / sigma**2 for output in outputs]
    assert seen[-1] == pytest.approx(x_t, rel=1e-6)
    assert scores[1] - scores[0] == pytest.approx(1.5 * 2.0 * np.cos(x_t), rel=1e-3, abs=2e-3 / sigma)


def test_classifier_guidance_draws_the_class_of_a_gaussian_mixture():
    """Two classes at ±1 with exact scores: the guided unconditional network draws the conditional distribution."""
    path, spread = VP(), 0.2

    def parts(x, t):
        alpha, sigma = (float(v) for v in path.alpha_sigma(t))
        variance = alpha**2 * spread**2 + sigma**2
        weights = 1 / (1 + np.exp(-2 * alpha * x / variance))  # of the class at +1
        return alpha, sigma, variance, weights

    def network(x, t):
        alpha, sigma, variance, weights = parts(x.astype(np.float64), t)
        score = (alpha * (2 * weights - 1) - x) / variance
        return (-sigma * score).astype(x.dtype)

    def gradient(x, t, conditions):
        alpha, _, variance, weights = parts(x.astype(np.float64), t)
        return (2 * alpha / variance * (1 - weights)).astype(x.dtype)

    def conditional(x, t):
        alpha, sigma, variance, _ = parts(x.astype(np.float64), t)
        return (-sigma * (alpha - x) / variance).astype(x.dtype)

    x_T = np.random.default_rng(1).standard_normal((500, 1)).astype(np.float32)
    table = solver_table("ddim", path, EPSILON, 20)
    free = sample(network, table, x_T)
    assert abs(float((free > 0).mean()) - 0.5) < 0.1
    drawn = sample(classifier_guided(network, gradient, {}, table, 1.0), table, x_T)
    assert drawn == pytest.approx(sample(conditional, table, x_T), abs=1e-3)
    assert drawn.min() > 0


def test_classifier_guidance_refuses_pure_noise():
    table = table_of(LinearFlow(), FLOW_PREDICTION)
    with pytest.raises(InvalidInput, match="below pure noise"):
        classifier_guided(lambda x, t: x, evaluate, C, table, 1.0)


# ------------------------------------------------------------------------------------------------ in the pipeline


def class_spec(prediction=EPSILON, classes: int | None = 4, null: int | None = 4, name="toy", path=VP()) -> ModelSpec:  # noqa: B008
    labels = TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
    return ModelSpec(
        name=name,
        inputs=(
            TensorSpec(name="sample", shape=("batch", 1, 4, 4), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            *([labels] if classes else []),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", 1, 4, 4), varies=Varies.SAMPLE),),
        dims=(BATCH,),
        path=path,
        prediction=prediction,
        num_classes=classes,
        null_class=null,
    )


def toy(feeds):
    label = feeds.get("class_labels", np.full(len(feeds["sample"]), 4))
    return {"output": (np.tanh(feeds["sample"]) + 0.1 * label[:, None, None, None]).astype(np.float32)}


def test_a_guide_without_conditions_draws_what_the_null_class_draws():
    own = Pipeline(Denoiser(class_spec(), toy))(Request(num=4, guidance_scale=3.0, num_inference_steps=5))
    guide = Denoiser(class_spec(classes=None, null=None), toy)
    model = Denoiser(class_spec(null=None), toy)
    two = Pipeline(model, guide=guide)(Request(num=4, guidance_scale=3.0, num_inference_steps=5))
    assert two == pytest.approx(own, rel=1e-4, abs=1e-4)


def test_a_classifier_guides_an_unconditional_model_to_labels():
    seen = []

    def gradient(feeds):
        seen.append(feeds["class_labels"].tolist())
        return {"output": np.ones_like(feeds["sample"])}

    model = Denoiser(class_spec(classes=None, null=None), toy)
    classifier = Denoiser(class_spec(prediction=SCORE, null=None), gradient)
    pipeline = Pipeline(model, classifier=classifier)
    with_it = pipeline(Request(class_labels=[2, 1, 3], num_inference_steps=2, batch=2))
    without = pipeline(Request(class_labels=[2, 1, 3], num_inference_steps=2, classifier_scale=0.0))
    assert seen[:4] == [[2, 1], [2, 1], [3], [3]]
    assert (with_it > without).all()


@pytest.mark.parametrize(
    ("spec", "request_", "says"),
    [
        (class_spec(classes=None, null=None), {"guidance_scale": 3.0}, "no condition"),
        (class_spec(classes=None, null=None), {"guidance": Guidance(scale=3.0, rescale=0.5)}, "no condition"),
        (class_spec(classes=None, null=None), {"guidance": Guidance(schedule=(2.0,) * 20)}, "no condition"),
        (class_spec(null=None), {"guidance": Guidance(scale=3.0, interval=(0.1, 1.0))}, "no class"),
        (class_spec(), {"guidance": Guidance(interval=(0.1, 1.0))}, "scale 1 is none"),
        (class_spec(), {"guidance": Guidance(schedule=(1.0, 2.0))}, "2 scales"),
        (class_spec(), {"guidance_scale": math.nan}, "finite"),
        (class_spec(), {"guidance_scale": math.inf, "guidance": Guidance(rescale=0.5)}, "finite"),
        (class_spec(), {"guidance_scale": math.nan, "guidance": Guidance(interval=(0.1, 1.0))}, "finite"),
    ],
)
def test_guidance_that_a_model_cannot_take_is_refused(spec, request_, says):
    with pytest.raises(InvalidInput, match=says):
        Pipeline(Denoiser(spec, toy))(Request(**request_))


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": math.nan},
        {"schedule": (1.0, math.inf)},
        {"scale": 1.0, "schedule": (1.0,)},
        {"interval": (2.0, 1.0)},
        {"interval": (-1.0, 1.0)},
        {"rescale": 1.5},
    ],
)
def test_impossible_settings_are_refused_at_once(bad):
    with pytest.raises(InvalidInput):
        Guidance(**bad)


@pytest.mark.parametrize("bad", [{"parallel": 2.0}, {"norm_threshold": 0.0}, {"momentum": 1.0}])
def test_impossible_projections_are_refused_at_once(bad):
    with pytest.raises(InvalidInput):
        Projection(**bad)


def test_two_scales_in_one_request_are_refused():
    with pytest.raises(InvalidInput, match="one of them"):
        Request(guidance_scale=2.0, guidance=Guidance(scale=3.0))


@pytest.mark.parametrize(
    ("role", "other", "says"),
    [
        ("guide", class_spec(path=VP(beta_end=0.01)), "another path"),
        ("guide", class_spec(prediction=V_PREDICTION), "must predict the same"),
        ("classifier", class_spec(), "is a score"),
    ],
)
def test_a_second_network_that_does_not_fit_is_refused(role, other, says):
    with pytest.raises(InvalidInput, match=says):
        Pipeline(Denoiser(class_spec(), toy), **{role: Denoiser(other, toy)})


def test_a_guided_network_notices_another_loop():
    network = guided(evaluate, C, U, table_of(VP(), EPSILON), Guidance(scale=2.0))
    with pytest.raises(InvalidInput, match="the table that it was made for"):
        network(X, 3.0)
