"""A copy of a graph that also says how large its tensors are, so that activations never leave the engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

from lehr.engines.graph.passes.decompose_attention import decompose_attention

PEAK, RMS = "lehr.peak", "lehr.rms"
_FLOAT = ir.DataType.FLOAT


class Measured(Enum):
    """Which tensors are measured."""

    ALL = "all"
    MOVING = "moving"  # those that depend on an input: not what is made of weights alone, which may be large


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One tensor that is measured.

    Attributes:
        tensor: its name; within a decomposed ``Attention`` that of a piece, such as ``NODE.scores``.
        node: the portable graph's node that computes it; empty for an input.
        operator: of that node.
    """

    tensor: str
    node: str
    operator: str

    @property
    def layer(self) -> str:
        """The module the node was traced in, or the node itself."""
        return self.node.rpartition("/")[0] or self.node or self.tensor


def instrument(model: ir.Model, measured: Measured = Measured.ALL) -> tuple[ir.Model, list[Probe]]:
    """Append to ``model`` the largest magnitude and the root mean square of every float32 tensor.

    ``Attention`` is taken apart first: its logits are what overflows in half precision, and no engine shows them.

    Each measurement stands right behind what it measures: whoever runs the nodes in the order of the graph needs little
    more memory than without them.

    Args:
        model: changed in place; its outputs are followed by :data:`PEAK` and :data:`RMS`.
        measured: of its tensors.

    Returns:
        The model, and what each element of the two vectors belongs to.
    """
    owners = {node.name or "": node.op_type for node in model.graph}
    decompose_attention(model)
    graph = model.graph
    values: list[tuple[ir.Node | None, ir.Value]] = [(None, value) for value in graph.inputs if value.dtype == _FLOAT]
    values += [(node, out) for node in graph for out in node.outputs if out.dtype == _FLOAT and out.name]
    if measured is Measured.MOVING:
        moving = set(graph.inputs)
        for reader in graph:
            if not moving.isdisjoint(reader.inputs):
                moving.update(reader.outputs)
        values = [(made, value) for made, value in values if value in moving]
    first = graph[0]
    probes, peaks, roots = [], [], []
    target = ir.Value(
        name="lehr.one", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=ir.tensor([1])
    )
    graph.register_initializer(target)
    for node, value in values:
        name = _owner(node.name or "", owners) if node is not None else ""
        probes.append(Probe(tensor=value.name or "", node=name, operator=owners.get(name, "")))
        size = _op("Cast", [_op("Size", [value])], {"to": int(_FLOAT)})
        square = _op("ReduceSumSquare", [value], {"keepdims": 0})
        peak = _op("Reshape", [_op("ReduceMax", [_op("Abs", [value])], {"keepdims": 0}), target])
        root = _op("Reshape", [_op("Sqrt", [_op("Div", [square, size])]), target])
        made = _between(value, (peak, root))
        if node is None:
            graph.insert_before(first, made)
        else:
            graph.insert_after(node, made)
        peaks.append(peak)
        roots.append(root)
    for name, parts in ((PEAK, peaks), (RMS, roots)):
        whole = _op("Concat", parts, {"axis": 0})
        graph.append(_made(whole))
        whole.name, whole.shape, whole.type = name, ir.Shape([len(parts)]), ir.TensorType(_FLOAT)
        graph.outputs.append(whole)
    return model, probes


def _owner(name: str, owners: dict[str, str]) -> str:
    """The portable node that a node is, or is a piece of (``NODE.MatMul``)."""
    while name not in owners and "." in name:
        name = name.rpartition(".")[0]
    return name


def _op(operator: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None) -> ir.Value:
    return ir.node(operator, inputs, attributes).outputs[0]


def _made(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise TypeError(f"{value.name!r} is no node's result")
    return node


def _between(start: ir.Value, ends: tuple[ir.Value, ...]) -> list[ir.Node]:
    """The nodes that compute ``ends`` from ``start``, each after what it reads."""
    found: list[ir.Node] = []

    def visit(value: ir.Value) -> None:
        node = value.producer()
        if value is start or node is None or node in found or node.graph is not None:
            return
        for before in node.inputs:
            if before is not None:
                visit(before)
        found.append(node)

    for end in ends:
        visit(end)
    return found
