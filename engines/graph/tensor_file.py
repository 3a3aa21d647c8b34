"""Safetensors files, read one tensor at a time and written in one pass, by the format's description alone.

A file is ``u64 n | n bytes of JSON | data``; the JSON gives each tensor's dtype, shape and place in ``data``. A file
may come from anywhere, so its header is checked before a byte of it is believed, and tensors are mapped, never
loaded together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.files import storage_errors

Bytes = bytes | bytearray | memoryview | npt.NDArray[Any]

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
DATA_ALIGNMENT = 64  # bytes; vector loads from a mapped file, and what the official writer pads to at least
INDEX_SUFFIX = ".safetensors.index.json"

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Element type, as numpy (with ml_dtypes) names it, and shape of a stored tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor's bytes lie in its file."""

    offset: int
    length: int


# -------------------------------------------------------------------------------------------------- reading


class SafetensorsFile:
    """One safetensors file as a source of weights. The header is read and checked at once, tensors when asked for.

    Raises:
        InvalidInput: no such file, or one that is truncated, damaged, or not safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = _read_header(file.read, size, self.path.name)
        except OSError as e:
            raise InvalidInput(f"{self.path} cannot be read ({e.strerror}). Expected a .safetensors file.") from e
        self._tensors, self.metadata = _parse(header, size, self.path.name)

    def __str__(self) -> str:
        return self.path.name

    def names(self) -> Iterable[str]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return self._find(name)[0]

    def place(self, name: str) -> Place:
        return self._find(name)[1]

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor ``name``, read-only and mapped: its pages are released with the array."""
        info, place = self._find(name)
        if not place.length:
            return np.empty(info.shape, info.dtype)
        try:
            mapped = np.memmap(self.path, info.dtype, "r", offset=place.offset, shape=(info.size,))
        except (OSError, ValueError) as e:  # ValueError: the file has become shorter than its header says
            raise InvalidInput(f"{self.path.name}: tensor {name!r} cannot be read ({e}). Did the file change?") from e
        return mapped.view(np.ndarray).reshape(info.shape)

    def _find(self, name: str) -> tuple[TensorInfo, Place]:
        if name not in self._tensors:
            raise InvalidInput(f"{self.path.name} holds no tensor {name!r}.")
        return self._tensors[name]


class SafetensorsFolder:
    """Safetensors shards behind their index, ``NAME.safetensors.index.json``: one source of weights.

    Args:
        path: the index, or a folder that holds exactly one index or else exactly one ``.safetensors`` file.

    Raises:
        InvalidInput: no or several candidates, a shard that is missing or damaged, or an index that disagrees
            with its shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.path = _only_candidate(self.path)
        if not self.path.name.endswith(INDEX_SUFFIX):
            whole = SafetensorsFile(self.path)
            self._shard_of = dict.fromkeys(whole.names(), whole)
            return
        shards: dict[str, SafetensorsFile] = {}
        self._shard_of = {}
        for name, file in _read_index(self.path).items():
            if file not in shards:
                shards[file] = SafetensorsFile(self.path.parent / file)
            shards[file].info(name)  # raises if the index promises what the shard has not
            self._shard_of[name] = shards[file]
        for file, shard in shards.items():
            unlisted = sorted(name for name in shard.names() if self._shard_of.get(name) is not shard)
            if unlisted:
                raise InvalidInput(
                    f"{self.path.name} does not list {unlisted[0]!r} in {file}, which holds it. "
                    "Index and shards must come from the same save; download both again."
                )

    def __str__(self) -> str:
        return self.path.name

    def names(self) -> Iterable[str]:
        return tuple(self._shard_of)

    def info(self, name: str) -> TensorInfo:
        return self._shard(name).info(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        return self._shard(name).read(name)

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise InvalidInput(f"{self.path.name} holds no tensor {name!r}.")
        return self._shard_of[name]


def _only_candidate(folder: Path) -> Path:
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise InvalidInput(f"{folder} holds {[path.name for path in found]}; name the one to read.")
    raise InvalidInput(f"{folder} holds no .safetensors file. Expected a folder of weights.")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index whose files are plain names beside it."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise InvalidInput(f"{path.name} has {path.stat().st_size} bytes, at most {MAX_HEADER_BYTES} are read.")
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidInput(f"{path.name} is no readable index ({e}). Expected JSON with a weight_map.") from e
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise InvalidInput(f"{path.name} is no index. Expected an object 'weight_map' from tensor to file name.")
    for file in entries.values():
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise InvalidInput(f"{path.name} refers to {file!r}. Expected the plain name of a file beside it.")
    return entries


def _read_header(read: Callable[[int], bytes], size: int, file: str) -> dict[str, Any]:
    again = "The file is truncated, damaged or no safetensors file: download or save it again."
    if size < 8:
        raise InvalidInput(f"{file} has {size} bytes, a safetensors file at least 8. {again}")
    length = int.from_bytes(read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidInput(f"{file}: the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed. {again}")
    if 8 + length > size:
        raise InvalidInput(f"{file}: the header claims {length} bytes, the file has {size} in all. {again}")
    try:
        header = json.loads(read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"{file}: the header is no JSON ({e}). {again}") from e
    if not isinstance(header, dict):
        raise InvalidInput(f"{file}: the header is a JSON {type(header).__name__}, expected an object. {again}")
    return {"__data_start__": 8 + length, "tensors": header}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _parse(header: dict[str, Any], size: int, file: str) -> tuple[dict[str, tuple[TensorInfo, Place]], dict[str, str]]:
    start, entries = header["__data_start__"], header["tensors"]
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidInput(f"{file}: __metadata__ must map text to text. The file is damaged: save it again.")
    tensors = {name: _parse_entry(entry, start, f"{file}: tensor {name!r}") for name, entry in entries.items()}
    end = start
    for name, (_, place) in sorted(tensors.items(), key=lambda item: (item[1][1].offset, item[1][1].length)):
        if place.offset != end:
            kind = "overlaps the tensor before it" if place.offset < end else "leaves a gap before it"
            raise InvalidInput(
                f"{file}: tensor {name!r} starts at byte {place.offset}, expected {end}: it {kind}. "
                "The file is damaged: download or save it again."
            )
        end += place.length
    if end != size:
        kind = "truncated" if end > size else "longer than its header says"
        raise InvalidInput(
            f"{file} is {kind}: its header describes {end} bytes, the file has {size}. Download or save it again."
        )
    return tensors, metadata


def _parse_entry(entry: Any, start: int, where: str) -> tuple[TensorInfo, Place]:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{where} is described by a JSON {type(entry).__name__}, expected an object.")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise InvalidInput(f"{where} has dtype {code!r}; readable are {', '.join(DTYPES)}.")
    if not isinstance(shape, list) or not all(_is_natural(value) for value in shape):
        raise InvalidInput(f"{where} has shape {shape!r}, expected a list of integers >= 0.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_natural(value) for value in offsets):
        raise InvalidInput(f"{where} has data_offsets {offsets!r}, expected [begin, end].")
    info = TensorInfo(DTYPES[code], tuple(shape))
    begin, end = offsets
    if end - begin != info.nbytes:
        raise InvalidInput(f"{where}: {code} of shape {shape} takes {info.nbytes} bytes, its offsets {end - begin}.")
    return info, Place(offset=start + begin, length=end - begin)


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# -------------------------------------------------------------------------------------------------- writing


def layout(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, Place]]:
    """Header bytes of a file that holds ``infos``, and where each tensor will lie in it.

    Wide elements come first, so each tensor is aligned to its own element; among equals names decide.

    Raises:
        InvalidInput: an element type that safetensors cannot name.
    """
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        info = infos[name]
        if info.dtype not in _CODES:
            raise InvalidInput(f"tensor {name!r} is {info.dtype}, which a safetensors file cannot hold.")
        entries[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    start = 8 + len(text)
    places = {
        name: Place(offset=start + entry["data_offsets"][0], length=infos[name].nbytes)
        for name, entry in entries.items()
    }
    return len(text).to_bytes(8, "little") + text, places


def write_safetensors(
    path: str | Path, tensors: Iterable[tuple[str, TensorInfo, Callable[[], Bytes]]]
) -> dict[str, Place]:
    """Write a file that depends on names and contents only; each tensor is made, written and dropped in turn.

    Args:
        path: replaced in one step when everything is written, untouched if anything fails.
        tensors: (name, info, function returning the raw little-endian bytes or an array), in any order.

    Returns:
        Where each tensor lies in the file.

    Raises:
        InvalidInput: a name given twice, a dtype safetensors has not, contents of another size than announced, or a
            folder that cannot be written.
        RunFailed: the disk is full, or the folder is gone.
    """
    path = Path(path)
    listed = list(tensors)
    infos = {name: info for name, info, _ in listed}
    if len(infos) != len(listed):
        twice = next(name for k, (name, _, _) in enumerate(listed) if name in {other for other, _, _ in listed[:k]})
        raise InvalidInput(f"tensor {twice!r} would be written twice to {path.name}.")
    make = {name: contents for name, _, contents in listed}
    header, places = layout(infos)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with storage_errors(f"writing {path.name}"), partial.open("wb") as file:
            file.write(header)
            for name in places:
                file.write(_raw(make[name](), infos[name], name))
            file.flush()
            os.fsync(file.fileno())
        with storage_errors(f"writing {path.name}"):
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return places


def _raw(contents: Bytes, info: TensorInfo, name: str) -> memoryview:
    if isinstance(contents, np.ndarray):
        data = memoryview(np.ascontiguousarray(contents).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    else:
        data = memoryview(contents).cast("B")
    if data.nbytes != info.nbytes:
        raise InvalidInput(
            f"tensor {name!r} has {data.nbytes} bytes; {info.dtype} of shape {info.shape} takes {info.nbytes}."
        )
    return data
