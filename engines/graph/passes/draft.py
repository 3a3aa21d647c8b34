"""Nodes that are to take one node's place: made, typed and named after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Attributes = Mapping[str, int | float | str | Sequence[int]]


class Draft:
    """Writes nodes before ``node`` and, at the end, puts their result in its place.

    Args:
        node: in a graph; the new nodes are called ``NAME.OPERATOR`` after it, and so are their results.
    """

    def __init__(self, node: ir.Node) -> None:
        graph = node.graph
        if not isinstance(graph, ir.Graph):
            raise TypeError(f"node {node.name!r} is in no graph")  # a programming error: passes walk graphs
        self.node, self.graph = node, graph
        self._taken = {value.name for other in graph for value in other.outputs} | set(graph.initializers)

    def op(
        self,
        operator: str,
        *inputs: ir.Value | None,
        attributes: Attributes | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        role: str | None = None,
        domain: str = "",
    ) -> ir.Value:
        """A node's only result; ``dtype`` is the first input's unless given, ``role`` a name to say what it is."""
        first = next((value for value in inputs if value is not None), None)
        dtype = dtype or (first.dtype if first is not None else None)
        name = self._name(role or operator)
        result = ir.Value(name=name, shape=shape, type=None if dtype is None else ir.TensorType(dtype))
        made = ir.node(operator, list(inputs), dict(attributes or {}), domain=domain, outputs=[result], name=name)
        self.graph.insert_before(self.node, made)
        return result

    def constant(self, array: npt.ArrayLike, like: ir.DataType | None, role: str) -> ir.Value:
        """A small constant, embedded in the graph, float32 unless ``like`` says; equal ones of one graph are one."""
        like = like or ir.DataType.FLOAT
        tensor = ir.tensor(np.asarray(array, dtype=like.numpy()), dtype=like)
        for value in self.graph.initializers.values():
            if _same(value.const_value, tensor):
                return value
        tensor.name = self._name(role)
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(like), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def finish(self, result: ir.Value) -> None:
        """Let ``result`` stand for the node's first output, under its name, and remove the node."""
        replace(self.node, result)

    def _name(self, what: str) -> str:
        base = f"{self.node.name}.{what}"
        name, number = base, 0
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name


def replace(node: ir.Node, result: ir.Value) -> None:
    """Put ``result`` where the first output of ``node`` was, and remove ``node``; nobody may use its other outputs.

    A graph output keeps its name, type and shape; where ``result`` cannot bear that name (it is an input, a weight or
    an output itself), an Identity does.
    """
    graph, old = node.graph, node.outputs[0]
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node {node.name!r} is in no graph")
    if old.is_graph_output():
        producer = result.producer()
        if producer is None or result.is_graph_output():
            kept = ir.node("Identity", [result], name=node.name)
            graph.insert_before(node, kept)
            result = kept.outputs[0]
        name = old.name
        old.name = f"{name}.replaced"
        result.name, result.shape, result.type = name, old.shape, old.type
    elif result.shape is None:
        result.shape = old.shape
    if result.type is None:
        result.type = old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator cannot be without."""
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"node {node.name!r}: {node.op_type} has no input {index}")  # no valid graph has that
    return value


def rank_of(value: ir.Value | None) -> int | None:
    """Number of dimensions, where it is known."""
    return None if value is None or value.shape is None else value.shape.rank()


def constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of a constant embedded in the graph, or None: weights are nobody's to read."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None:
        producer = value.producer()
        if producer is None or producer.op_type != "Constant" or "value" not in producer.attributes:
            return None
        tensor = producer.attributes["value"].as_tensor()
    return None if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) else tensor.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    array = constant_of(value)
    return None if array is None or array.size != 1 else float(array.reshape(-1)[0])


def _same(tensor: ir.TensorProtocol | None, other: ir.TensorProtocol) -> bool:
    if tensor is None or isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
        return False
    return (tensor.dtype, tensor.shape) == (other.dtype, other.shape) and tensor.tobytes() == other.tobytes()
