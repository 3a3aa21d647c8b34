"""The step between PyTorch's exporter and ONNX: operators that ONNX has not, in terms of those it has.

``ExportedProgram.run_decompositions`` traces the whole graph twice more for this, with symbolic sizes two fifths of an
export's time. A denoiser's graph needs only a handful of rewrites, each local to one node: the table below. A graph
with anything else in it (a mutation, another composite operator) goes PyTorch's way.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

aten = torch.ops.aten


def decompose_locally(program: ExportedProgram, table: Container[Any]) -> bool:
    """Rewrite, in place, what PyTorch would decompose, if that can be done node by node.

    Args:
        program: fresh from ``torch.export``; unchanged when the answer is False.
        table: the operators that ONNX cannot express, as PyTorch's ONNX exporter lists them.

    Returns:
        Whether the graph is now as ``run_decompositions`` would leave it, up to copies.
    """
    graph = program.graph
    pending = [node for node in graph.nodes if node.op == "call_function" and not _stays(node.target, table)]
    flat = not any(node.op in ("call_module", "get_attr") for node in graph.nodes)  # else it has graphs of its own
    if not flat or not all(node.target in REWRITES and REWRITES[node.target].applies(node) for node in pending):
        return False
    sizes, todo = _Sizes(graph), set(pending)
    for node in list(graph.nodes):
        if node in todo:
            with graph.inserting_before(node):
                REWRITES[node.target].apply(node, sizes)
        else:
            sizes.note(node)
    return True


def _stays(target: Any, table: Container[Any]) -> bool:
    """Whether PyTorch's own pass would keep a node of this kind: it takes views and mutations apart."""
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)  # arithmetic on sizes, and picking from a tuple
    if target in table or target._schema.is_mutable:
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return not (composite and any(output.alias_info is not None for output in target._schema.returns))


@dataclass(slots=True)
class _Sizes:
    """The nodes that hold symbolic sizes, so that a size is read once and off the graph's input where possible."""

    graph: Graph
    known: dict[Any, Node] = field(default_factory=dict)

    def note(self, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.known.setdefault(value.node.expr, node)

    def of(self, source: Node, axis: int) -> int | Node:
        """Size ``axis`` of ``source``."""
        size = source.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        if size.node.expr not in self.known:
            made = self.graph.call_function(aten.sym_size.int, (source, axis))
            made.meta = {**source.meta, "val": size}
            self.known[size.node.expr] = made
        return self.known[size.node.expr]


# ------------------------------------------------------------------------------------------------- rewrites


def _reshape(node: Node, _: _Sizes) -> None:
    source, target = _arguments(node, "self", "shape")
    result = node.meta["val"].shape
    made = [
        size if isinstance(size, int) and asked == -1 else asked for size, asked in zip(result, target, strict=True)
    ]
    _become(node, aten.reshape.default, source, made)


def _flatten(node: Node, sizes: _Sizes) -> None:
    source, start, end = _arguments(node, "self", "start_dim", "end_dim")
    rank, result = len(source.meta["val"].shape), node.meta["val"].shape
    start, end = start % rank, end % rank
    middle = result[start] if isinstance(result[start], int) else sizes.of(source, start) if start == end else -1
    before, after = range(start), range(end + 1, rank)
    target = [*(sizes.of(source, axis) for axis in before), middle, *(sizes.of(source, axis) for axis in after)]
    _become(node, aten.reshape.default, source, target)


def _unflatten(node: Node, sizes: _Sizes) -> None:
    source, dim, asked = _arguments(node, "self", "dim", "sizes")
    rank, result = len(source.meta["val"].shape), node.meta["val"].shape
    dim %= rank
    parts = [known if isinstance(known, int) else size for known, size in zip(result[dim:], asked, strict=False)]
    before, after = range(dim), range(dim + 1, rank)
    target = [*(sizes.of(source, axis) for axis in before), *parts, *(sizes.of(source, axis) for axis in after)]
    _become(node, aten.reshape.default, source, target)


def _chunk(node: Node, _: _Sizes) -> None:
    source, _, dim = _arguments(node, "self", "chunks", "dim")
    _become(node, aten.split.Tensor, source, node.meta["val"][0].shape[dim], dim)


def _convert(node: Node, _: _Sizes) -> None:
    (source,) = _arguments(node, "self")
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype != dtype:
        _become(node, aten._to_copy.default, source, dtype=dtype)
    else:
        _pass_on(node, source)


def _contiguous(node: Node, _: _Sizes) -> None:
    _pass_on(node, *_arguments(node, "self"))  # ONNX has no strides


def _transpose_matrix(node: Node, _: _Sizes) -> None:
    _become(node, aten.transpose.int, *_arguments(node, "self"), -2, -1)


def _subtract_from(node: Node, _: _Sizes) -> None:
    source, other = _arguments(node, "self", "other")
    _become(node, aten.sub.Tensor, other, source)


def _transposed_convolution(node: Node, _: _Sizes) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "output_padding", "groups")
    *tensors, stride, padding, dilation, output_padding, groups = _arguments(node, *names)
    _become(node, aten.convolution.default, *tensors, stride, padding, dilation, True, output_padding, groups)


def _drop(node: Node, _: _Sizes) -> None:
    node.graph.erase_node(node)


def _arguments(node: Node, *names: str) -> list[Any]:
    """The node's arguments of these names, defaults included."""
    target: Any = node.target
    declared = target._schema.arguments
    given = {argument.name: argument.default_value for argument in declared}
    given |= {argument.name: value for argument, value in zip(declared, node.args, strict=False)} | node.kwargs
    return [given[name] for name in names]


def _become(node: Node, target: Any, *args: Any, **kwargs: Any) -> None:
    """Change what the node computes; its name stays, which the program's signature may mention."""
    node.target, node.args, node.kwargs = target, args, kwargs


def _pass_on(node: Node, source: Node) -> None:
    if any(user.op == "output" for user in node.users):
        _become(node, aten.clone.default, source)
    else:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


# ---------------------------------------------------------------------------------------------------- where


def _anywhere(_: Node) -> bool:
    return True


def _has_axes(node: Node) -> bool:
    return _arguments(node, "self")[0].meta["val"].ndim > 0


def _splits_a_fixed_size(node: Node) -> bool:
    return isinstance(node.meta["val"][0].shape[_arguments(node, "dim")[0]], int)


def _keeps_layout(node: Node) -> bool:
    return not any(_arguments(node, "copy", "memory_format"))


def _is_unscaled(node: Node) -> bool:
    return _arguments(node, "alpha") == [1]


def _is_unused(node: Node) -> bool:
    return not node.users


@dataclass(frozen=True, slots=True)
class _Rewrite:
    apply: Callable[[Node, _Sizes], None]
    applies: Callable[[Node], bool] = _anywhere


REWRITES: dict[Any, _Rewrite] = {
    aten.reshape.default: _Rewrite(_reshape),
    aten.flatten.using_ints: _Rewrite(_flatten, _has_axes),
    aten.unflatten.int: _Rewrite(_unflatten),
    aten.chunk.default: _Rewrite(_chunk, _splits_a_fixed_size),
    aten.to.dtype: _Rewrite(_convert, _keeps_layout),
    aten.contiguous.default: _Rewrite(_contiguous),
    aten.mT.default: _Rewrite(_transpose_matrix),
    aten.rsub.Scalar: _Rewrite(_subtract_from, _is_unscaled),
    aten.conv_transpose2d.input: _Rewrite(_transposed_convolution),
    aten.promote_types.default: _Rewrite(_drop, _is_unused),
}
