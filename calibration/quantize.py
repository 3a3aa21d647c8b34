"""Quantisers in a graph: from a plan, a configuration for each layer, to standard QuantizeLinear and DequantizeLinear.

The type of a configuration selects its handler. What comes out computes the same on every library: activations are
rounded with one scale a tensor, weights with one each output (or block), and whoever knows how fuses
DequantizeLinear, DequantizeLinear and a product into one product of integers. Layers that read one tensor and are
quantised alike share its quantiser. Weights stay lazy: they are rounded when the graph is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
    ZeroPoint,
    config_to_json,
)
from lehr.calibration.layers import Kind, Layer, layers, probabilities_of
from lehr.calibration.numbers import E4M3_LARGEST, INT_LEVELS, affine, scales_of
from lehr.calibration.observed import Statistics
from lehr.calibration.rewrite import Rewrite
from lehr.calibration.smoothing import awq, smooth
from lehr.engines.graph.lowering import set_opset
from lehr.engines.graph.passes.dead_code import remove_dead_code
from lehr.engines.graph.passes.decompose_attention import decompose_attention
from lehr.engines.graph.passes.draft import constant_of
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import Format

__all__ = ["HANDLERS", "Config", "Float4", "Float8", "Int8", "Keep", "WeightOnly", "applies", "quantize"]

Array = npt.NDArray[Any]
Handler = Callable[[Rewrite, Sequence[Layer], Any], None]

OPSET = 23  # knows blocks, 4-bit integers (21) and E2M1
SOFTMAX_SCALE = 1 / E4M3_LARGEST  # shares end at 1; TensorRT fuses fp8 attention with this one only
MAX_EMBEDDED = 512  # elements of a constant that stands in the graph's own file
CHOICES = "lehr.quantised"  # graph metadata: JSON, layer -> what was chosen for it
_FLOAT = ir.DataType.FLOAT

_KINDS: dict[type[Any], frozenset[Kind]] = {
    Keep: frozenset(Kind),
    WeightOnly: frozenset({Kind.MATMUL, Kind.CONV}),
    Float4: frozenset({Kind.MATMUL}),
    Int8: frozenset({Kind.MATMUL, Kind.CONV, Kind.ATTENTION}),
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
    rewrite = Rewrite(model=model, statistics=statistics)
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


def _keep(rewrite: Rewrite, members: Sequence[Layer], config: Keep) -> None:
    """Nothing."""


def _int8(rewrite: Rewrite, members: Sequence[Layer], config: Int8) -> None:
    if members[0].kind is Kind.ATTENTION:
        _attention(rewrite, members[0], config)
        return
    statistics = rewrite.statistics.of(members[0].inputs[0])
    factors = None
    if config.alphas:
        factors = smooth(rewrite.by_channel(members), statistics, config.alphas, config.activation, config.zero)
    low, high = statistics.interval_of(config.activation, config.zero, divisors=factors)
    source = rewrite.divided(members, factors)
    scale, zero = affine(low, high) if config.zero is ZeroPoint.OWN else (scales_of(np.array(high), INT_LEVELS[8]), 0)
    quantised = rewrite.around(source, scale, Format.INT8, rewrite.node(members[0]), zero=zero)
    for layer in members:
        rewrite.weight(layer, config, Format.INT8, statistics, factors)
        rewrite.feed(layer, quantised)
        rewrite.chosen(layer, config, activation=float(scale), factors=factors, zero=zero)


def _weight_only(rewrite: Rewrite, members: Sequence[Layer], config: WeightOnly) -> None:
    statistics = rewrite.statistics.of(members[0].inputs[0])
    factors = awq(partial(rewrite.weight_error, members, config, statistics), statistics, config.alphas)
    source = rewrite.divided(members, factors) if factors is not None else None
    for layer in members:
        rewrite.weight(layer, config, config.format, statistics, factors)
        if source is not None:
            rewrite.feed(layer, source)
        rewrite.chosen(layer, config, activation=None, factors=factors)


def _float8(rewrite: Rewrite, members: Sequence[Layer], config: Float8) -> None:
    if members[0].kind is Kind.ATTENTION:
        _attention(rewrite, members[0], config)
        return
    statistics = rewrite.statistics.of(members[0].inputs[0])
    scale = scales_of(np.array(statistics.range_of(config.activation)), E4M3_LARGEST)
    node = rewrite.node(members[0])
    quantised = rewrite.around(cast("ir.Value", node.inputs[0]), scale, Format.FP8, node)
    for layer in members:
        rewrite.weight(layer, config, Format.FP8, statistics, None)
        rewrite.feed(layer, quantised)
        rewrite.chosen(layer, config, activation=float(scale), factors=None)


def _attention(rewrite: Rewrite, layer: Layer, config: Int8 | Float8) -> None:
    """Both products in 8 bits: the node is taken apart, since no quantiser fits between its softmax and its product."""
    node, statistics = rewrite.node(layer), rewrite.statistics
    names = [str(value.name) for value in node.inputs[:3] if value is not None]
    query, key, value = (statistics.of(name).range_of(config.activation) for name in names)
    readers = list(node.outputs[0].uses())
    decompose_attention(rewrite.model, [layer.name])
    for reader, place in readers[:1]:
        cast("ir.Value", reader.inputs[place]).name = layer.output  # whoever looks for the layer's result finds it
    pieces = [piece for piece in rewrite.model.graph if (piece.name or "").startswith(f"{layer.name}.")]
    by_query, by_probability = (piece for piece in pieces if piece.op_type == "MatMul")
    query *= _factor(by_query.inputs[0])
    zero = 0
    if isinstance(config, Float8):
        form, steps = Format.FP8, [limit / E4M3_LARGEST for limit in (query, key, value)]
        probability = np.array(SOFTMAX_SCALE)
    else:
        form, steps = Format.INT8, [limit / INT_LEVELS[8] for limit in (query, key, value)]
        largest = statistics.of(probabilities_of(layer.name)).high
        own = config.zero is ZeroPoint.OWN
        probability, zero = affine(0.0, largest) if own else (np.array(largest / INT_LEVELS[8]), 0)
    scales = [scales_of(np.array(step), 1.0) for step in steps]
    places = [
        (by_query, 0, scales[0], 0),
        (by_query, 1, scales[1], 0),
        (by_probability, 0, scales_of(np.array(probability), 1.0), zero),
        (by_probability, 1, scales[2], 0),
    ]
    for piece, k, scale, origin in places:
        source = cast("ir.Value", piece.inputs[k])
        piece.replace_input_with(k, rewrite.around(source, scale, form, piece, zero=origin))
    rewrite.chosen(layer, config, activation=float(scales[0]), factors=None, zero=zero)


def _factor(scaled: ir.Value | None) -> float:
    """What queries are multiplied by before their product."""
    producer = None if scaled is None else scaled.producer()
    if producer is None or producer.op_type != "Mul":
        return 1.0
    constant = constant_of(producer.inputs[1])
    return abs(float(constant.reshape(-1)[0])) if constant is not None else 1.0


HANDLERS: dict[type[Any], Handler] = {
    Keep: _keep,
    WeightOnly: _weight_only,
    Int8: _int8,
    Float8: _float8,
    Float4: _weight_only,
}
