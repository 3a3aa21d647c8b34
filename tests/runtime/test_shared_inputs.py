"""Inputs without a batch dimension: allowed for what a whole batch shares, refused for what differs by sample."""

from __future__ import annotations

import numpy as np
import pytest

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import FLOW_PREDICTION
from lehr.runtime.spec import BATCH, Dim, ModelSpec, TensorSpec, Varies


def spec(*, shape: tuple[int | str, ...], varies: Varies) -> ModelSpec:
    return ModelSpec(
        name="tokens",
        inputs=(
            TensorSpec(name="hidden_states", shape=("batch", "tokens", 4), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="ids", shape=shape, varies=varies),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", "tokens", 4), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="tokens", default=6)),
        path=LinearFlow(),
        prediction=FLOW_PREDICTION,
    )


@pytest.mark.parametrize("varies", [Varies.CONSTANT, Varies.PROMPT])
def test_constants_and_conditions_may_be_shared_by_the_batch(varies: Varies) -> None:
    model = spec(shape=("tokens", 3), varies=varies)
    feeds = {
        "hidden_states": np.zeros((5, 7, 4), np.float32),
        "timestep": np.zeros(5, np.float32),
        "ids": np.zeros((7, 3), np.float32),
    }
    assert model.check_feeds(feeds) == {"batch": 5, "tokens": 7}
    with pytest.raises(InvalidInput, match="tokens is 8"):
        model.check_feeds(feeds | {"ids": np.zeros((8, 3), np.float32)})
    assert ModelSpec.from_json(model.to_json()) == model


@pytest.mark.parametrize(
    ("shape", "varies"),
    [
        (("tokens", 3), Varies.TIMESTEP),
        (("tokens", 3), Varies.SAMPLE),
        (("tokens", "batch"), Varies.PROMPT),
    ],
)
def test_inputs_that_differ_by_sample_need_the_batch_first(shape: tuple[int | str, ...], varies: Varies) -> None:
    with pytest.raises(InvalidInput, match="'batch' as its first dimension"):
        spec(shape=shape, varies=varies)
