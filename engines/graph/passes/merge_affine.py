"""Affine maps of channels in a row: one multiplication and one addition of the large tensor are enough."""

from __future__ import annotations

import onnx_ir as ir

from lehr.engines.graph.passes.draft import Draft


def merge_affine(model: ir.Model) -> ir.passes.PassResult:
    """Write ``(x * a + b) * c + d`` as ``x * (a * c) + (b * c + d)`` where a to d have one value a channel.

    That is a group norm in pieces with what an adaptive one (Dhariwal & Nichol 2021, arXiv:2105.05233) puts behind it.
    The small products are made at every step, since c and d come with the timestep.
    """
    modified = False
    for node in model.graph:
        outer = _affine(node)
        inner = None if outer is None else _affine(outer[0].producer())
        if outer is None or inner is None or len(outer[0].uses()) != 1 or outer[0].is_graph_output():
            continue
        (_, c, d), (x, a, b) = outer, inner
        draft = Draft(node)
        scale = draft.op("Mul", c, a)
        shift = draft.op("Add", draft.op("Mul", c, b), d)
        draft.finish(draft.op("Add", draft.op("Mul", x, scale, shape=x.shape), shift, shape=node.outputs[0].shape))
        modified = True
    if modified:
        ir.passes.common.RemoveUnusedNodesPass()(model)
    return ir.passes.PassResult(model, modified)


def _affine(node: ir.Node | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, scale and shift of the Add of ``x * scale + shift`` whose product nobody else reads; else None."""
    added = _with_channels(node, "Add")
    scaled = None if added is None else _with_channels(added[0].producer(), "Mul")
    if added is None or scaled is None or len(added[0].uses()) != 1 or added[0].is_graph_output():
        return None
    return (*scaled, added[1])


def _with_channels(node: ir.Node | None, operator: str) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a node of two, if the second, or the first, has one value a channel of the other."""
    if node is None or node.op_type != operator or node.domain != "":
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    if _is_by_channel(right, left):
        return left, right
    return (right, left) if _is_by_channel(left, right) else None


def _is_by_channel(value: ir.Value, of: ir.Value) -> bool:
    if value.shape is None or of.shape is None:
        return False
    trailing, rank = value.shape.dims[-(of.shape.rank() - 2) :], of.shape.rank()
    small = value.shape.rank() in (rank, rank - 1) and all(size == 1 for size in trailing)
    return rank > 2 and small and any(size != 1 for size in of.shape.dims[2:])
