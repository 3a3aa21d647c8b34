"""The weights of an ONNX file, found without ONNX's own tools, which a device has not.

Only what the runtime needs of the format (https://onnx.ai/onnx/repo-docs/IR.html) is read: names, element types,
shapes and places of the initialisers of the main graph. An engine that ONNX Runtime saved holds them under names of its
own and in the order its kernels want; which one a stored weight became is told by its content, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError
from lehr.runtime.names import name_problem
from lehr.runtime.refit import rounded

Array = npt.NDArray[Any]

KINDS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # ONNX's numbers of element types
BLOCKS = (16, 8)  # channels that ONNX Runtime's convolutions on processors take at a time, by their vectors' width
_GLANCE = 64  # values compared before all are

_GRAPH, _INITIALIZER = 7, 5  # fields of ModelProto and GraphProto
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13  # of TensorProto


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer:
    """A floating-point weight of a graph: where its bytes lie, in the file itself or in one beside it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    def read(self) -> Array:
        """Its values, flat; bfloat16 as its bits."""
        dtype = np.dtype("uint16" if self.kind == "bfloat16" else self.kind)
        try:
            return np.fromfile(self.file, dtype, count=math.prod(self.shape), offset=self.offset)
        except (OSError, ValueError) as e:
            raise _damaged(self.file, str(e)) from e


def initializers(path: Path) -> dict[str, Initializer]:
    """The floating-point initialisers of an ONNX file by name.

    Raises:
        BundleError: the file cannot be read as ONNX.
    """
    found = {}
    try:
        data = memoryview(path.read_bytes())
        for field, start, end in _fields(data, 0, len(data)):
            if field == _GRAPH:
                for inner, first, last in _fields(data, start, end):
                    tensor = _tensor(data, first, last, path) if inner == _INITIALIZER else None
                    if tensor is not None:
                        found[tensor.name] = tensor
    except (OSError, ValueError, IndexError) as e:
        raise _damaged(path, str(e)) from e
    return found


def _tensor(data: memoryview, start: int, end: int, path: Path) -> Initializer | None:
    """An initialiser; None for other element types, and for values that are spelled out one by one."""
    dims: list[int] = []
    kind, name, raw, external = 0, "", None, {}
    for field, first, last in _fields(data, start, end):
        if field == _DIMS:
            dims += _numbers(data, first, last)
        elif field == _TYPE:
            kind = _numbers(data, first, last)[0]
        elif field == _NAME:
            name = bytes(data[first:last]).decode()
        elif field == _RAW:
            raw = first
        elif field == _EXTERNAL:
            entry = [bytes(data[a:b]).decode() for _, a, b in _fields(data, first, last)]
            external[entry[0]] = entry[1]
    if kind not in KINDS or (raw is None and "location" not in external):
        return None
    where, offset = path, raw or 0
    if external:
        if problem := name_problem(external["location"]):
            raise ValueError(f"weights in {external['location']!r}: {problem}")
        where, offset = path.with_name(external["location"]), int(external.get("offset", 0))
    return Initializer(name=name, kind=KINDS[kind], shape=tuple(dims), file=where, offset=offset)


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number and the bytes of each field of a protobuf message (https://protobuf.dev/programming-guides/encoding)."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        wire, first = tag & 7, at
        if wire == 0:
            _, at = _varint(data, at)
        elif wire == 2:
            length, first = _varint(data, at)
            at = first + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field has the wire type {wire}")
        if at > end:
            raise ValueError("a field ends behind its message")
        yield tag >> 3, first, at


def _numbers(data: memoryview, start: int, end: int) -> list[int]:
    found = []
    while start < end:
        value, start = _varint(data, start)
        found.append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _damaged(path: Path, problem: str) -> BundleError:
    return BundleError(f"{path.name} cannot be read as ONNX ({problem}). Build the engine again with lehr build.")


# ------------------------------------------------------------------------------------------------ recognising

Layout = Callable[[Array], Array]


def layouts(shape: tuple[int, ...], stored: Initializer) -> Iterator[Layout]:
    """In which orders a weight of ``shape`` may have been stored as ``stored``, as functions to flat values."""
    size, rows = math.prod(shape), shape[0] if shape else 1
    if math.prod(stored.shape) == size:
        yield lambda weight: weight.reshape(-1)
        if len(shape) > 1:
            yield lambda weight: np.ascontiguousarray(weight.reshape(rows, -1).T).reshape(-1)
    if len(shape) == len(stored.shape) == 4 and shape[2:] == stored.shape[2:]:
        padded = stored.shape[:2]
        for block in BLOCKS:
            if padded == (-(-shape[0] // block) * block, -(-shape[1] // block) * block):
                yield lambda weight, b=block: _blocked(weight, padded, b)  # type: ignore[misc]
            if padded == (-(-shape[0] // block) * block, shape[1]):
                yield lambda weight, b=block: _blocked_outputs(weight, padded, b)  # type: ignore[misc]


def _padded(weight: Array, channels: tuple[int, ...]) -> Array:
    rows, columns = (wide - narrow for wide, narrow in zip(channels, weight.shape, strict=False))
    return np.pad(weight, ((0, rows), (0, columns), (0, 0), (0, 0))) if rows or columns else weight


def _blocked(weight: Array, channels: tuple[int, ...], block: int) -> Array:
    """(O, I, H, W) -> (O/b, I/b, H, W, b of I, b of O), flat: MLAS' NCHWc filters."""
    w = _padded(weight, channels)
    out, inner, height, width = w.shape
    cut = w.reshape(out // block, block, inner // block, block, height, width)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 5, 3, 1)).reshape(-1)


def _blocked_outputs(weight: Array, channels: tuple[int, ...], block: int) -> Array:
    """(O, I, H, W) -> (O/b, I, H, W, b of O), flat: the filters of a first convolution, of few channels."""
    w = _padded(weight, channels)
    out, inner, height, width = w.shape
    cut = w.reshape(out // block, block, inner, height, width)
    return np.ascontiguousarray(cut.transpose(0, 2, 3, 4, 1)).reshape(-1)


def find(weight: Array, kind: str, plan: Mapping[str, Initializer], read: Callable[[str], Array]) -> dict[str, Layout]:
    """The initialisers that hold ``weight``, and in which order.

    Args:
        weight: in its own shape; of ``kind``, bfloat16 as its bits.
        kind: its element type.
        plan: an engine's initialisers.
        read: their values by name, flat.
    """
    found: dict[str, Layout] = {}
    as_kind: dict[str, Array] = {}
    for name, stored in plan.items():
        if math.prod(stored.shape) < weight.size:
            continue
        for layout in layouts(weight.shape, stored):
            if stored.kind not in as_kind:
                as_kind[stored.kind] = rounded(weight, kind, stored.kind) if kind != stored.kind else weight
            expected, actual = layout(as_kind[stored.kind]), read(name)
            if np.array_equal(expected[:_GLANCE], actual[:_GLANCE]) and np.array_equal(expected, actual):
                found[name] = layout
                break
    return found
