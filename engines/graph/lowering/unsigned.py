"""Signed activations as unsigned ones, for CPUs: the same numbers shifted by 128.

Processors multiply unsigned 8-bit activations with signed weights (VNNI). ONNX Runtime has fast kernels for that pair
only: with both signed its products take 17 times as long.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

_SHIFT = 128


def shift_activations(model: ir.Model, *, signed: Collection[int] = (1,)) -> ir.passes.PassResult:
    """Let int8 QuantizeLinears and what reads them use uint8; numbers -128 to 127 become 0 to 255.

    Weights keep their type: they are initialisers, which no QuantizeLinear writes. In a product of two activations, as
    attention has them, the second stands where a weight does.

    Args:
        model: changed in place.
        signed: places of operands that stay as they are in such products, where zero is their middle. OpenVINO's fused
            attention wants both: with unsigned queries it multiplies them in floating point.
    """
    graph = model.graph
    changed = False
    shifted: dict[str, ir.Value] = {}

    def zero(old: ir.Value) -> ir.Value:
        """The zero point beside another one, 128 more."""
        if str(old.name) not in shifted:
            tensor = old.const_value
            if tensor is None:
                raise ValueError(f"zero point {old.name!r} is no constant")  # quantisers of ours have no other
            array = (np.asarray(tensor.numpy(), np.int16) + _SHIFT).astype(np.uint8)
            made = ir.tensor(array, name=f"{old.name}.unsigned")
            value = ir.Value(name=made.name, shape=old.shape, type=ir.TensorType(ir.DataType.UINT8), const_value=made)
            graph.register_initializer(value)
            shifted[str(old.name)] = value
        return shifted[str(old.name)]

    for node in list(graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        if node.inputs[2].dtype != ir.DataType.INT8:
            continue
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if any(reader.op_type != "DequantizeLinear" or len(reader.inputs) < 3 for reader in readers):
            continue
        if _is_centred(node.inputs[2]) and any(_multiplies(reader, signed) for reader in readers):
            continue
        for either in (node, *readers):
            either.replace_input_with(2, zero(either.inputs[2]))  # type: ignore[arg-type]
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        changed = True
    return ir.passes.PassResult(model, modified=changed)


def _is_centred(zero: ir.Value) -> bool:
    return zero.const_value is not None and not np.any(zero.const_value.numpy())


def _multiplies(dequantiser: ir.Node, places: Collection[int]) -> bool:
    """Whether it stands at one of some places in a product of two activations."""
    return any(
        reader.op_type == "MatMul" and place in places and all(_is_activation(value) for value in reader.inputs)
        for reader, place in dequantiser.outputs[0].uses()
    )


def _is_activation(value: ir.Value | None) -> bool:
    """Whether a quantiser rounded it while the graph runs."""
    dequantiser = None if value is None else value.producer()
    rounded = None if dequantiser is None or not dequantiser.inputs else dequantiser.inputs[0]
    quantiser = None if rounded is None else rounded.producer()
    return quantiser is not None and quantiser.op_type == "QuantizeLinear"
