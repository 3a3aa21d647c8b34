"""Sensitivity: predicted effects of single layers against whole loops, and what is exact about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lehr.calibration.execute import OrtGraph, step_graph
from lehr.calibration.held_out import HeldOut, Settings
from lehr.calibration.layers import Kind, layers, weight_of
from lehr.calibration.pictures import draw_sensitivity
from lehr.calibration.sensitivity import (
    OutOfTime,
    Sensitivity,
    channel_scale,
    measure_sensitivity,
    spread,
)
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import InvalidInput

LEVELS = {"six bits": 31, "three bits": 3}


def rounded(bundle: Bundle, plan: Mapping[str, str]) -> ir.Model:
    """The step graph with some weights rounded to a few levels a matrix."""
    model = step_graph(bundle)
    for node in model.graph:
        if node.name in plan:
            value = weight_of(node)
            assert value is not None
            assert value.const_value is not None
            weight = value.const_value.numpy()
            scale = np.abs(weight).max() / LEVELS[plan[node.name]]
            value.const_value = ir.tensor((np.round(weight / scale) * scale).astype(np.float32), name=value.name)
    return model


@pytest.fixture(scope="module")
def held_out(dit_bundle: Path) -> HeldOut:
    return HeldOut(Bundle.open(dit_bundle), Settings(num=4, steps=5, batch=4, threads=1))


@pytest.fixture(scope="module")
def some(held_out: HeldOut) -> list[str]:
    found = [layer.name for layer in layers(step_graph(held_out.bundle)) if layer.kind is Kind.MATMUL]
    return found[::3]


@pytest.fixture(scope="module")
def found(held_out: HeldOut, some: list[str]) -> Sensitivity:
    return measure_sensitivity(
        held_out,
        {name: ["six bits", "three bits"] for name in some},
        lambda plan: rounded(held_out.bundle, plan),
        rounded(held_out.bundle, dict.fromkeys(some, "six bits")),
        points=3,
    )


def test_predicted_effects_of_layers_go_with_those_measured_in_whole_loops(
    held_out: HeldOut, some: list[str], found: Sensitivity
) -> None:
    measured = {}
    for name in some:
        for option in LEVELS:
            session = OrtGraph(rounded(held_out.bundle, {name: option}), threads=1)
            error = held_out.draw(session, range(4)) - held_out.track.final
            measured[name, option] = (error.astype(np.float64) ** 2).mean()
    effect = found.effect().mean(axis=-1)
    predicted = [effect[found.layers.index(n), found.options.index(o)] for n, o in measured]
    assert np.corrcoef(np.log(predicted), np.log(list(measured.values())))[0, 1] > 0.8


def test_fewer_bits_hurt_more_in_every_layer(found: Sensitivity) -> None:
    effect = found.effect().mean(axis=-1)
    assert (effect[:, found.options.index("three bits")] > effect[:, found.options.index("six bits")]).all()


def test_the_noise_of_all_layers_adds_up_to_that_of_the_whole_graph(found: Sensitivity) -> None:
    """The probe has every one of these layers in six bits, so their shares of its noise come to about one."""
    shares = found.noise()[:, found.options.index("six bits")].sum(axis=0)
    assert ((shares > 0.6) & (shares < 1.6)).all()


def test_nothing_answers_to_the_last_evaluation_so_its_response_is_its_gain(found: Sensitivity) -> None:
    assert found.points[-1] == 4
    assert np.allclose(found.response[-1], abs(found.gains[-1]), rtol=1e-3)


def test_every_evaluation_is_stood_for_once() -> None:
    for evaluations in (1, 2, 7, 20, 51):
        for points in (1, 3, 7, 100):
            chosen, weights = spread(evaluations, points)
            assert weights.sum() == evaluations
            assert len(chosen) == min(points, evaluations)
            assert chosen[0] == 0
            assert points == 1 or chosen[-1] == evaluations - 1


def test_channel_weights_have_mean_one_and_are_checked() -> None:
    assert channel_scale(np.array([1.0, 3.0]), 2, 4).shape == (1, 2, 1, 1)
    assert channel_scale(np.array([1.0, 3.0]), 2, 4).reshape(-1).tolist() == [0.5, 1.5]
    assert channel_scale(None, 2, 4) == 1
    for bad in ([1.0], [1.0, -1.0], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(InvalidInput, match="channel weights"):
            channel_scale(np.array(bad), 2, 4)


def test_a_deadline_in_the_past_is_told(held_out: HeldOut, some: list[str]) -> None:
    graph = rounded(held_out.bundle, {some[0]: "six bits"})
    with pytest.raises(OutOfTime, match="time limit"):
        measure_sensitivity(held_out, {some[0]: ["six bits"]}, lambda _: graph, graph, deadline=0.0)


def test_the_map_draws_a_row_a_module(found: Sensitivity) -> None:
    picture = draw_sensitivity(found, "digits-dit")
    assert picture.size[1] > 17 * len(found.layers)
    assert len(picture.getcolors(maxcolors=1 << 16) or []) > 10
