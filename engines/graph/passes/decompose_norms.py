"""Normalisations and Gelu in pieces, for engines whose operator set begins later."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import onnx_ir as ir

from lehr.engines.graph.passes.draft import Draft, operand, rank_of

# Where each operator began; GroupNormalization took a scale a group before 21, a scale a channel since.
SINCE = {"LayerNormalization": 17, "Gelu": 20, "GroupNormalization": 21, "RMSNormalization": 23}


def decompose_norms(model: ir.Model, operators: Collection[str] = tuple(SINCE)) -> ir.passes.PassResult:
    """Write the named operators with the arithmetic that exporters write for older operator sets.

    What their second and third results are needed for is left whole. A half-precision norm computes in float32
    between casts, as its ``stash_type`` says: squares overflow in fp16 from 256.

    Raises:
        KeyError: a name that is none of :data:`SINCE`.
    """
    rewrites = {name: _REWRITES[name] for name in operators}
    nodes = [
        node
        for node in model.graph
        if node.domain == "" and node.op_type in rewrites and not any(out.uses() for out in node.outputs[1:])
    ]
    modified = False
    for node in nodes:
        modified |= rewrites[node.op_type](node)
    return ir.passes.PassResult(model, modified)


def _layer_norm(node: ir.Node) -> bool:
    source, scale, bias = operand(node, 0), operand(node, 1), (*node.inputs, None)[2]
    axes = _normalised(node)
    if axes is None:
        return False
    draft, dtype = Draft(node), source.dtype
    source = _stashed(draft, source)
    mean = _mean(draft, source, axes)
    deviation = draft.op("Sub", source, mean, shape=source.shape)
    two = draft.constant(2, deviation.dtype, "two")
    variance = _mean(draft, draft.op("Pow", deviation, two, shape=source.shape), axes)
    root = draft.op("Sqrt", draft.op("Add", variance, draft.constant(_epsilon(node), source.dtype, "epsilon")))
    normalised = draft.op("Mul", deviation, draft.op("Reciprocal", root), shape=source.shape)
    normalised = _cast(draft, normalised, dtype)
    result = draft.op("Mul", normalised, scale, shape=source.shape)
    draft.finish(result if bias is None else draft.op("Add", result, bias, shape=source.shape))
    return True


def _rms_norm(node: ir.Node) -> bool:
    source, scale = operand(node, 0), operand(node, 1)
    axes = _normalised(node)
    if axes is None:
        return False
    draft, dtype = Draft(node), source.dtype
    source = _stashed(draft, source)
    square = draft.op("Pow", source, draft.constant(2, source.dtype, "two"), shape=source.shape)
    epsilon = draft.constant(_epsilon(node), source.dtype, "epsilon")
    root = draft.op("Sqrt", draft.op("Add", _mean(draft, square, axes), epsilon))
    normalised = draft.op("Mul", source, draft.op("Reciprocal", root), shape=source.shape)
    normalised = _cast(draft, normalised, dtype)
    draft.finish(draft.op("Mul", normalised, scale, shape=source.shape))
    return True


def _group_norm(node: ir.Node) -> bool:
    """Each group is one channel of InstanceNormalization, whose own scale and bias are ones and zeros.

    Groups of a single channel are InstanceNormalization as it is.
    """
    source, scale, bias = (operand(node, k) for k in range(3))
    rank = rank_of(source)
    if rank is None:
        return False
    draft, groups = Draft(node), node.attributes["num_groups"].as_int()
    dtype, shape, source = source.dtype, source.shape, _stashed(draft, source)
    if shape is not None and shape[1] == groups and source.dtype == dtype:
        attributes = {"epsilon": _epsilon(node)}
        draft.finish(draft.op("InstanceNormalization", source, scale, bias, attributes=attributes, shape=shape))
        return True
    size = draft.op("Shape", source, dtype=ir.DataType.INT64, shape=ir.Shape([rank]))
    together = draft.constant([0, groups, -1], ir.DataType.INT64, "groups")
    flat = draft.op("Reshape", source, together, shape=ir.Shape([None, groups, None]))
    ones, zeros = (draft.constant([fill] * groups, source.dtype, role) for fill, role in ((1, "ones"), (0, "zeros")))
    attributes = {"epsilon": _epsilon(node)}
    normal = draft.op("InstanceNormalization", flat, ones, zeros, attributes=attributes, shape=flat.shape)
    normal = _cast(draft, draft.op("Reshape", normal, size, shape=source.shape), dtype)
    channel = draft.constant([-1] + [1] * (rank - 2), ir.DataType.INT64, "channel")
    sizes = ir.Shape([scale.shape[0] if scale.shape is not None else None] + [1] * (rank - 2))
    scale, bias = (draft.op("Reshape", weight, channel, shape=sizes) for weight in (scale, bias))
    draft.finish(draft.op("Add", draft.op("Mul", normal, scale, shape=source.shape), bias, shape=source.shape))
    return True


def _gelu(node: ir.Node) -> bool:
    """Hendrycks & Gimpel 2016 (arXiv:1606.08415): x Φ(x), exact or through tanh."""
    source = operand(node, 0)
    draft, dtype, shape = Draft(node), source.dtype, source.shape
    approximate = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
    if approximate == "tanh":
        cube = draft.op("Pow", source, draft.constant(3, dtype, "three"), shape=shape)
        cube = draft.op("Mul", draft.constant(0.044715, dtype, "cubic"), cube, shape=shape)
        inner = draft.op("Add", source, cube, shape=shape)
        inner = draft.op("Mul", draft.constant(math.sqrt(2 / math.pi), dtype, "slope"), inner, shape=shape)
        inner = draft.op("Tanh", inner, shape=shape)
    else:
        inner = draft.op("Div", source, draft.constant(math.sqrt(2), dtype, "root"), shape=shape)
        inner = draft.op("Erf", inner, shape=shape)
    share = draft.op("Add", inner, draft.constant(1, dtype, "one"), shape=shape)
    share = draft.op("Mul", draft.constant(0.5, dtype, "half"), share, shape=shape)
    draft.finish(draft.op("Mul", source, share, shape=shape))
    return True


_REWRITES: dict[str, Callable[[ir.Node], bool]] = {
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "Gelu": _gelu,
}


def _normalised(node: ir.Node) -> list[int] | None:
    """The axes that are normalised together, counted from the end; None where the rank is not known."""
    rank = rank_of(operand(node, 0))
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if axis >= 0:
        if rank is None:
            return None
        axis -= rank
    return list(range(axis, 0))


def _mean(draft: Draft, value: ir.Value, axes: list[int]) -> ir.Value:
    where = draft.constant(axes, ir.DataType.INT64, "axes")
    return draft.op("ReduceMean", value, where, attributes={"keepdims": 1, "noop_with_empty_axes": 0})


def _stashed(draft: Draft, value: ir.Value) -> ir.Value:
    half = value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    stash = draft.node.attributes["stash_type"].as_int() if "stash_type" in draft.node.attributes else 1
    return _cast(draft, value, ir.DataType(stash)) if half else value


def _cast(draft: Draft, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    if dtype is None or value.dtype == dtype:
        return value
    return draft.op("Cast", value, attributes={"to": int(dtype)}, dtype=dtype, shape=value.shape)


def _epsilon(node: ir.Node) -> float:
    return node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
