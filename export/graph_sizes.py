"""Sizes in a graph that becomes a module: numbers, or symbols of a trace, with which their arithmetic is done.

Inputs of these functions are tensors or :class:`Sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from lehr.runtime.errors import BuildFailed

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
}


class Sizes:
    """A vector of sizes, or one size: integers, or symbols of a trace; or a number that is known to it.

    ``dtype`` is what it is as a tensor: graphs cast sizes to floating point, too.
    """

    def __init__(self, values: Any, dtype: torch.dtype = torch.int64) -> None:
        self.values, self.dtype = values, dtype

    @property
    def scalar(self) -> bool:
        return not isinstance(self.values, list)

    def items(self) -> list[Any]:
        return [self.values] if self.scalar else self.values

    def tensor(self, device: torch.device) -> Tensor:
        """As a tensor."""
        parts = [torch.full((1,), item, dtype=self.dtype, device=device) for item in self.items()]
        whole = torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype, device=device)
        return whole[0] if self.scalar else whole


Value = Tensor | Sizes


def ints(value: Value | None) -> list[Any] | None:
    """Sizes, axes and the like, which must be known when the graph is traced."""
    if value is None:
        return None
    if isinstance(value, Sizes):
        return value.items()
    raise BuildFailed("a size, an axis or a permutation is computed from data. Build with another library.")


def only(name: str, given: Any, *allowed: Any) -> None:
    """Raise BuildFailed for a value of an option that is not among those that have a counterpart."""
    if given not in allowed:
        raise BuildFailed(f"{name} {given!r} has no counterpart in PyTorch that Lehr knows of; {allowed} have.")


# ------------------------------------------------------------------------------------------- sizes and their arithmetic


def arithmetic(on_sizes: Callable[[Any, Any], Any], on_tensors: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    """An operator of two inputs: on sizes it computes at once, on tensors when the module runs."""

    def apply(a: Value, b: Value) -> Value:
        if isinstance(a, Sizes) and isinstance(b, Sizes) and a.dtype == b.dtype == torch.int64:
            x, y = a.items(), b.items()
            length = max(len(x), len(y))
            rows = [on_sizes(x[k % len(x)], y[k % len(y)]) for k in range(length)]
            return Sizes(rows[0] if a.scalar and b.scalar else rows)
        left, right = (_scalar_or_tensor(v, like) for v, like in ((a, b), (b, a)))
        return on_tensors(left, right)

    return apply


def _scalar_or_tensor(value: Value, like: Value) -> Any:
    if isinstance(value, Tensor):
        return value
    device = like.device if isinstance(like, Tensor) else torch.device("cpu")
    return value.values if value.scalar else value.tensor(device)


def divide(a: Any, b: Any) -> Any:
    """ONNX's Div: integers are truncated towards zero."""
    floating = any(isinstance(v, Tensor) and v.is_floating_point() for v in (a, b))
    return torch.div(a, b) if floating else torch.div(a, b, rounding_mode="trunc")


def shape_of(x: Tensor, start: int = 0, end: int | None = None) -> Sizes:
    """ONNX's Shape."""
    return Sizes(list(x.shape)[start:end])


def concat(*values: Value, axis: int) -> Value:
    """ONNX's Concat."""
    if all(isinstance(value, Sizes) for value in values):
        return Sizes([item for value in values for item in value.items()])  # type: ignore[union-attr]
    device = next(value.device for value in values if isinstance(value, Tensor))
    return torch.cat([v.tensor(device) if isinstance(v, Sizes) else v for v in values], dim=axis)


def gather(data: Value, indices: Value, axis: int = 0) -> Value:
    """ONNX's Gather."""
    if isinstance(data, Sizes) and isinstance(indices, Sizes):
        found = [data.items()[k] for k in indices.items()]
        return Sizes(found[0] if indices.scalar else found)
    table = data.tensor(indices.device) if isinstance(data, Sizes) else data  # type: ignore[union-attr]
    if isinstance(indices, Sizes):
        if indices.scalar:
            return table.select(axis, indices.values)
        indices = indices.tensor(table.device)
    flat = torch.index_select(table, axis, indices.reshape(-1))
    place = axis % table.ndim
    return flat.reshape([*table.shape[:place], *indices.shape, *table.shape[place + 1 :]])


def sliced(x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None) -> Value:
    """ONNX's Slice."""
    begins, stops = ints(starts) or [], ints(ends) or []
    places, strides = ints(axes) or list(range(len(begins))), ints(steps) or [1] * len(begins)
    if isinstance(x, Sizes):
        return Sizes(x.items()[begins[0] : stops[0] : strides[0]])
    for begin, stop, place, stride in zip(begins, stops, places, strides, strict=True):
        if stride < 0:
            only("Slice with step", stride, -1)
            x = torch.flip(x, [place])
            continue
        last = None if isinstance(stop, int) and stop >= 2**31 - 1 else stop
        x = x[(slice(None),) * (place % x.ndim) + (slice(begin, last, stride),)]
    return x


def squeeze(x: Value, axes: Value | None = None) -> Value:
    """ONNX's Squeeze."""
    if isinstance(x, Sizes):
        return Sizes(x.items()[0])
    places = ints(axes)
    return torch.squeeze(x) if places is None else torch.squeeze(x, [place % x.ndim for place in places])


def unsqueeze(x: Value, axes: Value) -> Value:
    """ONNX's Unsqueeze."""
    if isinstance(x, Sizes):
        return Sizes(x.items())
    places = ints(axes) or []
    for place in sorted(place % (x.ndim + len(places)) for place in places):
        x = x.unsqueeze(place)
    return x


def cast(x: Value, to: int, saturate: int = 1) -> Value:
    """ONNX's Cast; ``saturate`` means something for fp8 only, which has none here."""
    dtype = _DTYPES.get(ir.DataType(to))
    if dtype is None:
        raise BuildFailed(f"a cast to {ir.DataType(to).name} has no counterpart in PyTorch that Lehr knows of.")
    if isinstance(x, Sizes):
        return Sizes(x.values, dtype)
    return x.to(dtype)


def ranged(start: Value, limit: Value, delta: Value) -> Tensor:
    """ONNX's Range."""
    if not (isinstance(start, Sizes) and isinstance(limit, Sizes) and isinstance(delta, Sizes)):
        raise BuildFailed("a Range is computed from data. Build with another library.")
    first, last, step = (
        int(v.values) if isinstance(v.values, float) and v.values.is_integer() else v.values
        for v in (start, limit, delta)
    )
    return torch.arange(first, last, step, dtype=start.dtype)


def reshape(x: Value, shape: Value, allowzero: int = 0) -> Value:
    """ONNX's Reshape."""
    sizes = ints(shape) or []
    if isinstance(x, Sizes):
        return x if sizes else Sizes(x.items()[0])
    whole = [
        x.shape[k] if isinstance(size, int) and size == 0 and not allowzero else size for k, size in enumerate(sizes)
    ]
    return x.reshape(whole)


def constant_of_shape(shape: Value, value: Any = None) -> Value:
    """ONNX's ConstantOfShape."""
    fill = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
    if value is not None and value.dtype == ir.DataType.INT64:
        return Sizes([fill] * (ints(shape) or [0])[0])
    return torch.full(ints(shape) or [], fill)
