"""The pipeline on a network written in numpy: what it feeds, what it refuses, and that batches change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lehr.runtime.denoiser import Denoiser, synthetic_conditions
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.paths import VP
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.prediction import EPSILON, V_PREDICTION
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import BATCH, DType, ModelSpec, Sampling, TensorSpec, Varies


def spec(classes: int | None = 4, null: int | None = 4) -> ModelSpec:
    labels = TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
    return ModelSpec(
        name="toy",
        inputs=(
            TensorSpec(name="sample", shape=("batch", 1, 4, 4), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            *([labels] if classes else []),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", 1, 4, 4), varies=Varies.SAMPLE),),
        dims=(BATCH,),
        path=VP(),
        prediction=EPSILON,
        num_classes=classes,
        null_class=null,
        sampling=Sampling(guidance_scale=2.0 if null else 1.0),
    )


def network(feeds):
    label = feeds.get("class_labels", np.zeros(len(feeds["sample"])))
    output = np.tanh(feeds["sample"]) + 0.1 * label[:, None, None, None] + feeds["timestep"][:, None, None, None] / 5e3
    return {"output": output.astype(np.float32)}


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("dpmpp_2m", 0.0), ("euler", 0.0)])
def test_the_same_seed_draws_the_same_samples_at_any_batch(sampler, eta):
    pipeline = Pipeline(Denoiser(spec(), network))
    drawn = [
        pipeline(Request(num=16, seed=3, sampler=sampler, eta=eta, num_inference_steps=9, batch=batch))
        for batch in (1, 4, 16)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1e-5
    assert np.abs(drawn[0] - drawn[2]).max() <= 1e-5
    assert drawn[0].shape == (16, 1, 4, 4)
    assert drawn[0].dtype == np.float32


def test_other_seeds_and_samples_draw_other_noise():
    pipeline = Pipeline(Denoiser(spec(), network))
    first, second = (pipeline(Request(num=2, seed=seed, class_labels=[1])) for seed in (0, 1))
    assert np.abs(first - second).max() > 0.1
    assert np.abs(first[0] - first[1]).max() > 0.1


def test_labels_are_used_in_turn_and_default_to_all_classes():
    seen = []

    def spy(feeds):
        seen.append(feeds["class_labels"].tolist())
        return network(feeds)

    pipeline = Pipeline(Denoiser(spec(), spy))
    pipeline(Request(num=5, class_labels=[2, 0], guidance_scale=1.0, num_inference_steps=1))
    pipeline(Request(num=6, guidance_scale=1.0, num_inference_steps=1))
    pipeline(Request(class_labels=[1], num_inference_steps=1))
    assert seen == [[2, 0, 2, 0, 2], [0, 1, 2, 3, 0, 1], [4, 1]]


def test_on_step_sees_every_evaluation_and_can_cancel():
    seen = []

    def stop(first, step):
        seen.append((first, step.index))
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline(Denoiser(spec(), network))(Request(num=2, num_inference_steps=10), on_step=stop)
    assert seen == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("model", "request_", "says"),
    [
        (spec(), {"class_labels": [4]}, "class label 4"),
        (spec(), {"class_labels": [-1]}, "class label -1"),
        (spec(), {"sampler": "eular"}, "Did you mean 'euler'"),
        (spec(), {"num_inference_steps": 0}, "steps"),
        (spec(), {"sampler": "euler", "eta": 0.5}, "eta"),
        (spec(), {"sampler": "flow_euler"}, "LinearFlow"),
        (spec(null=None), {"guidance_scale": 3.0}, "no class"),
        (spec(classes=None, null=None), {"guidance_scale": 3.0}, "no condition"),
        (spec(classes=None, null=None), {"class_labels": [1]}, "not class-conditional"),
        (spec(), {"table": solver_table("ddim", VP(), V_PREDICTION, 3)}, "v_prediction"),
    ],
)
def test_a_request_the_model_cannot_meet_is_refused(model, request_, says):
    with pytest.raises(InvalidInput, match=says):
        Pipeline(Denoiser(model, network))(Request(**request_))


@pytest.mark.parametrize("bad", [{"num": 0}, {"batch": 0}, {"batch": 4000}])
def test_an_impossible_request_is_refused_at_once(bad):
    with pytest.raises(InvalidInput):
        Request(**bad)


def test_an_engine_that_overflows_is_reported_with_the_sample():
    def broken(feeds):
        output = network(feeds)["output"]
        output[1] = np.nan
        return {"output": output}

    with pytest.raises(RunFailed, match="sample 1"):
        Pipeline(Denoiser(spec(), broken))(Request(num=3, guidance_scale=1.0))


def test_an_engine_with_a_size_baked_in_is_caught():
    with pytest.raises(RunFailed, match="baked in"):
        Pipeline(Denoiser(spec(), lambda feeds: {"output": np.zeros((1, 1, 4, 4), np.float32)}))(Request(num=2))


def test_synthetic_conditions_depend_on_the_sample_and_not_on_the_batch():
    text = TensorSpec(name="encoder_hidden_states", shape=("batch", 7, 5), varies=Varies.PROMPT)
    base = spec(classes=None, null=None)
    model = ModelSpec(
        name="text",
        inputs=(*base.inputs, text),
        outputs=base.outputs,
        dims=base.dims,
        path=base.path,
        prediction=base.prediction,
    )
    few, many = (synthetic_conditions(model, batch, seed=5)["encoder_hidden_states"] for batch in (2, 6))
    assert np.array_equal(few, many[:2])
    assert not np.array_equal(few[0], few[1])
