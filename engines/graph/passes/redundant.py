"""Data movement that cancels: Identity, Cast to the same type and back, Transpose and Reshape in a row."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from lehr.engines.graph.passes.draft import Draft, constant_of, replace

_FLOAT = ir.DataType.FLOAT
_HELD = {  # every value of the second is one of the first, so a cast to the first and on changes nothing
    _FLOAT: {ir.DataType.FLOAT16, ir.DataType.BFLOAT16},
    ir.DataType.DOUBLE: {_FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT32},
    ir.DataType.INT64: {ir.DataType.INT32, ir.DataType.BOOL},
    ir.DataType.INT32: {ir.DataType.BOOL},
}


def remove_redundant(model: ir.Model) -> ir.passes.PassResult:
    """Remove nodes that move or convert data to no effect, until none is left.

    A cast that loses bits is kept, whatever follows: float32 to float16 and back is a rounding.
    """
    modified = bool(common.IdentityEliminationPass()(model).modified)
    changing = True
    while changing:
        changing = False
        for node in model.graph:
            rewrite = _REWRITES.get(node.op_type) if node.domain == "" else None
            if rewrite is not None and rewrite(node):
                changing = modified = True
    if modified:
        common.RemoveUnusedNodesPass()(model)
    return ir.passes.PassResult(model, modified)


def _casts(node: ir.Node) -> bool:
    source, to = node.inputs[0], node.attributes["to"].as_int()
    if source is None or source.dtype is None:
        return False
    if source.dtype == to:
        return _skip(node, source)
    before = _producer(source, "Cast")
    origin = before.inputs[0] if before is not None else None
    if origin is None or origin.dtype is None or origin.dtype not in _HELD.get(source.dtype, ()):
        return False
    if origin.dtype == to:
        return _skip(node, origin)
    node.replace_input_with(0, origin)
    return True


def _transposes(node: ir.Node) -> bool:
    source = node.inputs[0]
    perm = _perm(node)
    if source is None or perm is None:
        return False
    if perm == list(range(len(perm))):
        return _skip(node, source)
    before = _producer(source, "Transpose")
    first = _perm(before) if before is not None else None
    if before is None or first is None:
        return False
    node.replace_input_with(0, before.inputs[0])
    node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in perm])
    return True


def _reshapes(node: ir.Node) -> bool:
    """Two in a row are the second alone where its target says nothing of the shape between (no 0, which keeps)."""
    source, result = node.inputs[0], node.outputs[0]
    target = constant_of(node.inputs[1])
    if source is None or target is None:
        return False
    if _same_shape(source, result):
        return _skip(node, source)
    before = _producer(source, "Reshape")
    if before is None or before.inputs[0] is None:
        return False
    if _same_shape(before.inputs[0], result):
        return _skip(node, before.inputs[0])
    if 0 not in target.tolist():
        node.replace_input_with(0, before.inputs[0])
        return True
    shape = result.shape
    if shape is None or sum(not isinstance(size, int) for size in shape) > 1:
        return False
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if 0 in sizes:
        return False
    node.replace_input_with(0, before.inputs[0])
    node.replace_input_with(1, Draft(node).constant(sizes, ir.DataType.INT64, "shape"))
    return True


_REWRITES = {"Cast": _casts, "Transpose": _transposes, "Reshape": _reshapes}


def _skip(node: ir.Node, source: ir.Value) -> bool:
    """Let ``source`` stand for the node's result, unless both are the graph's own and must keep their names."""
    output = node.outputs[0]
    if output.is_graph_output() and (source.producer() is None or source.is_graph_output()):
        return False
    replace(node, source)
    return True


def _producer(value: ir.Value, operator: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == operator and node.domain == "" else None


def _perm(node: ir.Node) -> list[int] | None:
    """The axes, which default to all in reverse."""
    if "perm" in node.attributes:
        return list(node.attributes["perm"].as_ints())
    source = node.inputs[0]
    return None if source is None or source.shape is None else list(range(source.shape.rank()))[::-1]


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Equal in every size, each of them a number or a name that both have."""
    if one.shape is None or other.shape is None or one.shape.rank() != other.shape.rank():
        return False
    return all(
        a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one.shape, other.shape, strict=True)
    )
