"""The search for the first layer that parts: sketches keep errors, and few looks find one of thousands."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import hypothesis
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import strategies as st

from lehr.engines import divergence
from lehr.engines.divergence import portable_culprit, recorded_culprit, sketch
from lehr.engines.marked import Mark, engine_session, marks
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.golden import read

# -------------------------------------------------------------------------------------------------------- sketches


@hypothesis.settings(max_examples=25)
@hypothesis.given(size=st.integers(1, 5000), seed=st.integers(0, 999))
def test_a_sketch_is_linear_and_depends_on_the_name(size, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 3, size)).astype(np.float32)
    assert sketch(a + 2 * b, "x") == pytest.approx(sketch(a, "x") + 2 * sketch(b, "x"), abs=1e-3)
    if size > 64:
        assert not np.array_equal(sketch(a, "x"), sketch(a, "y"))


def test_relative_errors_read_from_sketches_are_those_of_the_tensors():
    rng = np.random.default_rng(0)
    ratios = []
    for k in range(60):
        a = rng.standard_normal((1, 4000)).astype(np.float32)
        e = 1e-3 * rng.standard_normal((1, 4000)).astype(np.float32) * (rng.uniform(size=4000) < 0.1)
        true = np.linalg.norm(e) / np.linalg.norm(a)
        ratios.append(divergence._error(sketch(a, f"t{k}"), sketch(a + e, f"t{k}")) / true)
    assert 0.9 < np.mean(ratios) < 1.15
    assert max(ratios) < 2
    assert min(ratios) > 0.5


def test_values_that_are_not_finite_stay_so_in_a_sketch():
    values = np.ones((2, 100), np.float32)
    values[1, 7] = np.nan
    found = sketch(values, "x")
    assert np.all(np.isfinite(found[0]))
    assert not np.all(np.isfinite(found[1]))


# ----------------------------------------------------------------------------------------------------------- marks


def test_marks_are_what_follows_from_inputs_and_know_what_they_read():
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(np.ones(2, np.float32), name="w"))
    folded = ir.node("Neg", [w], name="a/Neg")
    first = ir.node("Mul", [x, folded.outputs[0]], name="a/Mul")
    second = ir.node("Add", [first.outputs[0], x], name="b/Add")
    last = ir.node("Add", [second.outputs[0], first.outputs[0]], name="c/Add")
    nodes = [folded, first, second, last]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [last.outputs[0]], nodes=nodes, initializers=[w], opset_imports={"": 18})
    found = marks(ir.Model(graph, ir_version=10), "step")
    assert [(mark.tensor, mark.layer, mark.reads) for mark in found] == [
        ("a/Mul", "a", ()),
        ("b/Add", "b", (0,)),
        ("c/Add", "c", (0, 1)),
    ]


# ---------------------------------------------------------------------------------------------------------- search


def chain(length, wrong_from, monkeypatch, *, hidden=()):
    """Search a chain of layers, one tensor each, whose engine errs from one of them on."""
    names = [f"layer{n}/Op" for n in range(length)]
    found = [
        Mark(graph="step", tensor=t, node=t, operator="Op", reads=(n - 1,) if n else ()) for n, t in enumerate(names)
    ]
    empty = SimpleNamespace(inputs=(), outputs=())
    graph = SimpleNamespace(file="model/step.onnx", signature=empty)
    bundle = SimpleNamespace(manifest=SimpleNamespace(graphs={"step": graph}))
    right = np.ones((1, 8))

    class Session:
        def __init__(self, wanted):
            self.wanted = wanted

        def run(self, feeds):
            return {t: right * (1 + (names.index(t) >= wrong_from)) for t in self.wanted if t not in hidden}

    return divergence._search(
        bundle,
        {},
        lambda graph: found,
        engine=lambda graph, wanted: Session(wanted),
        take=lambda graph, name, value: value,
        reference=lambda graph, wanted: dict.fromkeys(wanted, right),
        limit=1e-4,
        about=(500.0, "portable graph"),
    )


@pytest.mark.parametrize("length", [1, 5, 64, 65, 1000, 4000])
@pytest.mark.parametrize("share", [0.0, 0.37, 0.999])
def test_a_planted_layer_is_found_in_no_more_graphs_than_bisection_takes(length, share, monkeypatch):
    wrong = int(share * length)
    found = chain(length, wrong, monkeypatch)
    assert found.layer == f"layer{wrong}"
    assert found.builds <= math.log2(length) + 2
    assert found.builds <= 3


def test_an_engine_that_follows_the_reference_has_no_culprit(monkeypatch):
    assert chain(500, 500, monkeypatch) is None


def test_a_layer_that_the_engine_fused_away_is_named_beside_the_one_that_shows_it(monkeypatch):
    found = chain(40, 17, monkeypatch, hidden=("layer17/Op", "layer16/Op"))
    assert found.layer == "layer18"
    assert found.unseen == ("layer16", "layer17")
    assert "fused with layer16, layer17" in str(found)


# ----------------------------------------------------------------------------------------------------- real engines


@pytest.fixture(scope="module")
def opened(dit_bundle):
    return Bundle.open(dit_bundle)


def test_an_engine_that_was_just_built_follows_both_references(opened):
    record, golden = engines.find(opened, "cpu", "fp32"), read(opened)
    assert recorded_culprit(opened, record, golden.steps) is None
    assert portable_culprit(opened, record, golden.steps, 2, 3) is None


def test_what_was_recorded_for_other_inputs_is_not_compared(opened):
    from dataclasses import replace

    record, steps = engines.find(opened, "cpu", "fp32"), read(opened).steps
    assert recorded_culprit(opened, record, replace(steps, inputs=steps.inputs + 1)) is None


def test_a_damaged_recording_is_said_to_be_damaged(opened, tmp_path):
    bundle = Bundle.open(shutil.copytree(opened.root, tmp_path / "d.lehr"))
    with bundle.edit() as edit:
        edit.add_json(divergence.TENSORS_INDEX, {"version": 1, "tensors": 7})
    with pytest.raises(BundleError, match="damaged"):
        recorded_culprit(bundle, engines.find(bundle, "cpu", "fp32"), read(bundle).steps)


def test_an_engine_of_a_library_that_shows_nothing_says_so(opened):
    from dataclasses import replace

    record = replace(engines.find(opened, "cpu", "fp32"), library="tensorrt")
    with pytest.raises(RunFailed, match="shows no tensors"):
        engine_session(opened, record, "step", [])


def test_openvinos_layers_are_found_in_a_graph_compiled_with_marks(opened, tmp_path):
    pytest.importorskip("openvino")
    from lehr.engines.build import build
    from lehr.engines.target import target
    from lehr.runtime.recipe import recipe

    root = shutil.copytree(opened.root, tmp_path / "d.lehr")
    bundle = Bundle.open(root)
    data = bytearray(bundle.path("model/weights.safetensors").read_bytes())
    import json
    import struct

    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])["blocks.4.mlp.fc1.bias"]["data_offsets"]
    values = np.frombuffer(bytes(data[8 + length + begin : 8 + length + end]), np.float32) + 1
    data[8 + length + begin : 8 + length + end] = values.tobytes()
    with bundle.edit() as edit:
        edit.add_bytes("model/weights.safetensors", bytes(data))
    build(root, target("cpu"), recipe("fp32"), library="openvino")
    bundle = Bundle.open(root)
    found = recorded_culprit(bundle, engines.find(bundle, "cpu", "fp32"), read(bundle).steps)
    assert found.layer == "blocks.4.mlp.fc1"
    assert found.graph == "step"
