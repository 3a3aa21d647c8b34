"""Layers that carry a residual stream past others are found by the structure, and some recipes leave them alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lehr.calibration.layers import Role, layers
from lehr.calibration.recipes import plan_of


def blocks() -> ir.Model:
    """first; a block with a shortcut of its own (in, out, short); one whose stream passes as it is (one); last."""
    rng = np.random.default_rng(0)
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []

    def tensor(name: str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(["b", 4, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))

    def op(operator: str, name: str, *read: ir.Value, **attributes: list[int]) -> ir.Value:
        made = tensor(f"{name}.y")
        nodes.append(ir.node(operator, list(read), attributes, outputs=[made], name=name))
        return made

    def conv(name: str, read: ir.Value, size: int = 1) -> ir.Value:
        shape = (4, 4, size, size)
        held = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=f"{name}.w")
        weights.append(
            ir.Value(name=f"{name}.w", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=held)
        )
        return op("Conv", name, read, weights[-1], pads=[size // 2] * 4)

    sample = tensor("sample")
    stream = conv("first", sample)
    inner = conv("out", op("Relu", "relu_1", conv("in", op("Relu", "relu_0", stream), 3)), 3)
    stream = op("Add", "sum_0", conv("short", stream), inner)
    size = ir.Value(name="size", type=ir.TensorType(ir.DataType.INT64))
    nodes.append(ir.node("Shape", [nodes[-2].outputs[0]], outputs=[size], name="shape"))  # reads no numbers
    stream = op("Add", "sum_1", stream, conv("one", op("Relu", "relu_2", stream)))
    result = conv("last", stream)
    graph = ir.Graph([sample], [result], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="blocks")
    return ir.Model(graph, ir_version=10)


def test_a_layer_that_is_added_to_what_others_make_of_its_input_is_a_shortcut() -> None:
    found = {layer.name: layer.roles for layer in layers(blocks())}
    assert {name for name, roles in found.items() if Role.SHORTCUT in roles} == {"short"}


def test_fp8_keeps_shortcuts_and_int8_does_not() -> None:
    found = layers(blocks())
    assert set(plan_of("fp8", found)) == {"in", "out", "one"}
    assert set(plan_of("int8", found)) == {"in", "out", "one", "short"}


def test_convolutions_of_single_pixels_are_known_and_int8_with_zero_points_keeps_them() -> None:
    found = layers(blocks())
    pointwise = {layer.name for layer in found if Role.POINTWISE in layer.roles}
    assert pointwise == {"first", "one", "short", "last"}
    assert set(plan_of("int8-asym", found)) == {"in", "out"}
