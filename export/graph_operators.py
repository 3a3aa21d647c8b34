"""ONNX operators as PyTorch functions: inputs are positional, attributes keywords (https://onnx.ai/onnx/operators).

What a portable graph may hold is here; options that Lehr's exporter never writes are refused by their name.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lehr.export import graph_sizes as gs
from lehr.export.graph_sizes import Value
from lehr.runtime.errors import BuildFailed

# --------------------------------------------------------------------------------------------------- moving data about


def _expand(x: Tensor, shape: Value) -> Tensor:
    sizes = gs.ints(shape) or []
    own = [1] * (len(sizes) - x.ndim) + list(x.shape)
    wanted = [1] * (len(own) - len(sizes)) + sizes
    return x.expand([a if isinstance(b, int) and b == 1 else b for a, b in zip(own, wanted, strict=True)])


def _split(
    x: Tensor, split: Value | None = None, *, parts: int, axis: int = 0, num_outputs: int = 0
) -> tuple[Tensor, ...]:
    sizes = gs.ints(split)
    if sizes is None:
        size = -(-x.shape[axis] // parts)
        return tuple(torch.split(x, size, dim=axis))
    return tuple(torch.split(x, sizes, dim=axis))


def _pad(
    x: Tensor, pads: Value, constant: Value | None = None, axes: Value | None = None, *, mode: str = "constant"
) -> Tensor:
    widths = gs.ints(pads) or []
    places = [place % x.ndim for place in gs.ints(axes) or range(x.ndim)]
    half = len(widths) // 2
    both = {place: (widths[k], widths[half + k]) for k, place in enumerate(places)}
    first = min((place for place in both if both[place] != (0, 0)), default=x.ndim - 1)
    flat = [width for place in range(x.ndim - 1, first - 1, -1) for width in both.get(place, (0, 0))]
    named = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    gs.only("Pad with mode", mode, *named)
    if mode == "constant":
        fill = 0.0 if constant is None else constant.values if isinstance(constant, gs.Sizes) else constant.item()
        return nnf.pad(x, flat, value=fill)
    return nnf.pad(x, flat, mode=named[mode])


def _resize(
    x: Tensor,
    roi: Value | None = None,
    scales: Value | None = None,
    sizes: Value | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    **_: Any,
) -> Tensor:
    wanted = gs.ints(sizes)
    if wanted is not None:
        target = wanted[-(x.ndim - 2) :]
    elif scales is not None:
        factors = (gs.ints(scales) or [])[-(x.ndim - 2) :]
        target = [
            int(factor) * size if factor == int(factor) else math.floor(factor * size)
            for factor, size in zip(factors, x.shape[2:], strict=True)
        ]
    else:
        raise BuildFailed("a Resize without sizes has no counterpart in PyTorch that Lehr knows of.")
    if mode == "nearest":
        floors = coordinate_transformation_mode == "asymmetric" and nearest_mode == "floor"
        return nnf.interpolate(x, size=target, mode="nearest" if floors else "nearest-exact")
    gs.only("Resize with mode", mode, "linear", "cubic")
    named = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    corners = coordinate_transformation_mode == "align_corners"
    return nnf.interpolate(x, size=target, mode=named[mode, x.ndim - 2], align_corners=corners)


# ------------------------------------------------------------------------------------------------ products and pooling


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = (a.mT if transA else a) @ (b.mT if transB else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


def _symmetric(pads: Sequence[int], auto_pad: str) -> list[int]:
    gs.only("padding", auto_pad, "NOTSET", "VALID")
    half = len(pads) // 2
    if list(pads[:half]) != list(pads[half:]):
        raise BuildFailed(f"padding {list(pads)} differs between the sides, which Lehr knows no counterpart of.")
    return list(pads[:half])


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: Sequence[int] = (),
) -> Tensor:
    rank = x.ndim - 2
    uneven = pads and list(pads[:rank]) != list(pads[rank:])
    if uneven:
        x = nnf.pad(x, [width for k in range(rank - 1, -1, -1) for width in (pads[k], pads[rank + k])])
    function = (nnf.conv1d, nnf.conv2d, nnf.conv3d)[rank - 1]
    padding = [0] * rank if uneven or not pads else _symmetric(pads, auto_pad)
    return function(x, weight, bias, list(strides) or [1] * rank, padding, list(dilations) or [1] * rank, group)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: Sequence[int] = (),
) -> Tensor:
    rank = x.ndim - 2
    function = (nnf.conv_transpose1d, nnf.conv_transpose2d, nnf.conv_transpose3d)[rank - 1]
    padding = _symmetric(pads, auto_pad) if pads else [0] * rank
    more = list(output_padding) or [0] * rank
    return function(x, weight, bias, list(strides) or [1] * rank, padding, more, group, list(dilations) or [1] * rank)


def _pool(
    x: Tensor,
    *,
    kind: str,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (),
    pads: Sequence[int] = (),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    storage_order: int = 0,
) -> Tensor:
    rank = x.ndim - 2
    padding = _symmetric(pads, auto_pad) if pads else [0] * rank
    steps = list(strides) or [1] * rank
    if kind == "max":
        largest = (nnf.max_pool1d, nnf.max_pool2d, nnf.max_pool3d)[rank - 1]
        return largest(x, list(kernel_shape), steps, padding, list(dilations) or [1] * rank, bool(ceil_mode))
    mean = (nnf.avg_pool1d, nnf.avg_pool2d, nnf.avg_pool3d)[rank - 1]
    return mean(x, list(kernel_shape), steps, padding, bool(ceil_mode), bool(count_include_pad))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *past: Tensor | None,
    scale: float | None = None,
    is_causal: int = 0,
    softcap: float = 0.0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    qk_matmul_output_mode: int = 0,
    softmax_precision: int = 0,
) -> Tensor:
    """Opset 23's Attention; what it returns beside the result is not there."""
    gs.only("Attention with softcap", softcap, 0.0)
    if any(one is not None for one in past):
        raise BuildFailed("Attention with a cache has no counterpart here. Build with another library.")
    flat = q.ndim == 3
    if flat:
        q, k, v = (
            x.unflatten(-1, [heads, -1]).transpose(1, 2)
            for x, heads in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
        )
    shared = k.shape[1] != q.shape[1]
    out = nnf.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bool(is_causal), scale=scale, enable_gqa=shared
    )
    return out.transpose(1, 2).flatten(-2) if flat else out


# ------------------------------------------------------------------------------------------------------- normalisation


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return nnf.layer_norm(x, list(x.shape[axis % x.ndim :]), scale, bias, epsilon)


def _rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    wide = x.float() if stash_type == 1 else x
    axes = list(range(axis % x.ndim, x.ndim))
    return (wide * torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


def _group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return nnf.group_norm(x, num_groups, scale, bias, epsilon)


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return nnf.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axes: Value | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        places = gs.ints(axes)
        if places is None and noop_with_empty_axes:
            return x
        return function(x, places if places is not None else list(range(x.ndim)), bool(keepdims))

    return apply


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return torch.clamp(x, low, high)


def _all_of(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *values: functools.reduce(function, values)


# ------------------------------------------------------------------------------------------------------------ the table

_ON_SIZES: dict[str, Callable[..., Any]] = {
    "Add": gs.arithmetic(operator.add, torch.add),
    "Sub": gs.arithmetic(operator.sub, lambda a, b: a - b),
    "Mul": gs.arithmetic(operator.mul, lambda a, b: a * b),
    "Div": gs.arithmetic(operator.floordiv, gs.divide),
    "Shape": gs.shape_of,
    "Concat": gs.concat,
    "Gather": gs.gather,
    "Slice": gs.sliced,
    "Squeeze": gs.squeeze,
    "Unsqueeze": gs.unsqueeze,
    "Cast": gs.cast,
    "Range": gs.ranged,
    "Reshape": gs.reshape,
    "ConstantOfShape": gs.constant_of_shape,
    "Expand": _expand,
    "Split": _split,
    "Pad": _pad,
    "Resize": _resize,
    "Identity": lambda x: x,
    "Tile": lambda x, repeats: x.repeat(gs.ints(repeats)),
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
}
SIZES = frozenset(_ON_SIZES.values())  # these take sizes as they are; to all others they are given as tensors

OPERATORS: dict[str, Callable[..., Any]] = {
    **_ON_SIZES,
    "Transpose": lambda x, perm: x.permute(perm),
    "Flatten": lambda x, axis=1: x.flatten(0, axis - 1).flatten(1) if axis else x.reshape(1, -1),
    "MatMul": torch.matmul,
    "Gemm": _gemm,
    "Einsum": lambda *tensors, equation: torch.einsum(equation, *tensors),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "AveragePool": functools.partial(_pool, kind="mean"),
    "MaxPool": functools.partial(_pool, kind="max"),
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "Attention": _attention,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "LogSoftmax": lambda x, axis=-1: torch.log_softmax(x, axis),
    "Gelu": lambda x, approximate="none": nnf.gelu(x, approximate=approximate),
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Relu": torch.relu,
    "LeakyRelu": lambda x, alpha=0.01: nnf.leaky_relu(x, alpha),
    "Elu": lambda x, alpha=1.0: nnf.elu(x, alpha),
    "Softplus": nnf.softplus,
    "HardSwish": nnf.hardswish,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sign": torch.sign,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Atan": torch.atan,
    "Pow": torch.pow,
    "Mod": lambda a, b, fmod=0: torch.fmod(a, b) if fmod else torch.remainder(a, b),
    "Max": _all_of(torch.maximum),
    "Min": _all_of(torch.minimum),
    "Sum": _all_of(torch.add),
    "Clip": _clip,
    "Where": torch.where,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Not": torch.logical_not,
}
