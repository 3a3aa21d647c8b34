"""``Attention`` (opset 23) in pieces, for engines that do not know it, and for whoever wants to see its logits."""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx_ir as ir

from lehr.engines.graph.passes.draft import Draft, operand, rank_of

SCORES = "scores"  # role of the tensor that holds the logits, mask included: NODE.scores
_REFUSED = ("is_causal", "softcap", "qk_matmul_output_mode")


def decompose_attention(model: ir.Model, names: Collection[str] | None = None) -> ir.passes.PassResult:
    """Write softmax(scale Q Kᵀ + mask) V as MatMul, Mul, Add, Softmax, MatMul.

    The query is scaled, not the logits: in half precision unscaled logits overflow first. A node with a cache of keys
    and values, a causal flag, a soft cap or fewer heads of keys than of queries stays whole.

    Args:
        model: changed in place.
        names: of the nodes to take apart; all without them.
    """
    nodes = [
        node for node in model.graph if node.op_type == "Attention" and node.domain == "" and plain_attention(node)
    ]
    nodes = [node for node in nodes if names is None or node.name in names]
    for node in nodes:
        _decompose(node)
    return ir.passes.PassResult(model, bool(nodes))


def plain_attention(node: ir.Node) -> bool:
    """Whether it is softmax(scale Q Kᵀ + mask) V, with as many heads of keys as of queries, and nothing else."""
    query, key, value = (operand(node, k) for k in range(3))
    if any(tensor is not None for tensor in node.inputs[4:]) or any(out.uses() for out in node.outputs[1:]):
        return False
    if any(name in node.attributes and node.attributes[name].value for name in _REFUSED):
        return False
    if query.shape is None or key.shape is None or value.shape is None:
        return False
    if rank_of(query) == 3:
        return _int(node, "q_num_heads") == _int(node, "kv_num_heads") > 0 and isinstance(query.shape[2], int)
    same_heads = query.shape[1] == key.shape[1] and (isinstance(query.shape[1], int) or query.shape[1].value)
    return bool(same_heads) and isinstance(query.shape[3], int)


def _decompose(node: ir.Node) -> None:
    draft = Draft(node)
    query, key, value = (operand(node, k) for k in range(3))
    mask = (*node.inputs, None)[3]
    dtype, heads = query.dtype, _int(node, "q_num_heads")
    flat, width = rank_of(query) == 3, _static(query)
    head_size = width // heads if flat else width
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 1 / math.sqrt(head_size)
    if flat:
        split = draft.constant([0, 0, heads, -1], ir.DataType.INT64, "heads")
        query, value = (_turned(draft, draft.op("Reshape", x, split), (0, 2, 1, 3)) for x in (query, value))
        key = _turned(draft, draft.op("Reshape", key, split), (0, 2, 3, 1))
    else:
        key = _turned(draft, key, (0, 1, 3, 2))
    scaled = draft.op("Mul", query, draft.constant(scale, dtype, "scale"), shape=None if flat else query.shape)
    scores = draft.op("MatMul", scaled, key, role=SCORES if mask is None else None)
    if mask is not None:
        if mask.dtype == ir.DataType.BOOL:
            kept, dropped = draft.constant(0, dtype, "kept"), draft.constant(-math.inf, dtype, "dropped")
            mask = draft.op("Where", mask, kept, dropped, dtype=dtype)
        scores = draft.op("Add", scores, mask, role=SCORES)
    weights = draft.op("Softmax", scores, attributes={"axis": -1})
    result = draft.op("MatMul", weights, value)
    if flat:
        merged = draft.constant([0, 0, -1], ir.DataType.INT64, "merged")
        result = draft.op("Reshape", _turned(draft, result, (0, 2, 1, 3)), merged)
    draft.finish(result)


def _turned(draft: Draft, value: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in perm])
    return draft.op("Transpose", value, attributes={"perm": perm}, shape=shape)


def _static(value: ir.Value) -> int:
    """The last axis, which :func:`_plain` has seen to be a number."""
    size = None if value.shape is None else value.shape[-1]
    if not isinstance(size, int):
        raise TypeError(f"the last axis of {value.name!r} is {size}")
    return size


def _int(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0
