"""MatMul, scale, mask, Softmax, MatMul back into one ``Attention`` (opset 23), which engines run as one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lehr.engines.graph.passes.draft import Draft, scalar_of
from lehr.engines.graph.passes.redundant import remove_redundant

MIN_OPSET = 23


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    query: ir.Value
    key_transposed: ir.Value
    value: ir.Value
    scale: float
    mask: ir.Value | None


def fuse_attention(model: ir.Model) -> ir.passes.PassResult:
    """Find softmax(Q Kᵀ scale + mask) V on (batch, heads, tokens, size), with the scale on Q, on K, on both or after.

    Nothing is done below opset 23, where ``Attention`` begins.
    """
    if model.opset_imports.get("", 0) < MIN_OPSET:
        return ir.passes.PassResult(model, modified=False)
    found = [(node, match) for node in model.graph if (match := _match(node)) is not None]
    for node, match in found:
        draft = Draft(node)
        key = draft.op("Transpose", match.key_transposed, attributes={"perm": (0, 1, 3, 2)})
        if match.key_transposed.shape is not None:
            sizes = match.key_transposed.shape
            key.shape = ir.Shape([sizes[0], sizes[1], sizes[3], sizes[2]])
        inputs = (match.query, key, match.value) + (() if match.mask is None else (match.mask,))
        draft.finish(draft.op("Attention", *inputs, attributes={"scale": match.scale}, shape=node.outputs[0].shape))
    if found:
        remove_redundant(model)
    return ir.passes.PassResult(model, bool(found))


def _match(node: ir.Node) -> _Found | None:
    """The pieces of an attention whose last MatMul is ``node``."""
    if not _is(node, "MatMul"):
        return None
    weights = _sole(node.inputs[0], "Softmax")
    if weights is None or not _last_axis(weights):
        return None
    scores, mask, scale = weights.inputs[0], None, 1.0
    masked = _sole(scores, "Add")
    if masked is not None:
        product = next((k for k in (0, 1) if _scores(masked.inputs[k])), None)
        if product is None:
            return None
        scores, mask = masked.inputs[product], masked.inputs[1 - product]
    scores, factor = _unscaled(scores)
    scale *= factor
    matmul = _sole(scores, "MatMul")
    if matmul is None:
        return None
    query, factor_q = _unscaled(matmul.inputs[0])
    key, factor_k = _unscaled(matmul.inputs[1])
    value = node.inputs[1]
    if query is None or key is None or value is None or not _four(query) or not _four(key) or not _four(value):
        return None
    if mask is not None and not _fits(mask, key):
        return None
    return _Found(query=query, key_transposed=key, value=value, scale=scale * factor_q * factor_k, mask=mask)


def _scores(value: ir.Value | None) -> bool:
    return _sole(_unscaled(value)[0], "MatMul") is not None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a Mul or Div by a constant number is applied to, and the factor; the value itself and 1 otherwise."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    factor = scalar_of(node.inputs[1])
    if factor is not None:
        return node.inputs[0], 1 / factor if node.op_type == "Div" else factor
    factor = scalar_of(node.inputs[0])
    return (node.inputs[1], factor) if factor is not None and node.op_type == "Mul" else (value, 1.0)


def _sole(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The producer, if it is that operator and nobody else needs its result."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not _is(node, operator) or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return node


def _is(node: ir.Node, operator: str) -> bool:
    return node.domain == "" and node.op_type == operator


def _last_axis(softmax: ir.Node) -> bool:
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    return axis in {-1, 3}


def _four(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.rank() == 4


def _fits(mask: ir.Value, key: ir.Value) -> bool:
    """A mask may be broadcast, but for its last axis: ``Attention`` takes a shorter one as masked at the end."""
    if mask.shape is None or mask.shape.rank() not in (2, 3, 4) or key.shape is None:
        return False
    last = mask.shape[-1]
    return last == key.shape[3] and (isinstance(last, int) or last.value is not None)
