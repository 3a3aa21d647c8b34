"""The layers of a step graph that can be quantised: products of matrices, convolutions, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

from lehr.calibration.keep_high import dependents, writers
from lehr.engines.graph.cost import flops
from lehr.engines.graph.passes.decompose_attention import plain_attention
from lehr.runtime.errors import InvalidInput

QUANTISERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})

# Operators between a weight and its product that only rearrange or widen it.
_VIEWS = frozenset({"Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_SAMPLE_NAMES = ("sample", "hidden_states")


class Kind(str, Enum):
    """What a layer computes."""

    MATMUL = "matmul"  # activations times a weight
    CONV = "conv"
    PRODUCT = "product"  # activations times activations
    ATTENTION = "attention"  # both products and the softmax between them


class Role(str, Enum):
    """Why a layer may need more digits than the others."""

    FIRST = "first"  # no other layer stands between it and the sample
    LAST = "last"  # writes the prediction: nothing damps its errors
    CONDITIONING = "conditioning"  # does not depend on the sample, so it errs alike at every step
    SHORTCUT = "shortcut"  # carries a residual stream past other layers, so what it loses the stream has lost
    POINTWISE = "pointwise"  # a convolution of single pixels: of those around it, little of the arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer.

    Attributes:
        name: of its node.
        group: the module path that it was traced in.
        inputs: names of the activations that it multiplies: one beside a weight, else two, and three of attention.
        output: name of its result.
        weight: name of the initialiser, if it has one; its shape is ``weight_shape``, as stored.
        nbytes: of the weight, as stored.
        macs: multiplications at the sizes that were asked for; 0 where shapes are unknown.
        roles: see :class:`Role`.
    """

    name: str
    kind: Kind
    group: str
    inputs: tuple[str, ...]
    output: str
    weight: str | None
    weight_shape: tuple[int, ...]
    nbytes: int
    macs: int
    roles: frozenset[Role]

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return math.prod(self.weight_shape) if self.weight is not None else 0


def layers(model: ir.Model, sizes: Mapping[str, int] | None = None, *, sample: str | None = None) -> tuple[Layer, ...]:
    """Every layer of a step graph that can be quantised, in the order of the graph.

    Args:
        model: a portable graph; weights are not read.
        sizes: the dimensions at which multiplications are counted, such as ``spec.default_sizes(batch=2)``.
        sample: name of the input that is the sample; by default ``sample`` or ``hidden_states``, else the first.

    Raises:
        InvalidInput: the graph is quantised already.
    """
    refuse_quantised(model)
    sample = sample or _sample_of(model)
    moving, last = dependents(model, sample), writers(model)
    behind = _behind_products(model)
    found = []
    for node in model.graph:
        kind = kind_of(node)
        if kind is None:
            continue
        weight = weight_of(node)
        value = node.inputs[0]
        roles = set()
        if value is not None and value not in moving and kind is not Kind.ATTENTION:
            roles.add(Role.CONDITIONING)
        elif node not in behind:
            roles.add(Role.FIRST)
        if node in last:
            roles.add(Role.LAST)
        if weight is not None and _is_shortcut(node):
            roles.add(Role.SHORTCUT)
        if kind is Kind.CONV and weight is not None and set(_static(weight)[2:]) == {1}:
            roles.add(Role.POINTWISE)
        count = {Kind.ATTENTION: 3, Kind.PRODUCT: 2}.get(kind, 1)
        found.append(
            Layer(
                name=node.name or "",
                kind=kind,
                group=(node.name or "").rpartition("/")[0],
                inputs=tuple(str(v.name) for v in node.inputs[:count] if v is not None),
                output=str(node.outputs[0].name),
                weight=None if weight is None else weight.name,
                weight_shape=() if weight is None else _static(weight),
                nbytes=0 if weight is None else _bytes(weight),
                macs=flops(node, sizes) // 2 if sizes else 0,
                roles=frozenset(roles),
            )
        )
    return tuple(found)


def probabilities_of(layer: str) -> str:
    """What the largest of an attention's probabilities, which no tensor of the portable graph holds, is called."""
    return f"{layer}.probabilities"


def kind_of(node: ir.Node) -> Kind | None:
    """The kind of layer that a node is; None for one that cannot be quantised."""
    if node.op_type == "Attention":
        return Kind.ATTENTION if plain_attention(node) else None  # quantisers stand between its pieces
    if node.op_type == "MatMul":
        return Kind.MATMUL if weight_of(node) is not None else Kind.PRODUCT
    if node.op_type == "Gemm" and weight_of(node) is not None and _plain_gemm(node):
        return Kind.MATMUL
    if node.op_type == "Conv" and weight_of(node) is not None:
        return Kind.CONV
    return None


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initialiser behind a product's second operand, through what only rearranges it; None if there is none."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in _VIEWS:
            return None
        value = producer.inputs[0]
    if value is None or value.dtype is None or not value.dtype.is_floating_point():
        return None
    return value if value.shape is not None and value.shape.is_static() and value.shape.rank() >= 2 else None


def refuse_quantised(model: ir.Model) -> None:
    """Raise InvalidInput for a graph that holds quantisers already."""
    for node in model.graph:
        if node.op_type in QUANTISERS:
            raise InvalidInput(
                f"the graph is quantised already: node {node.name!r} is a {node.op_type}. Calibration starts from the "
                "portable graph in floating point; export the model again."
            )


def _plain_gemm(node: ir.Node) -> bool:
    """Whether it is x W + b with nothing scaled and x as it is."""
    attributes = node.attributes
    scaled = any(name in attributes and attributes[name].as_float() != 1.0 for name in ("alpha", "beta"))
    return not scaled and not ("transA" in attributes and attributes["transA"].as_int())


def _sample_of(model: ir.Model) -> str:
    names = [str(value.name) for value in model.graph.inputs]
    return next((name for name in _SAMPLE_NAMES if name in names), names[0])


def _behind_products(model: ir.Model) -> set[ir.Node]:
    """Nodes that read something that a layer computed."""
    late: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in model.graph:
        if any(value in late for value in node.inputs):
            found.add(node)
            late.update(node.outputs)
        elif kind_of(node) is not None:
            late.update(node.outputs)
    return found


def _is_shortcut(node: ir.Node) -> bool:
    """Whether a layer's result is added to what other layers make of the same input."""
    value, source = node.outputs[0], node.inputs[0]
    total, other = _sum_of(value)
    if total is not None and other is not None and other.is_initializer():  # its own bias comes first
        value = total.outputs[0]
        total, other = _sum_of(value)
    if total is None or other is None or source is None:
        return False
    waiting = [(reader, False) for reader, _ in source.uses() if reader is not node]
    seen: set[tuple[ir.Node, bool]] = set()
    while waiting:
        current, passed = waiting.pop()
        if (current, passed) in seen or current is total:
            continue
        seen.add((current, passed))
        passed = passed or kind_of(current) is not None
        if passed and other in current.outputs:
            return True
        waiting += [(reader, passed) for made in current.outputs for reader, _ in made.uses()]
    return False


def _sum_of(value: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """The sum that a value goes into and nothing else does, and its other operand."""
    readers = [reader for reader, _ in value.uses() if reader.op_type != "Shape"]
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None, None
    return readers[0], next((operand for operand in readers[0].inputs if operand is not value), None)


def _static(value: ir.Value) -> tuple[int, ...]:
    return () if value.shape is None else tuple(int(size) for size in value.shape.numpy())


def _bytes(value: ir.Value) -> int:
    return 0 if value.dtype is None else math.ceil(math.prod(_static(value)) * value.dtype.itemsize)
