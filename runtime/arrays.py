"""Arrays on disk: ``.npz`` files that are equal when the arrays are, and a reader that trusts nothing in them.

Written: members sorted by name, stored without compression (deflate's output differs between zlib versions), fixed
time stamps, C order, little endian. Read: what an archive claims to unpack to is bounded before anything is allocated;
plain booleans, integers and floats only, so no pickle is ever opened; the header is matched, not evaluated.
"""

from __future__ import annotations

import math
import pathlib
import re
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.names import name_problem

MAX_ARRAYS_BYTES = 8 << 30  # of one archive, unless the caller says otherwise
MAX_INFLATION = 512 << 20  # bytes that deflated members may add to the archive's own size
MAX_INDEX_BYTES = 4 << 20  # of the archive's directory, which zipfile turns into objects ten times its size
MAX_RANK = 16

_DTYPES = frozenset({"|b1", "|i1", "|u1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8"})
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    r"\{'descr': '(?P<descr>[^']{1,8})', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,19}, ?)*(?:\d{1,19})?)\),? ?\} *\n"
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip archive can name
_CHUNK = 1 << 20
_MAX_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # deflate codes 258 bytes in 2 bits at best
_ZIPFILE_FAILURES = (  # what zipfile raises for archives that were tampered with
    zipfile.BadZipFile,
    EOFError,
    OSError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    struct.error,
    zlib.error,
)

# ------------------------------------------------------------------------------------------------- writing


def write_arrays(target: pathlib.Path | IO[bytes], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write ``arrays`` to an archive, a path or a seekable stream, that ``np.load`` reads too.

    Raises:
        InvalidInput: a name that is not allowed in a bundle, or an array of another type than bool, integer or
            float of at most 64 bits.
    """
    for name, array in arrays.items():
        if problem := name_problem(name):
            raise InvalidInput(f"{reprlib.repr(name)} cannot name an array: {problem}")
        if _little_endian(np.asarray(array).dtype).str not in _DTYPES:
            raise InvalidInput(f"array {name!r} is {np.asarray(array).dtype}; only bool, integers and floats are kept")
        if np.asarray(array).ndim > MAX_RANK:
            raise InvalidInput(f"array {name!r} has {np.asarray(array).ndim} dimensions, at most {MAX_RANK}")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            array = np.asarray(arrays[name])
            plain = np.asarray(array, dtype=_little_endian(array.dtype), order="C")
            info = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            info.create_system, info.external_attr = 3, 0o644 << 16  # else the machine's own, and bytes would differ
            with archive.open(info, "w", force_zip64=plain.nbytes > 1 << 30) as stream:
                np.lib.format.write_array(stream, plain, version=(1, 0), allow_pickle=False)


def _little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    found: np.dtype[Any] = dtype.newbyteorder("<")
    return found


# ------------------------------------------------------------------------------------------------- reading


def read_arrays(path: pathlib.Path, *, max_bytes: int = MAX_ARRAYS_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Read an archive of plain arrays, whoever made it; ``max_bytes`` bounds all arrays together.

    Raises:
        BundleError: no archive, a truncated one, one that asks for more memory than ``max_bytes`` or than its size
            can explain, or a member that is encrypted, badly named or no plain array.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            _check_index(stream, size)
            with zipfile.ZipFile(stream) as archive:
                return _read_members(archive, size, max_bytes)
    except BundleError as e:
        raise BundleError(f"{path.name}: {e}. Expected an .npz of plain arrays; make it again.") from e
    except _ZIPFILE_FAILURES as e:
        raise BundleError(f"{path.name} is no readable .npz archive ({e}); make it again.") from e


def _check_index(stream: IO[bytes], size: int) -> None:
    """Bound the archive's directory before zipfile reads it; the places are those that zipfile looks at."""
    tail = min(size, 98)  # zip64 end record 56, zip64 locator 20, end record 22
    stream.seek(size - tail)
    data = stream.read(tail)
    end = data[-22:]
    if len(end) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise BundleError("it does not end as an archive does, it may be truncated")
    index_bytes: int = struct.unpack_from("<L", end, 12)[0]
    if data[-42:-38] == b"PK\x06\x07":
        if len(data) < 98:
            raise BundleError("its zip64 record is truncated")
        index_bytes = struct.unpack_from("<Q", data, 40)[0]
    if index_bytes > min(size, MAX_INDEX_BYTES):
        raise BundleError(f"its directory claims {index_bytes} bytes, at most {min(size, MAX_INDEX_BYTES)}")


def _read_members(archive: zipfile.ZipFile, size: int, max_bytes: int) -> dict[str, npt.NDArray[Any]]:
    members = archive.infolist()
    total, allowed = sum(info.file_size for info in members), min(size + MAX_INFLATION, max_bytes)
    if total > allowed:
        raise BundleError(f"its arrays claim {total} bytes, at most {allowed}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for info in members:
        name = info.filename[:-4] if info.filename.endswith(".npy") else ""
        label = reprlib.repr(info.filename)
        if (problem := name_problem(name)) or name in arrays:
            raise BundleError(f"member {label} has a bad name: {problem or 'it is there twice'}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise BundleError(f"member {label} is encrypted, or neither stored nor deflated")
        if info.compress_size > size or info.file_size > _MAX_RATIO[info.compress_type] * info.compress_size:
            raise BundleError(f"member {label} claims {info.file_size} bytes out of {info.compress_size}")
        with archive.open(info) as stream:
            arrays[name] = _read_array(stream, info.file_size, label)
    return arrays


def _read_array(stream: IO[bytes], size: int, label: str) -> npt.NDArray[Any]:
    start = stream.read(10)
    if start[:8] != _MAGIC or len(start) < 10:
        raise BundleError(f"member {label} is no array in NumPy's format 1.0")
    length: int = struct.unpack("<H", start[8:])[0]
    header = _HEADER.fullmatch(stream.read(length).decode("latin-1"))
    if header is None or header["descr"] not in _DTYPES:
        raise BundleError(f"member {label} is not made of plain booleans, integers or floats (pickles are never read)")
    dtype = np.dtype(header["descr"])
    shape = tuple(int(extent) for extent in header["shape"].replace(",", " ").split())
    expected = math.prod(shape) * dtype.itemsize
    if len(shape) > MAX_RANK or max(shape, default=0) >= 2**62 or expected != size - 10 - length:
        raise BundleError(f"member {label} declares shape {reprlib.repr(shape)} but holds {size - 10 - length} bytes")
    data = np.empty(expected, dtype=np.uint8)
    view, filled = data.data, 0
    while chunk := stream.read(_CHUNK):  # up to the end, where zipfile compares the checksum
        view[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled != expected:
        raise BundleError(f"member {label} ends after {filled} of {expected} bytes")
    if dtype == np.bool_ and bool(np.any(data > 1)):
        raise BundleError(f"member {label} holds booleans that are neither 0 nor 1")
    return data.view(dtype).reshape(shape, order="F" if header["fortran"] == "True" else "C")
