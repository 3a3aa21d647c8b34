"""A convolution's inputs as the rows of a matrix product, so that what is known of products holds for it too."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def columns(node: ir.Node, value: Array, weight_shape: tuple[int, ...]) -> Array | None:
    """(n, D) float32: what each output of a product or convolution multiplies with its weight.

    Args:
        node: MatMul, Gemm or Conv.
        value: its first input: (…, K), or (B, C, *sizes).
        weight_shape: of a convolution (O, C, *kernel); D runs as its weight does behind O.

    Returns:
        The rows; None for a grouped convolution, whose outputs multiply different inputs, or one that pads by itself.
    """
    if node.op_type != "Conv":
        return np.ascontiguousarray(value.reshape(-1, value.shape[-1]), np.float32)
    kernel = weight_shape[2:]
    rank = len(kernel)
    padding = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if _ints(node, "group", [1]) != [1] or padding != "NOTSET":
        return None
    strides, dilations = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
    pads = _ints(node, "pads", [0] * (2 * rank))
    padded = np.pad(value, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    spans = tuple(dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    steps = tuple(slice(None, None, stride) for stride in strides)
    inner = tuple(slice(None, None, dilation) for dilation in dilations)
    windows = windows[(slice(None), slice(None), *steps, *inner)]
    moved = np.moveaxis(windows, 1, 1 + rank)  # (B, *outputs, C, *kernel)
    return np.ascontiguousarray(moved.reshape(-1, weight_shape[1] * int(np.prod(kernel))), np.float32)


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    value = attribute.value
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]
