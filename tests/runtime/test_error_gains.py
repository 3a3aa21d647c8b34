"""Predicted errors of final samples against measured ones."""

from __future__ import annotations

import numpy as np
import pytest

from lehr.runtime.error_gains import direct, expected_rms, propagated, record, step_errors
from lehr.runtime.errors import InvalidInput
from lehr.runtime.loop import sample
from lehr.runtime.paths import VP, LinearFlow
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION
from lehr.runtime.solver_table import Clip
from lehr.runtime.solvers import solver_table

RNG = np.random.default_rng(0)
X_T = RNG.standard_normal((3, 6))
CASES = [("ddim", VP(), EPSILON), ("dpmpp_2m", VP(), EPSILON), ("flow_euler", LinearFlow(), FLOW_PREDICTION)]


def network(x, timestep):
    return np.tanh(0.9 * x + 0.3 * x.mean(axis=1, keepdims=True)) + timestep / 4e3


@pytest.mark.parametrize(("sampler", "path", "prediction"), CASES)
def test_the_direct_effect_is_exact_for_a_network_that_does_not_look(sampler, path, prediction):
    table = solver_table(sampler, path, prediction, 8)
    errors = [RNG.standard_normal(X_T.shape) for _ in range(len(table))]
    numbers = iter(range(len(table)))
    blind = record(lambda x, t: np.ones_like(x), table, X_T)
    moved = sample(lambda x, t: 1 + errors[next(numbers)], table, X_T)
    assert direct(table, errors) == pytest.approx(moved - blind.final, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("sampler", "path", "prediction"), CASES)
def test_the_propagated_effect_follows_small_errors_through_the_network(sampler, path, prediction):
    table = solver_table(sampler, path, prediction, 10)
    w = 1e-4

    def other(x, timestep):
        return network(x, timestep) + w * np.cos(3 * x)

    reference = record(network, table, X_T)
    errors = step_errors(other, table, reference)
    measured = sample(other, table, X_T) - reference.final
    followed = propagated(network, table, reference, errors)
    assert np.linalg.norm(followed - measured) < 0.03 * np.linalg.norm(measured)
    assert np.linalg.norm(direct(table, errors) - measured) > 3 * np.linalg.norm(followed - measured)


def test_a_linear_network_propagates_exactly_whatever_the_size():
    table = solver_table("ddim", VP(), EPSILON, 6)
    matrix = 0.4 * RNG.standard_normal((6, 6))
    reference = record(lambda x, t: x @ matrix, table, X_T)
    errors = step_errors(lambda x, t: x @ matrix + 0.3, table, reference)
    measured = sample(lambda x, t: x @ matrix + 0.3, table, X_T) - reference.final
    assert propagated(lambda x, t: x @ matrix, table, reference, errors) == pytest.approx(measured, rel=1e-7)


def test_errors_pass_a_clip_only_where_it_does_not_act():
    from dataclasses import replace

    plain = solver_table("ddim", VP(), EPSILON, 5)
    # The same loop written on clip(D): each output's share through D goes to the second bank.
    share = np.zeros_like(plain.outputs)
    table = replace(plain, clipped=share, clip=Clip(limit=0.5))
    share = np.tril(np.full((6, 5), 0.2), -1)
    table = replace(table, clipped=share)
    reference = record(network, table, X_T)
    errors = [1e-5 * RNG.standard_normal(X_T.shape) for _ in range(5)]
    numbers = iter(range(5))
    measured = sample(lambda x, t: network(x, t) + errors[next(numbers)], table, X_T) - reference.final
    followed = propagated(network, table, reference, errors)
    assert np.linalg.norm(followed - measured) < 0.05 * np.linalg.norm(measured)


def test_independent_errors_add_as_squares():
    table = solver_table("ddim", VP(), EPSILON, 5)
    errors = [RNG.standard_normal((2000, 4)) for _ in range(5)]
    measured = float(np.sqrt(np.mean(direct(table, errors) ** 2)))
    assert expected_rms(table, [1.0] * 5) == pytest.approx(measured, rel=0.05)


def test_another_number_of_errors_is_refused():
    with pytest.raises(InvalidInput, match="2 errors"):
        direct(solver_table("ddim", VP(), EPSILON, 3), [X_T, X_T])
