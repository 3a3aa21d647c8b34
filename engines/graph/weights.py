"""Weights of a graph: where they come from, and how they get into the one file that graphs refer to.

A traced graph names its parameters and knows their shapes but holds none of their data. Binding streams them,
tensor by tensor, from a source into ``weights.safetensors`` and makes each initialiser point into that file, so
neither a graph nor a process ever holds a model's weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.engines.graph.tensor_file import (
    Place,
    SafetensorsFile,
    SafetensorsFolder,
    TensorInfo,
    layout,
    write_safetensors,
)
from lehr.runtime.errors import InvalidInput
from lehr.runtime.files import storage_errors

__all__ = [
    "Rename",
    "SafetensorsFile",
    "SafetensorsFolder",
    "Storage",
    "TensorInfo",
    "WeightSource",
    "bind_weights",
    "convert",
    "match_weights",
    "node_count",
    "parameter_count",
    "save_graph",
    "weight_bytes",
    "write_safetensors",
]

WEIGHTS_NAME = "weights.safetensors"
TIED = "lehr.tied_weights"  # graph metadata: JSON, second name of a shared tensor -> the name the graph uses
UNUSED = "lehr.unused_weights"  # graph metadata: JSON, names of the module's tensors that the output does not need

Rename = Callable[[str], str | None] | Mapping[str, str]

_FLOATS = frozenset(np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
_HALVES = frozenset(np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16))
_LISTED = 10  # names of one kind in an error message
_CHUNK = 1 << 22  # elements converted at a time


class Storage(Enum):
    """In which element type floating-point weights are kept."""

    GRAPH = "graph"  # the graph's own
    SOURCE = "source"  # the source's where it is half as wide, and widened inside the graph


class WeightSource(Protocol):
    """Named tensors that can be read one at a time."""

    def names(self) -> Iterable[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str) -> memoryview | npt.NDArray[Any]:
        """The tensor as an array of ``info(name)``, or its raw little-endian bytes."""


# -------------------------------------------------------------------------------------------------- binding


def bind_weights(
    models: ir.Model | Sequence[ir.Model],
    source: WeightSource,
    weights_path: Path,
    *,
    rename: Rename | None = None,
    storage: Storage = Storage.GRAPH,
) -> None:
    """Give every initialiser without data its tensor from ``source``, through a file written to ``weights_path``.

    Floating-point tensors of another width are converted to the graph's as they are written, or kept in 16 bits and
    converted by a ``Cast`` in the graph.

    Args:
        models: a graph, or the parts of one; changed in place: their weights become external tensors that refer to
            ``weights_path`` by file name. What several parts read is written once.
        source: read one tensor at a time.
        weights_path: a safetensors file, replaced in one step; save the graph beside it.
        rename: the source's names -> the graph's. A mapping keeps names it does not hold; a function returns None
            for a tensor that is to be left out.
        storage: in which element type the file keeps them.

    Raises:
        InvalidInput: names or shapes of ``source`` are not the graph's, an element type cannot be converted, or a
            weight is NaN, infinite, or too large for the graph's element type.
        RunFailed: the disk is full, or the folder is gone.
    """
    parts = [models] if isinstance(models, ir.Model) else list(models)
    wanted = _wanted(parts)
    origin = match_weights(
        wanted,
        source,
        rename=rename,
        tied=json.loads(parts[0].metadata_props.get(TIED, "{}")),
        ignored=json.loads(parts[0].metadata_props.get(UNUSED, "[]")),
        what=parts[0].graph.name or "the graph",
    )
    if storage is Storage.SOURCE:
        kept = {name: source.info(stored).dtype for name, stored in origin.items()}
        wanted = {
            name: TensorInfo(kept[name], info.shape) if info.dtype == np.float32 and kept[name] in _HALVES else info
            for name, info in wanted.items()
        }
        for part in parts:
            _widen(part, wanted)
    places = write_safetensors(
        weights_path, [(name, info, partial(convert, source, origin[name], info)) for name, info in wanted.items()]
    )
    for part in parts:
        _attach(part, places, Path(weights_path))


def _widen(model: ir.Model, stored: Mapping[str, TensorInfo]) -> None:
    """Let weights that are stored in 16 bits have that type, and what reads them read a ``Cast``."""
    graph = model.graph
    for name, value in _unbound(model).items():
        dtype = ir.DataType.from_numpy(stored[name].dtype)
        if dtype == value.dtype:
            continue
        wide = ir.Value(name=f"{name}.wide", shape=value.shape, type=ir.TensorType(value.dtype or dtype))
        ir.convenience.replace_all_uses_with(value, wide)
        to = int(value.dtype or dtype)
        value.dtype = dtype
        graph.insert_before(graph[0], ir.node("Cast", [value], {"to": to}, outputs=[wide], name=f"{name}/Cast"))


def match_weights(
    wanted: Mapping[str, TensorInfo],
    source: WeightSource,
    *,
    rename: Rename | None = None,
    tied: Mapping[str, str] | None = None,
    ignored: Iterable[str] = (),
    what: str,
) -> dict[str, str]:
    """Find the source's name for every wanted tensor.

    Args:
        wanted: names, shapes and element types that are needed.
        source: what there is.
        rename: see :func:`bind_weights`.
        tied: other names under which a wanted tensor may be stored.
        ignored: names that may be present and are not needed.
        what: whose weights these are, for the message.

    Raises:
        InvalidInput: listing what is missing, unexpected or of another shape or kind.
    """
    found: dict[str, str] = {}
    for stored in source.names():
        name = _renamed(stored, rename)
        if name is None:
            continue
        if name in found:
            raise InvalidInput(f"the key map sends both {found[name]!r} and {stored!r} to {name!r} of {what}.")
        found[name] = stored
    for other, name in (tied or {}).items():
        if name in wanted and other in found:
            found.setdefault(name, found[other])
    allowed = {*wanted, *(tied or {}), *ignored}
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": sorted(name for name in found if name not in allowed),
        "wrong shape or type": [
            f"{name} is {_describe(source.info(found[name]))}, expected {_describe(info)}"
            for name, info in wanted.items()
            if name in found and not _fits(source.info(found[name]), info)
        ],
    }
    if any(problems.values()):
        lines = [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in problems.items() if names]
        raise InvalidInput(
            f"these are not the weights of {what}. " + "; ".join(lines) + ". Check that file and architecture belong "
            "together; weights saved under other names need a key map."
        )
    return {name: found[name] for name in wanted}


def convert(source: WeightSource, stored: str, info: TensorInfo) -> npt.NDArray[Any]:
    """Read ``stored`` as an array of ``info``, finite throughout.

    Raises:
        InvalidInput: NaN, infinity, or a value that ``info.dtype`` cannot hold; or bytes of another size.
    """
    tensor = _typed(source, stored).reshape(-1)
    if info.dtype not in _FLOATS:
        return tensor.reshape(info.shape)
    result = tensor if tensor.dtype == info.dtype else np.empty(tensor.shape, info.dtype)
    for start in range(0, tensor.size, _CHUNK):
        part = tensor[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            cast = part.astype(info.dtype, copy=False)
        if not np.isfinite(cast).all():
            at = start + int(np.flatnonzero(~np.isfinite(cast))[0])
            raise InvalidInput(
                f"weight {stored!r} holds {tensor[at]} at element {at}, expected finite numbers of {info.dtype}. "
                "The weights are damaged: download or save them again."
            )
        if result is not tensor:
            result[start : start + _CHUNK] = cast
    return result.reshape(info.shape)


def _typed(source: WeightSource, stored: str) -> npt.NDArray[Any]:
    contents, info = source.read(stored), source.info(stored)
    if isinstance(contents, np.ndarray) and contents.dtype == info.dtype and contents.shape == info.shape:
        return contents
    if isinstance(contents, np.ndarray):
        raw = np.ascontiguousarray(contents).reshape(-1).view(np.uint8)
    else:
        raw = np.frombuffer(contents, np.uint8)
    if raw.nbytes != info.nbytes:
        raise InvalidInput(f"weight {stored!r} has {raw.nbytes} bytes; {_describe(info)} takes {info.nbytes}.")
    return raw.view(info.dtype).reshape(info.shape)


def _fits(stored: TensorInfo, wanted: TensorInfo) -> bool:
    same_kind = stored.dtype == wanted.dtype or (stored.dtype in _FLOATS and wanted.dtype in _FLOATS)
    return same_kind and stored.shape == wanted.shape


def _renamed(stored: str, rename: Rename | None) -> str | None:
    if rename is None:
        return stored
    return rename.get(stored, stored) if isinstance(rename, Mapping) else rename(stored)


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype} {info.shape}"


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _unbound(model: ir.Model) -> dict[str, ir.Value]:
    return {name: value for name, value in model.graph.initializers.items() if value.const_value is None}


def _wanted(models: Sequence[ir.Model]) -> dict[str, TensorInfo]:
    return {name: _info_of(value) for model in models for name, value in _unbound(model).items()}


def _info_of(value: ir.Value) -> TensorInfo:
    if value.dtype is None or value.shape is None or not value.shape.is_static():
        raise InvalidInput(f"initialiser {value.name!r} has no static shape and element type, so nothing can fill it.")
    return TensorInfo(value.dtype.numpy(), tuple(int(size) for size in value.shape.numpy()))


def _attach(model: ir.Model, places: Mapping[str, Place], weights_path: Path) -> None:
    for name, value in _unbound(model).items():
        info = _info_of(value)
        value.const_value = ir.ExternalTensor(
            location=weights_path.name,
            offset=places[name].offset,
            length=places[name].length,
            dtype=ir.DataType.from_numpy(info.dtype),
            shape=ir.Shape(info.shape),
            name=name,
            base_dir=weights_path.parent.absolute(),
        )


# --------------------------------------------------------------------------------------------- saving, counting


def save_graph(model: ir.Model, path: Path, *, parts: Sequence[ir.Model] = ()) -> None:
    """Write the graph; its weights stay in the file they are in, which must lie in the same folder.

    A graph whose weights were never bound (structure only) is written with the references that binding to
    ``weights.safetensors`` would give it, so that tools read its shapes; ``parts`` are the graphs that it would be
    bound together with.

    Raises:
        InvalidInput: the weights lie in another folder, or the folder cannot be written.
        RunFailed: the disk is full, or the folder is gone.
    """
    path = Path(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir).resolve() != path.parent.resolve():
            raise InvalidInput(
                f"{path} would refer to {tensor.location} beside it, but the weights are in {tensor.base_dir}. "
                "Save the graph into the folder of its weights."
            )
    unbound = _unbound(model)
    _, places = layout(_wanted([*parts, model]))
    _attach(model, places, path.with_name(WEIGHTS_NAME))
    try:
        data = ir.to_proto(model).SerializeToString(deterministic=True)
    finally:
        for value in unbound.values():
            value.const_value = None
    partial_path = path.with_name(f".{path.name}.partial")
    try:
        with storage_errors(f"writing {path.name}"):
            partial_path.write_bytes(data)
            partial_path.replace(path)
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise


def parameter_count(*models: ir.Model) -> int:
    """Elements of all weights, bound or not, those of several parts once; constants embedded in a graph are none."""
    weights = {
        name: _info_of(value).size
        for model in models
        for name, value in model.graph.initializers.items()
        if value.const_value is None or isinstance(value.const_value, ir.ExternalTensor)
    }
    return sum(weights.values())


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights of a graph, in the element types that they are stored in."""
    return sum(
        _info_of(value).nbytes
        for value in model.graph.initializers.values()
        if value.const_value is None or isinstance(value.const_value, ir.ExternalTensor)
    )


def node_count(model: ir.Model) -> int:
    """Nodes of the graph, those of nested graphs included."""
    return sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph))
