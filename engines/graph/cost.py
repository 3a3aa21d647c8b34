"""What a graph costs, from its shapes alone: bytes of a tensor, multiplications of a node.

Sizes are evaluated at given dimensions (a model's defaults as a rule). The counts order alternatives and fill tables;
they time nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from lehr.runtime.sizes import size_of

# Operators that only rename or move what they are given.
VIEWS = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile"}
    | {"Transpose", "Unsqueeze"}
)


def shape_at(value: ir.Value, dims: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of ``value`` at the sizes ``dims``; None where the graph does not say."""
    if value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size_of(size.value, dims) for size in value.shape]
    return None if None in sizes else tuple(int(size) for size in sizes if size is not None)


def nbytes(value: ir.Value, dims: Mapping[str, int]) -> int | None:
    """Bytes of ``value`` at the sizes ``dims``; None where its shape or type is not known."""
    shape = shape_at(value, dims)
    if shape is None or value.dtype is None:
        return None
    return math.ceil(math.prod(shape) * value.dtype.itemsize)


def flops(node: ir.Node, dims: Mapping[str, int]) -> int:
    """Floating-point operations of one node, a multiplication and an addition being two; 0 where shapes are unknown.

    Products are counted exactly; what touches each element a few times counts one an element of its largest operand.
    """
    out = shape_at(node.outputs[0], dims)
    ins = [None if value is None else shape_at(value, dims) for value in node.inputs]
    if out is None or not ins or node.op_type in VIEWS:
        return 0
    first, second = ins[0], ins[1] if len(ins) > 1 else None
    if node.op_type in ("MatMul", "Gemm") and first:
        attribute = node.attributes.get("transA")
        inner = first[-2] if node.op_type == "Gemm" and attribute and attribute.as_int() else first[-1]
        return 2 * math.prod(out) * inner
    if node.op_type == "Conv" and second:
        return 2 * math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose" and first and second:
        return 2 * math.prod(first) * math.prod(second[1:])
    if node.op_type == "Attention" and first and second and len(first) == 4 and len(second) == 4:
        batch, heads, queries, size = first
        return 2 * batch * heads * queries * second[2] * (size + out[-1])
    return max(math.prod(shape) for shape in (out, *ins) if shape is not None)


def total_flops(nodes: Iterable[ir.Node], dims: Mapping[str, int]) -> int:
    """Floating-point operations of all ``nodes`` together."""
    return sum(flops(node, dims) for node in nodes)


def weight_bytes(node: ir.Node) -> int:
    """Bytes of the initialisers that ``node`` reads directly or through a rearrangement of one (``x @ W.T``)."""
    return sum(_stored(value) for value in node.inputs if value is not None)


def _stored(value: ir.Value) -> int:
    producer = value.producer()
    if producer is not None:
        sources = [source for source in producer.inputs if source is not None]
        return sum(_stored(source) for source in sources) if producer.op_type in VIEWS else 0
    if not value.is_initializer() or value.shape is None or value.dtype is None or not value.shape.is_static():
        return 0
    return math.ceil(math.prod(int(size) for size in value.shape.numpy()) * value.dtype.itemsize)
