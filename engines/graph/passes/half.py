"""From float32 to half precision (fp16 or bf16), but for the nodes that must keep their range or their digits."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from lehr.engines.graph.passes.draft import constant_of
from lehr.engines.graph.passes.redundant import remove_redundant
from lehr.runtime.errors import InvalidInput

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT = ir.DataType.FLOAT
_CHUNK = 1 << 22  # elements converted at a time

# What only moves data stays in its input's format, so that a tensor is rounded where it is first computed with.
MOVES = frozenset(
    (
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    )
)
_BLIND = frozenset(("Shape", "Size"))  # look at no value


def convert_to_half(
    model: ir.Model, *, keep_high: Collection[str] = (), dtype: ir.DataType = ir.DataType.FLOAT16
) -> ir.passes.PassResult:
    """Let a float32 graph compute in ``dtype``; its inputs and outputs stay float32.

    Nodes in ``keep_high`` compute in float32, and so do those whose operator does not know ``dtype`` and those with a
    constant that it cannot hold (10^5, or an epsilon that it would round to zero). Weights become lazy tensors that
    are converted when they are written; unbound ones are declared as ``dtype`` and converted when they are bound.

    Args:
        model: changed in place.
        keep_high: names of nodes; what the range audit decides (:mod:`lehr.calibration.keep_high`).
        dtype: FLOAT16 or BFLOAT16.

    Raises:
        InvalidInput: another dtype, a name that no node has, or nested graphs; and, when a weight is read, one that
            ``dtype`` cannot hold.
    """
    if dtype not in HALVES:
        raise InvalidInput(f"a graph can be converted to {' or '.join(half.name for half in HALVES)}, not {dtype}.")
    nodes = list(model.graph)
    unknown = sorted(set(keep_high) - {node.name for node in nodes})
    if unknown:
        raise InvalidInput(
            f"the graph has no nodes {unknown[:3]} ({len(unknown)} of {len(keep_high)} names to keep high). "
            "The range audit is of another graph: run lehr audit again."
        )
    for node in nodes:
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            raise InvalidInput(f"node {node.name!r} holds a graph of its own; half precision needs a flat graph.")
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if any(out.dtype is None for node in model.graph for out in node.outputs if out.name):
        common.ShapeInferencePass()(model)
    _Conversion(model, frozenset(keep_high), dtype).run()
    remove_redundant(model)
    common.RemoveUnusedNodesPass()(model)
    return ir.passes.PassResult(model, modified=True)


class _Conversion:
    def __init__(self, model: ir.Model, keep_high: frozenset[str], dtype: ir.DataType) -> None:
        self.graph, self.dtype, self.opset = model.graph, dtype, model.opset_imports[""]
        self.weights = {id(value) for value in model.graph.initializers.values()}
        self.high = {
            node
            for node in model.graph
            if node.name in keep_high or not self._known(node) or any(map(self._unfit, node.inputs))
        }
        self._follow()
        self.made: dict[tuple[int, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        outputs = {id(value): k for k, value in enumerate(self.graph.outputs)}
        for node in list(self.graph):
            if node.op_type in _BLIND:
                continue
            wanted = _FLOAT if node in self.high else self.dtype
            for k, value in enumerate(node.inputs):
                if value is not None and value.dtype in (_FLOAT, self.dtype) and value.dtype != wanted:
                    node.replace_input_with(k, self._as(value, wanted, node))
            if node in self.high:
                continue
            _retype(node, self.dtype)
            for value in node.outputs:
                if value.dtype == _FLOAT:
                    value.type = ir.TensorType(self.dtype)
        for number in outputs.values():
            self._restore_output(number)

    # ---------------------------------------------------------------------------------------- which stay high

    def _follow(self) -> None:
        """Moves take the format of what they move; moves of weights that of who reads them."""
        views = []
        for node in self.graph:
            stored = node.op_type == "Cast" and id(node.inputs[0]) in self.weights
            if (node.op_type not in MOVES and not stored) or node in self.high:
                continue
            moved = [v for v in node.inputs if v is not None and v.dtype == _FLOAT and id(v) not in self.weights]
            if not moved:
                views.append(node)
            elif all(value.producer() is None or value.producer() in self.high for value in moved):
                self.high.add(node)
        for node in reversed(views):
            readers = {reader for value in node.outputs for reader, _ in value.uses()}
            if readers and readers <= self.high:
                self.high.add(node)

    def _known(self, node: ir.Node) -> bool:
        """Whether the operator takes and gives ``dtype`` wherever the node has float32."""
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        except onnx.defs.SchemaError:
            return False
        constraints = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        name = "tensor(float16)" if self.dtype == ir.DataType.FLOAT16 else "tensor(bfloat16)"
        for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
            for k, value in enumerate(values):
                if value is None or value.dtype != _FLOAT:
                    continue
                formal = formals[min(k, len(formals) - 1)]  # the last may stand for many
                if name not in constraints.get(formal.type_str, {formal.type_str}):
                    return False
        return True

    def _unfit(self, value: ir.Value | None) -> bool:
        """Whether a constant becomes infinite or zero."""
        array = constant_of(value)
        if array is None or value is None or value.dtype != _FLOAT:
            return False
        with np.errstate(over="ignore", under="ignore"):
            cast = array.astype(self.dtype.numpy()).astype(np.float32)
        return bool((np.isinf(cast) & ~np.isinf(array)).any() or ((cast == 0) & (array != 0)).any())

    # ------------------------------------------------------------------------------------------- the rewrite

    def _as(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        key = (id(value), wanted)
        if key not in self.made:
            unbound = id(value) in self.weights and value.const_value is None
            if id(value) in self.weights and not (unbound and self._also_high(value)):
                self.made[key] = self._half_weight(value)
            else:
                cast = ir.node("Cast", [value], {"to": int(wanted)}, name=f"{value.name}.{wanted.name.lower()}")
                cast.outputs[0].name = cast.name
                cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(wanted), value.shape
                self.graph.insert_before(reader, cast)
                self.made[key] = cast.outputs[0]
        return self.made[key]

    def _also_high(self, weight: ir.Value) -> bool:
        return any(node in self.high for node, _ in weight.uses())

    def _half_weight(self, weight: ir.Value) -> ir.Value:
        name, tensor = f"{weight.name}.{self.dtype.name.lower()}", weight.const_value
        made = ir.Value(name=name, shape=weight.shape, type=ir.TensorType(self.dtype))
        if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
            read = partial(_converted, tensor, self.dtype, str(weight.name))
            made.const_value = ir.LazyTensor(read, dtype=self.dtype, shape=ir.Shape(tensor.shape), name=name)
        elif tensor is not None:
            made.const_value = _converted(tensor, self.dtype, str(weight.name))
            made.const_value.name = name
        else:  # bound later, by its name
            weight.type = ir.TensorType(self.dtype)
            return weight
        self.graph.register_initializer(made)
        return made

    def _restore_output(self, number: int) -> None:
        value = self.graph.outputs[number]
        if value.dtype != self.dtype:
            return
        name, shape = value.name, value.shape
        value.name = f"{name}.{self.dtype.name.lower()}"
        cast = ir.node("Cast", [value], {"to": int(_FLOAT)}, name=f"{name}.float")
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(_FLOAT), shape
        self.graph.append(cast)
        self.graph.outputs[number] = cast.outputs[0]


def _retype(node: ir.Node, dtype: ir.DataType) -> None:
    """Attributes that name float32, or hold it."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    if node.op_type == "ConstantOfShape":
        fill = node.attributes["value"].as_tensor() if "value" in node.attributes else ir.tensor([0.0], dtype=_FLOAT)
        if fill.dtype == _FLOAT:
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.tensor(fill.numpy().astype(dtype.numpy()), dtype=dtype)
            )


def _converted(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.Tensor[Any]:
    """The tensor in another format, finite wherever it was; the file it lies in is let go.

    Raises:
        InvalidInput: a value that ``dtype`` cannot hold.
    """
    array = _rounded(tensor.numpy().reshape(-1), dtype.numpy(), name)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return ir.Tensor(array.reshape(tensor.shape.numpy()), dtype=dtype)


def _rounded(source: npt.NDArray[Any], dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    result = np.empty(source.shape, dtype)
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        with np.errstate(over="ignore", under="ignore"):
            result[start : start + _CHUNK] = part
        lost = np.isfinite(part) & ~np.isfinite(result[start : start + _CHUNK].astype(np.float32))
        if lost.any():
            raise InvalidInput(
                f"weight {name!r} holds {part[lost][0]:g}, too large for {dtype.name}. "
                "Keep the node that uses it in float32 (lehr audit decides so), or use another recipe."
            )
    return result
