"""Quantisers in a graph: from a plan, a configuration for each layer, to standard QuantizeLinear and DequantizeLinear.

The type of a configuration selects its handler. What comes out computes the same on every library: activations are
rounded with one scale a tensor, weights with one each output (or block), and whoever knows how fuses
DequantizeLinear, DequantizeLinear and a product into one product of integers. Layers that read one tensor and are
quantised alike share its quantiser. Weights stay lazy: they are rounded when the graph is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.configs import (
    Config,
    Float4,
    Float8,
    Int8,
    Keep,
    WeightOnly,
    config_to_json,
    rounds_together,
    to_nearest,
)
from lehr.calibration.layers import Kind, Layer, layers
from lehr.calibration.numbers import E4M3_LARGEST, INT_LEVELS, scales_of
from lehr.calibration.observers import Statistics, TensorStatistics
from lehr.calibration.smoothing import awq, smooth
from lehr.calibration.weights import TYPES, Rounded, as_matrix, round_weight, weight_source
from lehr.engines.graph.lowering import set_opset
from lehr.engines.graph.passes.dead_code import remove_dead_code
from lehr.engines.graph.passes.decompose_attention import decompose_attention
from lehr.engines.graph.passes.draft import constant_of
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import Format

__all__ = ["HANDLERS", "Config", "Float4", "Float8", "Int8", "Keep", "WeightOnly", "applies", "quantize"]

Array = npt.NDArray[Any]
Handler = Callable[["_Rewrite", Sequence[Layer], Any], None]

OPSET = 23  # knows blocks, 4-bit integers (21) and E2M1
SOFTMAX_SCALE = 1 / E4M3_LARGEST  # shares end at 1; TensorRT fuses fp8 attention with this one only
MAX_EMBEDDED = 512  # elements of a constant that stands in the graph's own file
CHOICES = "lehr.quantised"  # graph metadata: JSON, layer -> what was chosen for it
_FLOAT = ir.DataType.FLOAT

_KINDS: dict[type[Any], frozenset[Kind]] = {
    Keep: frozenset(Kind),
    WeightOnly: frozenset({Kind.MATMUL, Kind.CONV}),
    Float4: frozenset({Kind.MATMUL}),
    Int8: frozenset({Kind.MATMUL, Kind.CONV}),
    Float8: frozenset({Kind.MATMUL, Kind.CONV, Kind.ATTENTION}),
}


def applies(layer: Layer, config: Config) -> bool:
    """Whether a layer of this kind can be quantised so."""
    return layer.kind in _KINDS[type(config)]


def quantize(model: ir.Model, plan: Mapping[str, Config], statistics: Statistics) -> ir.Model:
    """Quantise a step graph.

    Args:
        model: the portable graph, in floating point; changed in place.
        plan: layer -> configuration; layers that it does not name compute as before.
        statistics: of the same graph.

    Returns:
        ``model``; its metadata say what was chosen for each layer (:data:`CHOICES`).

    Raises:
        InvalidInput: a quantised graph, a layer that it has not, a configuration that does not fit the layer, or a
            tensor that was not observed.
    """
    found = {layer.name: layer for layer in layers(model)}
    unknown = sorted(set(plan) - set(found))
    if unknown:
        raise InvalidInput(
            f"the graph has no layers {unknown[:3]} ({len(unknown)} of {len(plan)} in the plan). "
            "The plan is of another graph: calibrate again."
        )
    for name, config in plan.items():
        if not applies(found[name], config):
            raise InvalidInput(
                f"layer {name!r} is a {found[name].kind.value}, and {type(config).__name__} quantises "
                f"{', '.join(sorted(kind.value for kind in _KINDS[type(config)]))} only. Leave it out of the plan."
            )
    if model.opset_imports[""] < OPSET:
        set_opset(model, OPSET)
    rewrite = _Rewrite(model=model, statistics=statistics)
    for config, members in _groups(plan, found):
        HANDLERS[type(config)](rewrite, members, config)
    remove_dead_code(model)
    model.metadata_props[CHOICES] = json.dumps(rewrite.choices, sort_keys=True)
    return model


def _groups(plan: Mapping[str, Config], found: Mapping[str, Layer]) -> list[tuple[Config, list[Layer]]]:
    """Layers that read one tensor and are quantised alike, in the order of the graph."""
    groups: dict[tuple[str, str, Kind], tuple[Config, list[Layer]]] = {}
    for name, layer in found.items():
        config = plan.get(name, Keep())
        apart = name if layer.kind is Kind.ATTENTION else layer.inputs[0]
        key = (apart, json.dumps(config_to_json(config), sort_keys=True), layer.kind)
        groups.setdefault(key, (config, []))[1].append(layer)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------- handlers


def _keep(rewrite: _Rewrite, members: Sequence[Layer], config: Keep) -> None:
    """Nothing."""


def _int8(rewrite: _Rewrite, members: Sequence[Layer], config: Int8) -> None:
    statistics = rewrite.statistics.of(members[0].inputs[0])
    factors = None
    if config.alphas:
        factors = smooth(rewrite.by_channel(members), statistics, config.alphas, config.activation)
    limit = statistics.range_of(config.activation, levels=INT_LEVELS[8], divisors=factors)
    source = rewrite.divided(members, factors)
    scale = scales_of(np.array(limit), INT_LEVELS[8])
    quantised = rewrite.around(source, scale, Format.INT8, rewrite.node(members[0]))
    for layer in members:
        rewrite.weight(layer, config, Format.INT8, statistics, factors)
        rewrite.feed(layer, quantised)
        rewrite.chosen(layer, config, activation=float(scale), factors=factors)


def _weight_only(rewrite: _Rewrite, members: Sequence[Layer], config: WeightOnly) -> None:
    statistics = rewrite.statistics.of(members[0].inputs[0])
    factors = awq(partial(rewrite.weight_error, members, config, statistics), statistics, config.alphas)
    source = rewrite.divided(members, factors) if factors is not None else None
    for layer in members:
        rewrite.weight(layer, config, config.format, statistics, factors)
        if source is not None:
            rewrite.feed(layer, source)
        rewrite.chosen(layer, config, activation=None, factors=factors)


def _float8(rewrite: _Rewrite, members: Sequence[Layer], config: Float8) -> None:
    if members[0].kind is Kind.ATTENTION:
        for layer in members:
            _float8_attention(rewrite, layer, config)
        return
    statistics = rewrite.statistics.of(members[0].inputs[0])
    scale = scales_of(np.array(statistics.range_of(config.activation)), E4M3_LARGEST)
    node = rewrite.node(members[0])
    quantised = rewrite.around(cast("ir.Value", node.inputs[0]), scale, Format.FP8, node)
    for layer in members:
        rewrite.weight(layer, config, Format.FP8, statistics, None)
        rewrite.feed(layer, quantised)
        rewrite.chosen(layer, config, activation=float(scale), factors=None)


def _float8_attention(rewrite: _Rewrite, layer: Layer, config: Float8) -> None:
    """Both products in E4M3: the node is taken apart, since no quantiser fits between its softmax and its product."""
    node = rewrite.node(layer)
    widths = [node.inputs[k] for k in range(3)]
    limits = [rewrite.statistics.of(str(value.name)).range_of(config.activation) for value in widths if value]
    decompose_attention(rewrite.model, [layer.name])
    pieces = [piece for piece in rewrite.model.graph if (piece.name or "").startswith(f"{layer.name}.")]
    products = [piece for piece in pieces if piece.op_type == "MatMul"]
    if len(products) != 2:
        raise InvalidInput(
            f"attention {layer.name!r} cannot be taken apart (a cache, a cap, or shared heads), so it has no fp8 form. "
            "Keep it in the plan."
        )
    by_query, by_weights = products
    query = by_query.inputs[0]
    factor = 1.0
    producer = None if query is None else query.producer()
    if producer is not None and producer.op_type == "Mul":
        constant = constant_of(producer.inputs[1])
        factor = abs(float(constant.reshape(-1)[0])) if constant is not None else 1.0
    scales = [
        (by_query, 0, limits[0] * factor / E4M3_LARGEST),
        (by_query, 1, limits[1] / E4M3_LARGEST),
        (by_weights, 0, SOFTMAX_SCALE),
        (by_weights, 1, limits[2] / E4M3_LARGEST),
    ]
    for piece, k, scale in scales:
        value = cast("ir.Value", piece.inputs[k])
        piece.replace_input_with(k, rewrite.around(value, scales_of(np.array(scale), 1.0), Format.FP8, piece))
    rewrite.chosen(layer, config, activation=float(limits[0] / E4M3_LARGEST), factors=None)


HANDLERS: dict[type[Any], Handler] = {
    Keep: _keep,
    WeightOnly: _weight_only,
    Int8: _int8,
    Float8: _float8,
    Float4: _weight_only,
}


# ------------------------------------------------------------------------------------------------------ rewriting


@dataclass(slots=True)
class _Rewrite:
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

    def chosen(self, layer: Layer, config: Config, *, activation: float | None, factors: Array | None) -> None:
        """Keep what was chosen for a layer, for the record."""
        self.choices[layer.name] = {
            "config": config_to_json(config),
            "activation_scale": activation,
            "scaled_channels": factors is not None,
            "rounding": "gptq" if layer.name in self.statistics.grams and rounds_together(config) else "nearest",
        }

    # ------------------------------------------------------------------------------------------------ activations

    def around(self, value: ir.Value, scale: Array, form: Format, before: ir.Node) -> ir.Value:
        """``value`` rounded to ``form`` and back."""
        dtype = TYPES[form]
        name = f"{value.name}.{form.value}"
        step = self.constant(f"{name}.scale", np.float32(scale), _FLOAT)
        zero = self.constant(f"{name}.zero", np.zeros((), dtype.numpy()), dtype)
        small = self.op("QuantizeLinear", [value, step, zero], name, dtype, value.shape, before)
        return self.op("DequantizeLinear", [small, step, zero], f"{name}.wide", _FLOAT, value.shape, before)

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
