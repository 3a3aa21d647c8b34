"""Layers timed one by one: every kind of layer in every option that the library takes, and none in others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from lehr.calibration import timing
from lehr.calibration.budgeted import applied
from lehr.calibration.configs import to_nearest
from lehr.calibration.cost_model import Source
from lehr.calibration.execute import step_graph
from lehr.calibration.held_out import HeldOut, Settings
from lehr.calibration.layers import Kind, layers
from lehr.calibration.observers import observe
from lehr.calibration.options import as_options, options_of
from lehr.calibration.problem import KEEP
from lehr.calibration.timing import few_rows, measured_costs
from lehr.calibration.trajectories import collect
from lehr.runtime.bundle import Bundle

RECIPES = ("int8", "int8-asym-attention", "int4-weight")


def test_layers_are_timed_in_what_the_library_takes(
    dit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(timing, "ROUNDS", 2)
    bundle = Bundle.open(dit_bundle)
    found = layers(step_graph(bundle))
    kinds = {kind: next(one for one in found if one.kind is kind) for kind in (Kind.CONV, Kind.MATMUL, Kind.ATTENTION)}
    chosen = tuple(kinds.values())
    choices = {
        layer: {option: to_nearest(config) for option, config in able.items()}
        for layer, able in options_of(chosen, RECIPES).items()
    }
    statistics = observe(bundle, collect(bundle, num=2, steps=2, threads=1, folder=tmp_path), threads=1)
    apply = applied(bundle, choices, statistics)
    track = HeldOut(bundle, Settings(num=2, steps=2, batch=2, threads=1)).track
    feeds = few_rows(track.calls[0].feeds, len(track.calls[0].sample))

    def graph(option: str) -> Callable[[], ir.Model]:
        plan = {layer: option for layer, able in choices.items() if option in able and option != KEEP}
        return lambda: apply(plan)

    options = (KEEP, *RECIPES)
    costs = measured_costs(
        {option: graph(option) for option in options}, chosen, choices, feeds, reference=KEEP, threads=1
    )
    assert costs is not None
    assert costs.source is Source.MEASURED
    conv, product, attention = (costs.values[layer.name] for layer in chosen)
    assert set(attention) == {KEEP, "int8-asym-attention"}
    assert set(product) == set(options)
    assert set(conv) == {KEEP, "int8", "int8-asym-attention"}  # one channel is no block of 32: OpenVINO refuses it
    assert all(value > 0 for values in costs.values.values() for value in values.values())
    left = {layer: {o: c for o, c in able.items() if o in costs.values[layer]} for layer, able in choices.items()}
    whole = {name: able["int4-weight"] for name, able in choices.items() if "int4-weight" in able}
    assert as_options(whole, left) == {kinds[Kind.MATMUL].name: "int4-weight"}
