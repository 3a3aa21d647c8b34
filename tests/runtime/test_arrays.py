"""Arrays on disk: the same as NumPy's where both can read, refused where NumPy would trust the file."""

from __future__ import annotations

import io
import pathlib
import struct
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lehr.runtime import arrays as module
from lehr.runtime.arrays import read_arrays, write_arrays
from lehr.runtime.errors import BundleError, InvalidInput

DTYPES = ["?", "i1", "u1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", ">f4", ">i8"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("arrays") / "x.npz"


def same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype.newbyteorder("<") and bool(np.array_equal(a, b, equal_nan=True))


@given(st.dictionaries(st.sampled_from(["x", "steps/0", "condition.class_labels", "é"]), ARRAYS, max_size=3))
def test_numpy_reads_what_is_written_and_so_do_we(file: pathlib.Path, arrays: dict[str, Any]) -> None:
    write_arrays(file, arrays)
    with np.load(file, allow_pickle=False) as theirs:
        assert set(theirs.files) == set(arrays)
        assert all(same(theirs[name], arrays[name]) for name in arrays)
    ours = read_arrays(file)
    assert set(ours) == set(arrays)
    assert all(same(ours[name], arrays[name]) for name in arrays)


@given(array=ARRAYS, compressed=st.booleans(), fortran=st.booleans())
def test_we_read_what_numpy_writes(file: pathlib.Path, array: Any, compressed: bool, fortran: bool) -> None:
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="F" if fortran else "C")
    (np.savez_compressed if compressed else np.savez)(file, x=array)
    assert same(read_arrays(file)["x"], array)


def test_equal_arrays_give_equal_bytes_whatever_their_order_and_layout() -> None:
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.array(True)
    first, second = io.BytesIO(), io.BytesIO()
    write_arrays(first, {"a": a, "b": b})
    write_arrays(second, {"b": b, "a": np.asfortranarray(a).astype(">f4")})
    assert first.getvalue() == second.getvalue()


def test_arrays_that_are_read_can_be_written_to(file: pathlib.Path) -> None:
    write_arrays(file, {"x": np.zeros(3)})
    array = read_arrays(file)["x"]
    array[0] = 1
    assert array.flags.aligned


@pytest.mark.parametrize(
    "array", [np.array([None]), np.array(["a"]), np.zeros(2, "c8"), np.zeros(1, "M8[s]"), np.zeros(2, "i4,f4")]
)
def test_other_types_are_not_written(file: pathlib.Path, array: Any) -> None:
    with pytest.raises(InvalidInput, match="only bool, integers and floats"):
        write_arrays(file, {"x": array})


def test_bad_names_are_not_written(file: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="cannot name an array"):
        write_arrays(file, {"../x": np.zeros(1)})


# ------------------------------------------------------------------------------------------------- hostile


class Detonator:
    """Unpickling one of these writes a file: the test sees whether anything was unpickled."""

    def __init__(self, trace: pathlib.Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (self.trace,)


def test_pickled_objects_are_refused_and_never_loaded(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([Detonator(tmp_path / "trace")], dtype=object))
    with pytest.raises(BundleError, match="pickles are never read"):
        read_arrays(tmp_path / "x.npz")
    assert not (tmp_path / "trace").exists()


def member(header: bytes, data: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    return magic + struct.pack("<H", len(header)) + header + data


def archive(path: pathlib.Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


GOOD = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n"
HUGE = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"x.npy": member(HUGE, b"12345678")}, "declares shape"),
        ({"x.npy": member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n", b"1234")}, "plain"),
        ({"x.npy": member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,), }\n")}, "plain"),
        ({"x.npy": member(b"{'descr': '|V4', 'fortran_order': False, 'shape': (1,), }\n", b"1234")}, "plain"),
        (
            {"x.npy": member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 40 + b"), }\n", b"1234")},
            "shape",
        ),
        ({"x.npy": member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0,4611686018427387904), }\n")}, "shape"),
        ({"x.npy": member(b"{'descr': '|b1', 'fortran_order': False, 'shape': (1,), }\n", b"\x02")}, "booleans"),
        ({"x.npy": member(GOOD, b"1234", magic=b"\x93NUMPY\x03\x00")}, "format 1.0"),
        ({"x.npy": member(GOOD, b"123")}, "declares shape"),
        ({"x.npy": member(GOOD, b"12345")}, "declares shape"),
        ({"x.npy": b""}, "format 1.0"),
        ({"x.txt": member(GOOD, b"1234")}, "bad name"),
        ({"../x.npy": member(GOOD, b"1234")}, "bad name"),
        ({"/x.npy": member(GOOD, b"1234")}, "bad name"),
    ],
)
def test_a_member_that_is_no_plain_array_is_refused(
    tmp_path: pathlib.Path, members: dict[str, bytes], match: str
) -> None:
    with pytest.raises(BundleError, match=match):
        read_arrays(archive(tmp_path / "x.npz", members))


def test_a_bomb_is_refused_before_anything_is_allocated(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_INFLATION", 32 << 20)  # as large a bomb as the real bound needs takes long to make
    zeros = 40 << 20
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }\n" % zeros
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as out, out.open("x.npy", "w") as stream:
        stream.write(member(header))
        for _ in range(zeros >> 20):
            stream.write(bytes(1 << 20))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(BundleError, match="arrays claim"):
        read_arrays(tmp_path / "x.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_callers_bound_holds_for_all_arrays_together(file: pathlib.Path) -> None:
    write_arrays(file, {"a": np.zeros(100), "b": np.zeros(100)})
    assert len(read_arrays(file, max_bytes=2000)) == 2
    with pytest.raises(BundleError, match="at most 1500"):
        read_arrays(file, max_bytes=1500)


def test_a_stored_member_that_claims_more_than_it_has_is_refused(file: pathlib.Path) -> None:
    write_arrays(file, {"x": np.zeros(4)})
    data = bytearray(file.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    struct.pack_into("<L", data, entry + 24, 100 << 20)  # the directory's uncompressed size
    file.write_bytes(data)
    with pytest.raises(BundleError, match="claims 104857600 bytes"):
        read_arrays(file)


def test_a_directory_that_would_fill_the_memory_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_INDEX_BYTES", 1000)
    many = archive(tmp_path / "x.npz", {f"{i}.npy": b"" for i in range(100)})
    with pytest.raises(BundleError, match="its directory claims"):
        read_arrays(many)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_that_is_there_twice_is_refused(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as out:
        out.writestr("x.npy", member(GOOD, b"1234"))
        out.writestr("x.npy", member(GOOD, b"4321"))
    with pytest.raises(BundleError, match="twice"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path: pathlib.Path, compression: int) -> None:
    with pytest.raises(BundleError, match="neither stored nor deflated"):
        read_arrays(archive(tmp_path / "x.npz", {"x.npy": member(GOOD, b"1234")}, compression))


def test_a_truncated_archive_is_refused_wherever_it_ends(file: pathlib.Path) -> None:
    write_arrays(file, {"x": np.arange(5.0), "y": np.arange(3)})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(BundleError):
            read_arrays(file)


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=8), compressed=st.booleans())
def test_an_archive_with_altered_bytes_gives_arrays_or_a_bundle_error(
    file: pathlib.Path, place: float, value: bytes, compressed: bool
) -> None:
    (np.savez_compressed if compressed else np.savez)(file, x=np.arange(4, dtype=np.float32), y=np.array(1))
    data = bytearray(file.read_bytes())
    start = int(place * len(data))
    data[start : start + len(value)] = value
    file.write_bytes(data)
    try:
        read = read_arrays(file, max_bytes=1 << 20)
    except BundleError:
        return
    assert sum(array.nbytes for array in read.values()) <= 1 << 20
