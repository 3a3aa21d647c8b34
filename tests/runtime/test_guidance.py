"""Classifier-free guidance as a batch of two."""

from __future__ import annotations

import numpy as np
import pytest

from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance import classifier_free


def evaluate(sample, timestep, conditions):
    """A network whose answer depends on everything it is given."""
    return (sample * timestep + conditions["c"][:, None] ** 2).astype(np.float32)


X = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
C, U = {"c": np.array([1.0, 2.0, 3.0])}, {"c": np.zeros(3)}


@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0, 7.5])
def test_it_extrapolates_from_the_unconditional_output(scale):
    without, with_condition = evaluate(X, 3.0, U), evaluate(X, 3.0, C)
    got = classifier_free(evaluate, C, U, scale)(X, 3.0)
    assert got == pytest.approx(without + scale * (with_condition - without), rel=1e-6)


def test_scale_one_evaluates_the_condition_alone():
    calls = []

    def counted(sample, timestep, conditions):
        calls.append(len(sample))
        return evaluate(sample, timestep, conditions)

    assert np.array_equal(classifier_free(counted, C, {}, 1.0)(X, 2.0), evaluate(X, 2.0, C))
    assert calls == [3]


def test_both_halves_run_in_one_evaluation():
    calls = []

    def counted(sample, timestep, conditions):
        calls.append(conditions["c"].tolist())
        return evaluate(sample, timestep, conditions)

    classifier_free(counted, C, U, 2.0)(X, 2.0)
    assert calls == [[0.0, 0.0, 0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize(("conditions", "scale", "says"), [({}, 2.0, "no condition"), (C, float("nan"), "finite")])
def test_guidance_that_cannot_act_is_refused(conditions, scale, says):
    with pytest.raises(InvalidInput, match=says):
        classifier_free(evaluate, conditions, U, scale)
