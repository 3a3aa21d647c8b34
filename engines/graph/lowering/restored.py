"""Weights in formats that a library cannot read, as the float32 numbers that they stand for."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from lehr.engines.graph.passes.dead_code import remove_dead_code
from lehr.runtime.errors import InvalidInput


def restore_weights(model: ir.Model, types: Collection[ir.DataType]) -> ir.passes.PassResult:
    """Put in the place of every weight of ``types`` and its DequantizeLinear what the two compute.

    Weights become lazy tensors that are restored when they are written.

    Args:
        model: changed in place.
        types: element types of quantised weights.

    Raises:
        InvalidInput: a scale that is computed from what is no constant.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "DequantizeLinear" and _holds(node.inputs[0], types)]
    for node in nodes:
        weight, old = node.inputs[0], node.outputs[0]
        if weight is None or weight.const_value is None:
            raise InvalidInput(f"node {node.name!r} reads a weight without data. Calibrate again.")
        name = f"{old.name}.restored"
        make = partial(
            _restored,
            weight.const_value,
            _constant(node.inputs[1]),
            _int(node, "axis", 1),
            _int(node, "block_size", 0),
            name,
        )
        tensor = ir.LazyTensor(
            make,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape([int(size) for size in weight.const_value.shape.numpy()]),
            name=name,
        )
        made = ir.Value(name=name, shape=old.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
        graph.register_initializer(made)
        ir.convenience.replace_all_uses_with(old, made)
        graph.remove(node, safe=True)
    remove_dead_code(model)
    return ir.passes.PassResult(model, modified=bool(nodes))


def _restored(weight: ir.TensorProtocol, scale: Any, axis: int, block: int, name: str) -> ir.Tensor[Any]:
    numbers = np.asarray(weight.numpy()).astype(np.float32)
    if block:
        wide = np.repeat(scale, block, axis=axis)
        wide = np.take(wide, np.arange(numbers.shape[axis]), axis=axis)
    else:
        along = [1] * numbers.ndim
        along[axis] = -1
        wide = scale.reshape(along) if scale.ndim else scale
    return ir.Tensor((numbers * wide).astype(np.float32), dtype=ir.DataType.FLOAT, name=name)


def _constant(value: ir.Value | None) -> Any:
    """A scale as float32; one that is a product of scales itself (NVFP4) is multiplied out."""
    if _stored(value) and value is not None and value.const_value is not None:
        return np.asarray(value.const_value.numpy()).astype(np.float32)
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        raise InvalidInput(f"scale {None if value is None else value.name!r} is no constant. Calibrate again.")
    return _constant(producer.inputs[0]) * _constant(producer.inputs[1])


def _holds(value: ir.Value | None, types: Collection[ir.DataType]) -> bool:
    return value is not None and value.is_initializer() and value.dtype in types


def _stored(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
