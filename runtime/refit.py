"""Weights for a plan that was built without them: from the bundle's weights file and a small file beside the plan.

:mod:`lehr.engines.refit` writes where each of them is. Stored tensors are rounded here to the type that the engine
wants; bfloat16, which numpy has not, is handled as its bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError
from lehr.runtime.jsonlike import decode_json

Array = npt.NDArray[Any]

STORED = "stored"
FILES = "files"  # added to the plain values of build.json when the plan is located: paths by "stored" and "beside"
CHANGED = "changed"  # values of stored weights that stand in for them, by name, each with its element type
MAX_HEADER = 100_000_000  # bytes; what safetensors itself allows
_KINDS = {"F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_KINDS |= {"I8": "int8", "U8": "uint8", "BOOL": "bool"}
_ENGINE_KINDS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
_ENGINE_KINDS |= {"int8": "INT8", "bool": "BOOL"}


class Said(Protocol):
    """An engine library's log."""

    logger: Any

    def said(self) -> str: ...


def refit(library: Any, engine: Any, log: Said, sources: Mapping[str, Any], plan: Path) -> None:
    """Give an engine its weights.

    Args:
        library: the engine library's module.
        engine: as it was deserialised.
        log: where the library says what is wrong.
        sources: what :func:`lehr.engines.refit.refit_sources` recorded, with paths under :data:`FILES`.
        plan: for messages.

    Raises:
        BundleError: a tensor is missing or of another size, or the library refuses it.
    """
    again = "Build it again with lehr build."
    try:
        files = {where: TensorFile(Path(path)) for where, path in sources[FILES].items()}
        tensors = {name: (files[row["in"]], row["key"], row["dtype"]) for name, row in sources["tensors"].items()}
    except (KeyError, TypeError) as e:
        raise BundleError(f"{plan.name} records no source for its weights ({e}). {again}") from e
    refitter = library.Refitter(engine, log.logger)
    changed = sources.get(CHANGED, {})
    held = []  # the library reads them when it refits
    for name in refitter.get_all_weights():
        if name not in tensors:
            raise BundleError(f"{plan.name} wants weights {name!r}, which its record does not have. {again}")
        file, key, dtype = tensors[name]
        if key in changed and sources["tensors"][name]["in"] == STORED:
            given, after = changed[key]
            array = after if given == dtype else rounded(after, given, dtype)
        else:
            array = file.read(key, dtype)
        held.append(array)
        kind = getattr(library.DataType, _ENGINE_KINDS[dtype])
        if not refitter.set_named_weights(name, library.Weights(kind, array.ctypes.data, array.size)):
            raise BundleError(
                f"{plan.name} does not take weights {name!r} of {array.size} values: {log.said()}. {again}"
            )
    missing = list(refitter.get_missing_weights())
    if missing or not refitter.refit_cuda_engine():
        raise BundleError(f"{plan.name} cannot be refitted, missing {missing}: {log.said()}. {again}")


class TensorFile:
    """A safetensors file, mapped: only what is read comes into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
            size = int.from_bytes(self._data[:8].tobytes(), "little")
            if not 2 <= size <= min(MAX_HEADER, len(self._data) - 8):
                raise self._damaged(f"its header of {size} bytes does not fit")
            header = decode_json(self._data[8 : 8 + size].tobytes())
        except (OSError, ValueError, json.JSONDecodeError) as e:
            raise self._damaged(str(e)) from e
        self._start = 8 + size
        self._header: Mapping[str, Any] = header if isinstance(header, dict) else {}

    def names(self) -> tuple[str, ...]:
        """Of all tensors in the file."""
        return tuple(name for name in self._header if name != "__metadata__")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor; raises BundleError where there is none."""
        try:
            return tuple(int(size) for size in self._header[name]["shape"])
        except (KeyError, TypeError, ValueError) as e:
            raise self._damaged(f"it has no readable tensor {name!r}") from e

    def kind(self, name: str) -> str:
        """Its element type; raises BundleError for a tensor that is not there, or one of another kind of type."""
        try:
            return _KINDS[self._header[name]["dtype"]]
        except (KeyError, TypeError) as e:
            raise self._damaged(f"it has no readable tensor {name!r}") from e

    def read(self, name: str, dtype: str) -> Array:
        """A tensor's values as ``dtype``, flat; bfloat16 as uint16 bits.

        Raises:
            BundleError: there is no such tensor, or not in full, or of another kind of type.
        """
        try:
            row = self._header[name]
            kind, (begin, end) = _KINDS[row["dtype"]], row["data_offsets"]
        except (KeyError, TypeError, ValueError) as e:
            raise self._damaged(f"it has no readable tensor {name!r}") from e
        if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end <= len(self._data) - self._start):
            raise self._damaged(f"tensor {name!r} lies outside it")
        stored = np.dtype("uint16" if kind == "bfloat16" else kind)
        if (end - begin) % stored.itemsize:
            raise self._damaged(f"tensor {name!r} is no whole number of values")
        values = np.frombuffer(self._data[self._start + begin : self._start + end].tobytes(), dtype=stored)
        return rounded(values, kind, dtype) if kind != dtype else values

    def _damaged(self, problem: str) -> BundleError:
        return BundleError(f"{self._path.name} holds no weights that can be read: {problem}. Export the model again.")


def rounded(values: Array, kind: str, dtype: str) -> Array:
    """Values of one floating type as another, to nearest and ties to even; bfloat16 as its bits."""
    wide = (values.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else values
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # an overflow is the engine's own, and was recorded when it was built
            return np.ascontiguousarray(wide.astype(dtype))
    bits = np.ascontiguousarray(wide, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    nearest: Array = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(wide), quiet, nearest)
