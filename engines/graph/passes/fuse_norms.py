"""Normalisations and Gelu from their pieces, as far as the graph's operator set has them."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.fusion._layer_norm import fuse_layer_normalization
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

from lehr.engines.graph.passes.dead_code import remove_dead_code
from lehr.engines.graph.passes.decompose_norms import SINCE
from lehr.engines.graph.passes.draft import Draft, constant_of, rank_of, scalar_of


def fuse_norms(model: ir.Model) -> ir.passes.PassResult:
    """Find what :mod:`~lehr.engines.graph.passes.decompose_norms` writes, which is what PyTorch's exporter writes too.

    RMSNormalization and LayerNormalization are found by onnxscript's rules (Microsoft, MIT licence).
    """
    opset = model.opset_imports.get("", 0)
    count = 0
    if opset >= SINCE["LayerNormalization"]:  # first: the inner half of one looks like an RMSNormalization
        count += fuse_layer_normalization(model)
    if opset >= SINCE["RMSNormalization"]:
        count += fuse_rms_normalization(model)
    if opset >= SINCE["Gelu"]:
        count += pattern.RewriteRuleSet(_GELUS).apply_to_model(model)
    if opset >= SINCE["GroupNormalization"]:
        count += sum([_group_norm(node) for node in model.graph])
    if count:
        remove_dead_code(model)
    return ir.passes.PassResult(model, bool(count))


# ------------------------------------------------------------------------------------------------------- Gelu


def _erf(op, x):  # type: ignore[no-untyped-def]  # onnxscript calls it to see the pattern
    return op.Mul(x, op.Mul(0.5, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)))


def _tanh(op, x):  # type: ignore[no-untyped-def]
    inner = op.Add(x, op.Mul(0.044715, op.Pow(x, 3.0)))
    return op.Mul(x, op.Mul(0.5, op.Add(op.Tanh(op.Mul(math.sqrt(2 / math.pi), inner)), 1.0)))


_GELUS = [
    pattern.RewriteRule(_erf, lambda op, x, **_: op.Gelu(x, approximate="none"), name="GeluErf"),
    pattern.RewriteRule(_tanh, lambda op, x, **_: op.Gelu(x, approximate="tanh"), name="GeluTanh"),
]


# ----------------------------------------------------------------------------------------- GroupNormalization


def _group_norm(node: ir.Node) -> bool:
    """Match from the last node back: Add(Mul(Reshape(InstanceNormalization(Reshape(x))), scale), bias)."""
    scaled, bias = _operands(node, "Add", "Mul")
    back, scale = _operands(scaled, "Mul", "Reshape")
    normal = _producer(back.inputs[0], "InstanceNormalization") if back is not None else None
    together = _producer(normal.inputs[0], "Reshape") if normal is not None else None
    if back is None or normal is None or together is None or scale is None or bias is None:
        return False
    source, target = together.inputs[0], constant_of(together.inputs[1])
    if source is None or source.shape is None or target is None or len(target) != 3 or target[0] != 0:
        return False
    groups, rank = int(target[1]), source.shape.rank()
    plain = _filled(normal.inputs[1], groups, 1) and _filled(normal.inputs[2], groups, 0)
    if not plain or not _returns_to(back, source):
        return False
    weights = [_per_channel(weight, rank) for weight in (scale, bias)]
    draft = Draft(node)
    vectors = []
    for weight in weights:
        if weight is None:
            return False
        vector = weight
        if rank_of(vector) != 1:
            flat = draft.constant([-1], ir.DataType.INT64, "flat")
            vector = draft.op("Reshape", vector, flat)
        vectors.append(vector)
    attributes = {"num_groups": groups, "epsilon": normal.attributes["epsilon"].as_float()}
    draft.finish(draft.op("GroupNormalization", source, *vectors, attributes=attributes, shape=source.shape))
    return True


def _operands(node: ir.Node | None, operator: str, inner: str) -> tuple[ir.Node | None, ir.Value | None]:
    """Of a commutative node: the operand made by ``inner``, whose result nobody else needs, and the other one."""
    if node is None or node.op_type != operator or node.domain != "":
        return None, None
    for k in (0, 1):
        found = _producer(node.inputs[k], inner)
        if found is not None and len(found.outputs[0].uses()) == 1 and (inner != "Reshape" or _of_norm(found)):
            return found, node.inputs[1 - k]
    return None, None


def _of_norm(reshape: ir.Node) -> bool:
    return _producer(reshape.inputs[0], "InstanceNormalization") is not None


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and node.domain == "" else None


def _filled(value: ir.Value | None, size: int, fill: float) -> bool:
    array = constant_of(value)
    if array is None or array.size != size:
        return scalar_of(value) == fill and size == 1
    return bool((array == fill).all())


def _returns_to(back: ir.Node, source: ir.Value) -> bool:
    """Whether the second reshape gives the source's shape again: it asks the source for it, or the shapes agree."""
    asked = _producer(back.inputs[1], "Shape")
    if asked is not None and asked.inputs[0] is source and not asked.attributes.get("end"):
        return True
    here, there = back.outputs[0].shape, source.shape
    return here is not None and there is not None and here == there and None not in [*here]


def _per_channel(value: ir.Value, rank: int) -> ir.Value | None:
    """The weight behind a (C, 1, 1) tensor, or the tensor itself; None if it is not one number a channel."""
    node = _producer(value, "Reshape") or _producer(value, "Unsqueeze")
    if node is not None and rank_of(node.inputs[0]) == 1:
        target = constant_of(node.inputs[1])
        if target is not None and (node.op_type == "Unsqueeze" or len(target) == rank - 1):
            return node.inputs[0]
    shape = value.shape
    if shape is None or shape.rank() != rank - 1 or any(size != 1 for size in shape[1:]):
        return None
    return value
