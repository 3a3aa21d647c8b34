"""A portable graph as a PyTorch module: for compilers that take modules, from a bundle whose module is long gone.

Every operator of the graph becomes the PyTorch function of the same meaning, at the time the module is called, so what
``torch.export`` traces is the graph. Arithmetic on sizes stays in Python: a size is an ``int`` or a symbol of the
trace, and a vector of sizes is a list of those.

An input ``NAME.shape`` (:class:`lehr.runtime.spec.GraphSpec`) is a vector of sizes, too. A trace can take no sizes from
the values of a tensor, so the module takes instead a tensor that has this shape, and does not look at its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lehr.export.graph_operators import OPERATORS, SIZES
from lehr.export.graph_sizes import Sizes
from lehr.runtime.errors import BuildFailed
from lehr.runtime.hoisted import SHAPE_SUFFIX

MAX_SIZES = 64  # integers of an initialiser that may stand for sizes

Value = Tensor | Sizes
Step = tuple[str, Callable[..., Any], tuple[str | None, ...], tuple[str, ...], Mapping[str, Any]]


class GraphModule(nn.Module):
    """The module; its inputs are positional and in the graph's order, its outputs a tuple.

    Args:
        graph: an ONNX file with its weights beside it; flat, as Lehr's are.

    Raises:
        BuildFailed: an operator that has no counterpart here; with the node's name.
    """

    def __init__(self, graph: Path) -> None:
        super().__init__()
        model = ir.load(graph)
        self.inputs = tuple(str(value.name) for value in model.graph.inputs)
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        self.shapes = {str(value.name): _shape(value) for value in model.graph.inputs}
        self._sizes: dict[str, Sizes] = {}
        self._weights: dict[str, str] = {}
        # What decides sizes or fills them must be a number when the graph is traced.
        takers = [node for node in model.graph if node.op_type in ("Resize", "Pad") and len(node.inputs) > 2]
        self._numbers = {node.inputs[2].name for node in takers if node.inputs[2] is not None}
        for name, value in model.graph.initializers.items():
            if value.const_value is not None:
                self._keep(name, value.const_value)
        self._steps = [self._step(node) for node in model.graph if not self._constant(node)]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        known: dict[str, Value] = dict(self._sizes)
        known |= {name: self.get_buffer(buffer) for name, buffer in self._weights.items()}
        for name, tensor in zip(self.inputs, given, strict=True):
            known[name] = Sizes(list(tensor.shape)) if name.endswith(SHAPE_SUFFIX) else tensor
        device = next((v.device for v in known.values() if isinstance(v, Tensor)), given[0].device)
        with device:  # where what is made of sizes alone comes to lie
            self._compute(known, device)
        found = [known[name] for name in self.outputs]
        return tuple(value.tensor(device) if isinstance(value, Sizes) else value for value in found)

    def _compute(self, known: dict[str, Value], device: torch.device) -> None:
        for _, function, inputs, outputs, attributes in self._steps:
            operands = [None if name is None else known[name] for name in inputs]
            if function not in SIZES:
                operands = [value.tensor(device) if isinstance(value, Sizes) else value for value in operands]
            results = function(*operands, **attributes)
            results = results if isinstance(results, tuple) else (results,)
            known |= dict(zip(outputs, results, strict=False))

    # ------------------------------------------------------------------------------------------------ reading

    def _keep(self, name: str, tensor: ir.TensorProtocol) -> None:
        array = tensor.numpy()
        if array.dtype == np.float32 and (array.ndim == 0 or name in self._numbers):  # a Range may start from a number
            self._sizes[name] = Sizes(array.tolist(), torch.float32)
            return
        if array.dtype == np.int64 and array.ndim <= 1 and array.size <= MAX_SIZES:
            self._sizes[name] = Sizes(array.tolist() if array.ndim else int(array))
            return
        buffer = f"w{len(self._weights)}"
        self.register_buffer(buffer, _tensor(array))
        self._weights[name] = buffer

    def _constant(self, node: ir.Node) -> bool:
        """Whether the node is a constant, which is then kept like a weight."""
        value = node.attributes.get("value") if node.op_type == "Constant" else None
        if value is None:
            return False
        self._keep(str(node.outputs[0].name), value.as_tensor())
        return True

    def _step(self, node: ir.Node) -> Step:
        function = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if function is None:
            raise BuildFailed(
                f"node {node.name!r}: {node.op_type} has no counterpart in PyTorch that Lehr knows of. "
                "Build with another library."
            )
        attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
        if node.op_type == "Split":
            attributes["parts"] = len(node.outputs)
        inputs = tuple(None if value is None else str(value.name) for value in node.inputs)
        return f"{node.name}", function, inputs, tuple(str(value.name) for value in node.outputs), attributes


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape or ())


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
