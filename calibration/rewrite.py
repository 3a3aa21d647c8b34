"""A step graph while quantisers are put into it: nodes around activations, rounded weights, corrected biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.configs import Config, WeightOnly, config_to_json, rounds_together, to_nearest
from lehr.calibration.layers import Kind, Layer
from lehr.calibration.observed import Statistics, TensorStatistics
from lehr.calibration.weights import TYPES, Rounded, as_matrix, round_weight, weight_source
from lehr.runtime.recipe import Format

Array = npt.NDArray[Any]

MAX_EMBEDDED = 512  # elements of a constant that stands in the graph's own file
_FLOAT = ir.DataType.FLOAT


@dataclass(slots=True)
class Rewrite:
    """The graph while it is rewritten."""

    model: ir.Model
    statistics: Statistics
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    _nodes: dict[str, ir.Node] = field(default_factory=dict)
    _sources: dict[str, Callable[[], Array]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in self.model.graph:
            self._nodes[node.name or ""] = node
            self._names.update(str(value.name) for value in node.outputs)
        self._names.update(self.model.graph.initializers)

    def node(self, layer: Layer) -> ir.Node:
        return self._nodes[layer.name]

    def chosen(
        self, layer: Layer, config: Config, *, activation: float | None, factors: Array | None, zero: int = 0
    ) -> None:
        """Keep what was chosen for a layer, for the record."""
        self.choices[layer.name] = {
            "config": config_to_json(config),
            "activation_scale": activation,
            "activation_zero": zero,
            "scaled_channels": factors is not None,
            "rounding": "gptq" if layer.name in self.statistics.grams and rounds_together(config) else "nearest",
        }

    # ------------------------------------------------------------------------------------------------ activations

    def around(self, value: ir.Value, scale: Array, form: Format, before: ir.Node, *, zero: int = 0) -> ir.Value:
        """``value`` rounded to ``form`` and back; ``zero`` is the number that 0 becomes."""
        dtype = TYPES[form]
        name = f"{value.name}.{form.value}"
        step = self.constant(f"{name}.scale", np.float32(scale), _FLOAT)
        origin = self.constant(f"{name}.zero", np.array(zero, dtype.numpy()), dtype)
        small = self.op("QuantizeLinear", [value, step, origin], name, dtype, value.shape, before)
        return self.op("DequantizeLinear", [small, step, origin], f"{name}.wide", _FLOAT, value.shape, before)

    def divided(self, members: Sequence[Layer], factors: Array | None) -> ir.Value:
        """What the layers read, its channels divided by ``factors``."""
        node = self.node(members[0])
        value = cast("ir.Value", node.inputs[0])
        if factors is None:
            return value
        inverse = (1 / np.asarray(factors, np.float64)).astype(np.float32)
        if members[0].kind is Kind.CONV:
            inverse = inverse.reshape(-1, *[1] * (len(members[0].weight_shape) - 2))
        divisor = self.constant(f"{value.name}.inverse", inverse, _FLOAT)
        return self.op("Mul", [value, divisor], f"{value.name}.even", _FLOAT, value.shape, node)

    def feed(self, layer: Layer, value: ir.Value) -> None:
        """Let a layer read ``value``."""
        self.node(layer).replace_input_with(0, value)

    # --------------------------------------------------------------------------------------------------- weights

    def by_channel(self, members: Sequence[Layer]) -> list[Array]:
        """(C, M): each layer's weight, a row an input channel."""
        found = []
        for layer in members:
            weight = self._read(layer, None)
            if layer.kind is Kind.CONV:
                weight = np.ascontiguousarray(
                    weight.transpose(1, 0, *range(2, weight.ndim)).reshape(weight.shape[1], -1)
                )
            found.append(weight)
        return found

    def weight_error(
        self, members: Sequence[Layer], config: Config, statistics: TensorStatistics, factors: Array | None
    ) -> float:
        """Mean squared error of the layers' results by rounding their weights alone; inputs taken as independent."""
        total = 0.0
        for layer in members:
            rounded = self._rounded(layer, config, cast("WeightOnly", config).format, statistics, factors, exact=False)
            difference = rounded.restored() - self._read(layer, factors)
            square = np.moveaxis(difference, 0 if layer.kind is Kind.MATMUL else 1, 0).reshape(len(statistics.mean), -1)
            given = np.ones(len(statistics.mean)) if factors is None else factors
            total += float((statistics.square / given**2) @ (square.astype(np.float64) ** 2).sum(axis=1))
        return total

    def weight(
        self, layer: Layer, config: Config, form: Format, statistics: TensorStatistics, factors: Array | None
    ) -> None:
        """Let a layer multiply with its rounded weight, and take back what rounding adds on average."""
        node = self.node(layer)
        self._read(layer, None)  # first: where the weight comes from is seen in the graph as it was
        if node.op_type == "Gemm":
            node = self._as_matmul(layer, node)
        rounded = self._rounded(layer, config, form, statistics, factors, exact=True)
        difference = as_matrix(layer, rounded.restored() - self._read(layer, factors))
        mean = statistics.mean if factors is None else statistics.mean / factors
        each = len(difference) // len(mean)  # taps of a convolution's kernel
        self._correct_bias(layer, -(np.repeat(mean, each) @ difference))
        name, dtype = f"{layer.name}.weight", TYPES[form]
        wide = self._weight_scales(rounded, name, node)
        kind = ir.Value(name=f"{name}.{form.value}", shape=ir.Shape(rounded.shape), type=ir.TensorType(dtype))
        kind.const_value = ir.LazyTensor(
            partial(_tensor, rounded, dtype, str(kind.name)), dtype=dtype, shape=ir.Shape(rounded.shape), name=kind.name
        )
        self.model.graph.register_initializer(kind)
        attributes = {"axis": rounded.axis} | ({"block_size": rounded.block} if rounded.block else {})
        shape = ir.Shape(rounded.shape)
        value = self.op("DequantizeLinear", [kind, wide], name, _FLOAT, shape, node, attributes)
        node.replace_input_with(1, value)

    def _weight_scales(self, rounded: Rounded, name: str, before: ir.Node) -> ir.Value:
        if rounded.top is None:
            return self.constant(f"{name}.scale", rounded.scales, _FLOAT)
        small = self.constant(f"{name}.scales", rounded.scales, ir.DataType.FLOAT8E4M3FN)
        top = self.constant(f"{name}.top", np.float32(rounded.top), _FLOAT)
        return self.op("DequantizeLinear", [small, top], f"{name}.scale", _FLOAT, small.shape, before)

    def _read(self, layer: Layer, factors: Array | None) -> Array:
        if layer.name not in self._sources:
            self._sources[layer.name] = weight_source(self.node(layer))
        return _scaled_weight(layer, self._sources[layer.name], factors)

    def _rounded(
        self,
        layer: Layer,
        config: Config,
        form: Format,
        statistics: TensorStatistics,
        factors: Array | None,
        *,
        exact: bool,
    ) -> Rounded:
        """``exact`` False leaves out GPTQ, whose result does not decide between factors."""
        square = statistics.square if factors is None else statistics.square / factors**2
        gram = self.statistics.grams.get(layer.name) if exact else None
        if not exact or layer.name in self.statistics.without_gram:
            config = to_nearest(config)
        if gram is not None and factors is not None:
            each = np.repeat(factors, len(gram) // len(factors)).astype(np.float64)
            gram = gram / np.outer(each, each)
        read = partial(self._read, layer, factors)
        return round_weight(layer, read, config, form, importance=square, gram=gram)

    def _as_matmul(self, layer: Layer, node: ir.Node) -> ir.Node:
        """A Gemm as MatMul and Add: ONNX Runtime takes quantised Gemms for its own kind, wrongly for fp8."""
        weight, bias = node.inputs[1], (*node.inputs, None)[2]
        shape, name = node.outputs[0].shape, str(node.outputs[0].name)
        transposed = "transB" in node.attributes and bool(node.attributes["transB"].as_int())
        if transposed and weight is not None:
            turned = None if weight.shape is None else ir.Shape([weight.shape[1], weight.shape[0]])
            attributes = {"perm": [1, 0]}
            weight = self.op("Transpose", [weight], f"{layer.name}.turned", _FLOAT, turned, node, attributes)
        made = self.op("MatMul", [node.inputs[0], weight], f"{layer.name}.product", _FLOAT, shape, node)
        product = cast("ir.Node", made.producer())
        if bias is not None:
            made = self.op("Add", [made, bias], f"{layer.name}.sum", _FLOAT, shape, node)
        old = node.outputs[0]
        old.name = f"{name}.replaced"
        made.name = name
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)
        self._nodes[layer.name] = product
        product.name = layer.name
        return product

    def _correct_bias(self, layer: Layer, change: Array) -> None:
        """Add ``change`` (N,) to the layer's bias, if it has one of its own."""
        reader, index = self._bias(layer)
        if reader is None:
            return
        value = cast("ir.Value", reader.inputs[index])
        tensor = cast("ir.TensorProtocol", value.const_value)
        array = np.array(tensor.numpy())
        if array.reshape(-1).shape != change.shape:
            return
        corrected = (array.astype(np.float64) + change.reshape(array.shape)).astype(array.dtype)
        made = self.constant(f"{layer.name}.bias", corrected, value.dtype or _FLOAT)
        reader.replace_input_with(index, made)

    def _bias(self, layer: Layer) -> tuple[ir.Node | None, int]:
        """The node that adds a layer's bias, and which of its inputs that is."""
        node = self.node(layer)
        if node.op_type == "Conv":
            given = len(node.inputs) > 2 and node.inputs[2] is not None and _is_stored(node.inputs[2])
            return (node, 2) if given else (None, 0)
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if len(readers) == 1 and readers[0].op_type == "Add":
            for k, value in enumerate(readers[0].inputs):
                if value is not node.outputs[0] and _is_stored(value):
                    return readers[0], k
        return None, 0

    # ----------------------------------------------------------------------------------------------------- making

    def constant(self, name: str, array: npt.ArrayLike, dtype: ir.DataType) -> ir.Value:
        """A constant in the graph, or among its weights if it is large: a graph's own file ends at 2 GB."""
        name, shape = self._free(name), ir.Shape(np.shape(array))
        whole = ir.tensor(np.asarray(array), dtype=dtype, name=name)
        lazy = ir.LazyTensor(lambda: whole, dtype=dtype, shape=shape, name=name)
        tensor = lazy if whole.size > MAX_EMBEDDED else whole
        made = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
        self.model.graph.register_initializer(made)
        return made

    def op(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        before: ir.Node,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        name = self._free(name)
        result = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        node = ir.node(operator, list(inputs), dict(attributes or {}), outputs=[result], name=f"{name}/{operator}")
        self.model.graph.insert_before(before, node)
        return result

    def _free(self, name: str) -> str:
        free, number = name, 0
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names.add(free)
        return free


def _scaled_weight(layer: Layer, read: Callable[[], Array], factors: Array | None) -> Array:
    weight = read()
    if factors is None:
        return weight
    along = [1] * weight.ndim
    along[0 if layer.kind is Kind.MATMUL else 1] = -1
    return np.asarray(weight * np.asarray(factors, np.float32).reshape(along))


def _tensor(rounded: Rounded, dtype: ir.DataType, name: str) -> ir.Tensor[Any]:
    return ir.Tensor(np.ascontiguousarray(rounded.numbers()), dtype=dtype, name=name)


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None
