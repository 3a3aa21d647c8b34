"""Weights of layers: read in the orientation that products multiply in, and rounded when they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.configs import INT4_BLOCK, NVFP4_BLOCK, Config, Rounding, WeightOnly
from lehr.calibration.layers import Kind, Layer
from lehr.calibration.numbers import (
    E4M3_LARGEST,
    INT_LEVELS,
    block_scales,
    gptq,
    nearest_e2m1,
    nearest_e4m3,
    nearest_integer,
    nvfp4_scales,
    scales_of,
    spread,
    to_e2m1,
    to_e4m3,
    to_integers,
)
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import Format

Array = npt.NDArray[Any]

TYPES = {
    Format.INT8: ir.DataType.INT8,
    Format.INT4: ir.DataType.INT4,
    Format.FP8: ir.DataType.FLOAT8E4M3FN,
    Format.NVFP4: ir.DataType.FLOAT4E2M1,
}
_NEAREST: Mapping[Format, Callable[[Array], Array]] = {
    Format.INT8: partial(nearest_integer, bits=8),
    Format.INT4: partial(nearest_integer, bits=4),
    Format.FP8: nearest_e4m3,
    Format.NVFP4: nearest_e2m1,
}


def weight_source(node: ir.Node) -> Callable[[], Array]:
    """What reads a layer's weight, also after the graph around the layer has changed.

    It returns float32 as the product multiplies it: (K, N) of a matrix, (O, I, *kernel) of a convolution.

    Raises:
        InvalidInput: the weight has no data (structure only); when it is read, also that it is not finite.
    """
    value = node.inputs[1]
    steps: list[Callable[[Array], Array]] = []
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None:
            break
        steps.insert(0, _step(producer))
        value = producer.inputs[0]
    tensor = None if value is None else value.const_value
    if tensor is None or value is None:
        raise InvalidInput(f"layer {node.name!r} has no weight data. Export the model with its weights.")
    if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
        steps.append(np.transpose)
    return partial(_read, tensor, str(value.name), tuple(steps))


def _read(tensor: ir.TensorProtocol, name: str, steps: Sequence[Callable[[Array], Array]]) -> Array:
    array = np.array(tensor.numpy()).astype(np.float32)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    if not np.all(np.isfinite(array)):
        raise InvalidInput(f"weight {name!r} is not finite, so it has no scale. The weights are damaged.")
    for step in steps:
        array = step(array)
    return np.ascontiguousarray(array)


def _step(view: ir.Node) -> Callable[[Array], Array]:
    """What a node does that stands between a weight and its product."""
    if view.op_type == "Transpose":
        return partial(np.transpose, axes=view.attributes["perm"].as_ints() if "perm" in view.attributes else None)
    if view.op_type in ("Cast", "Identity"):
        return np.asarray
    shape = view.outputs[0].shape
    if shape is None or not shape.is_static():
        raise InvalidInput(f"node {view.name!r} rearranges a weight into a shape that the graph does not say.")
    return partial(np.reshape, shape=tuple(int(size) for size in shape.numpy()))


def as_matrix(layer: Layer, weight: Array) -> Array:
    """(D, N): a weight as one matrix, inputs down; those of a convolution run as in :mod:`.columns`."""
    return weight if layer.kind is Kind.MATMUL else np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def as_stored(layer: Layer, matrix: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of :func:`as_matrix`."""
    return matrix if layer.kind is Kind.MATMUL else np.ascontiguousarray(matrix.T).reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A weight in few bits.

    Attributes:
        format: of its numbers.
        shape: of the weight, as the product takes it.
        scales: float32 or E4M3, a number each output, or a number each output and block.
        top: one float32 scale above ``scales``; None without.
        axis: of outputs, or the axis that blocks run along.
        block: inputs that share a scale; 0 for all of an output's.
        numbers: makes the numbers, in the shape of the weight.
    """

    format: Format
    shape: tuple[int, ...]
    scales: Array
    top: Array | None
    axis: int
    block: int
    numbers: Callable[[], Array]

    def restored(self) -> Array:
        """What the numbers stand for, float32, in the shape of the weight."""
        numbers = self.numbers().astype(np.float32)
        scales = self.scales.astype(np.float32) * (1.0 if self.top is None else float(self.top))
        if not self.block:
            along = [1] * numbers.ndim
            along[self.axis] = -1
            return np.asarray(numbers * scales.reshape(along))
        wide = np.repeat(scales, self.block, axis=self.axis)
        return np.asarray(numbers * np.take(wide, np.arange(numbers.shape[self.axis]), axis=self.axis))


def round_weight(
    layer: Layer,
    read: Callable[[], Array],
    config: Config,
    form: Format,
    *,
    importance: Array | None,
    gram: Array | None,
) -> Rounded:
    """Find the scales of a weight, and how its numbers are made.

    Args:
        layer: whose weight it is.
        read: makes the weight, factors included; called again whenever numbers are asked for.
        config: block and rounding.
        form: of the numbers.
        importance: (C,) mean squares of the input channels, by which errors are weighed.
        gram: (D, D) mean products of the inputs; needed for GPTQ.

    Raises:
        InvalidInput: GPTQ without ``gram``.
    """
    weight = read()
    block = config.block if isinstance(config, WeightOnly) else None
    block = {Format.INT4: block or INT4_BLOCK, Format.NVFP4: NVFP4_BLOCK}.get(form, block or 0)
    rounding = getattr(config, "rounding", Rounding.NEAREST)
    outputs = 1 if layer.kind is Kind.MATMUL else 0
    inputs = 1 - outputs
    flat = weight if layer.kind is Kind.MATMUL else weight.transpose(1, 0, *range(2, weight.ndim))
    by_input = flat.reshape(len(flat), -1)  # (C, everything that an input channel is multiplied with)
    mass = np.ones(len(flat)) if importance is None else importance
    top: Array | None = None
    if form is Format.NVFP4:
        found, top = nvfp4_scales(by_input, block)
        scales = _block_shape(found, weight, inputs)
    elif block:
        found = block_scales(by_input, block, mass, 8 if form is Format.INT8 else 4)
        scales = _block_shape(found, weight, inputs)
    else:
        peaks = np.abs(np.moveaxis(weight, outputs, 0).reshape(weight.shape[outputs], -1)).max(axis=1)
        scales = scales_of(peaks, E4M3_LARGEST if form is Format.FP8 else INT_LEVELS[8])
    if rounding is Rounding.GPTQ and gram is None:
        raise InvalidInput(
            f"layer {layer.name!r}: GPTQ rounding needs the products of the layer's inputs, and none were gathered. "
            "Observe with grams, or round to nearest."
        )

    def numbers() -> Array:
        values = read()
        wide = _wide(scales, values.shape, inputs if block else outputs, block) * (1.0 if top is None else float(top))
        if rounding is Rounding.GPTQ and gram is not None:
            matrix, steps = as_matrix(layer, values), as_matrix(layer, np.ascontiguousarray(wide))
            values, wide = as_stored(layer, gptq(matrix, gram, steps, _NEAREST[form]), values.shape), np.ones(())
        if form is Format.FP8:
            return to_e4m3(values, wide)
        if form is Format.NVFP4:
            return to_e2m1(values, wide)
        return to_integers(values, wide, 8 if form is Format.INT8 else 4)

    return Rounded(
        format=form,
        shape=weight.shape,
        scales=scales,
        top=top,
        axis=inputs if block else outputs,
        block=block,
        numbers=numbers,
    )


def _block_shape(found: Array, weight: Array, axis: int) -> Array:
    """Scales of blocks along ``axis`` in the weight's own order of axes, from (blocks, the rest)."""
    rest = [size for k, size in enumerate(weight.shape) if k != axis]
    return np.ascontiguousarray(np.moveaxis(found.reshape(len(found), *rest), 0, axis))


def _wide(scales: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """The scale of every element, or what broadcasts to it."""
    values = scales.astype(np.float32)
    if not block:
        along = [1] * len(shape)
        along[axis] = -1
        return np.broadcast_to(values.reshape(along), shape)
    moved = np.moveaxis(values, axis, 0)
    wide = spread(moved, block, shape[axis])
    return np.moveaxis(wide, 0, axis)
