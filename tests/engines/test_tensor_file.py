"""Safetensors files against the official reader and writer, and against everything a stranger may put in a header."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import numpy as official
from safetensors import safe_open

from lehr.engines.graph.tensor_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    SafetensorsFile,
    SafetensorsFolder,
    TensorInfo,
    layout,
    write_safetensors,
)
from lehr.runtime.errors import InvalidInput, RunFailed

Array = npt.NDArray[Any]
Save = Callable[[Mapping[str, Array]], Path]


def save(path: Path, tensors: Mapping[str, Array]) -> Path:
    write_safetensors(path, [(name, TensorInfo(a.dtype, a.shape), lambda a=a: a) for name, a in tensors.items()])
    return path


def forge(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    listed = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": listed[0], "data_offsets": listed[1]}


NATIVE = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = st.sampled_from(NATIVE).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
TENSORS = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), ARRAYS, max_size=5)

# ----------------------------------------------------------------------------------------- against the official


@given(TENSORS)
def test_the_official_reader_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, tensors: Any) -> None:
    path = save(tmp_path_factory.mktemp("written") / "a.safetensors", tensors)
    read = official.load_file(path)
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in read.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()
    }


@given(TENSORS)
def test_we_read_what_the_official_writer_writes(tmp_path_factory: pytest.TempPathFactory, tensors: Any) -> None:
    path = tmp_path_factory.mktemp("official") / "a.safetensors"
    official.save_file(tensors, path)
    ours = SafetensorsFile(path)
    assert set(ours.names()) == set(tensors)
    for name, expected in tensors.items():
        assert ours.info(name) == TensorInfo(expected.dtype, expected.shape)
        found = ours.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_element_type_comes_back(tmp_path: Path, code: str) -> None:
    dtype = DTYPES[code]
    array = np.arange(6 * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(2, 3)
    if dtype == np.bool_:
        array = array.view(np.uint8).__mod__(2).view(np.bool_)
    file = SafetensorsFile(save(tmp_path / "a.safetensors", {"x": array}))
    assert file.read("x").tobytes() == array.tobytes()
    with safe_open(tmp_path / "a.safetensors", "np") as theirs:
        assert theirs.get_slice("x").get_dtype() == code


def test_bytes_depend_on_names_and_contents_and_not_on_order(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {"b": np.ones(3, np.int8), "a": np.ones((2, 2), np.float32), "c": np.zeros(5, np.int64)}
    first = save(tmp_path / "1", tensors).read_bytes()
    assert save(tmp_path / "2", dict(reversed(tensors.items()))).read_bytes() == first


@given(st.dictionaries(st.text(max_size=20), st.sampled_from(sorted(DTYPES)), min_size=1))
def test_data_is_aligned_to_64_bytes_and_tensors_to_their_elements(codes: dict[str, str]) -> None:
    infos = {name: TensorInfo(DTYPES[code], (3,)) for name, code in codes.items()}
    header, places = layout(infos)
    assert len(header) % 64 == 0
    assert min(place.offset for place in places.values()) == len(header)
    assert all(place.offset % infos[name].dtype.itemsize == 0 for name, place in places.items())


def test_reading_maps_one_tensor_and_loads_none(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {f"t{k}": np.full(1 << 20, k, np.float32) for k in range(4)})
    tracemalloc.start()
    read = SafetensorsFile(path).read("t3")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read[-1] == 3
    assert not read.flags.writeable
    assert peak < 1 << 20, "one tensor has 4 MiB"


# ------------------------------------------------------------------------------------------------- hostile files

HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "an empty header": (b"", b"", "no JSON"),
    "no JSON": (b"{", b"", "no JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", "no JSON"),
    "nesting without end": (b"[" * 100_000, b"", "no JSON"),
    "a name twice": (b'{"x": 1, "x": 2}', b"", "twice"),
    "a list": ([], b"", "expected an object"),
    "an entry that is none": ({"x": 3}, b"", "expected an object"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata that is a list": ({"__metadata__": []}, b"", "__metadata__"),
    "an unknown dtype": ({"x": entry(dtype="F33")}, bytes(8), "F33"),
    "a dtype that is a list": ({"x": entry(dtype=["F32"])}, bytes(8), "dtype"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "shape"),
    "a negative size": ({"x": entry(shape=(-2,))}, bytes(8), "shape"),
    "a size that is a truth value": ({"x": entry(shape=(True, 2))}, bytes(8), "shape"),
    "a fractional size": ({"x": entry(shape=(2.0,))}, bytes(8), "shape"),
    "a size beyond any memory": ({"x": entry(shape=(2**62, 2**62))}, bytes(8), "takes"),
    "a shape that is a number": ({"x": entry(shape=2)}, bytes(8), "shape"),
    "one offset": ({"x": entry(offsets=(0,))}, bytes(8), "data_offsets"),
    "negative offsets": ({"x": entry(offsets=(-8, 0))}, bytes(8), "data_offsets"),
    "offsets in reverse": ({"x": entry(offsets=(8, 0))}, bytes(8), "takes 8 bytes"),
    "fewer bytes than the shape takes": ({"x": entry(offsets=(0, 4))}, bytes(4), "takes 8 bytes"),
    "a tensor beyond the end": ({"x": entry()}, bytes(4), "truncated"),
    "bytes that belong to no tensor": ({"x": entry()}, bytes(9), "longer"),
    "overlapping tensors": ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "overlaps"),
    "a gap": ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "gap"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_with_nonsense_is_refused_with_its_file_and_what_was_expected(tmp_path: Path, kind: str) -> None:
    header, data, said = HOSTILE[kind]
    path = forge(tmp_path / "strange.safetensors", header, data)
    with pytest.raises(InvalidInput, match=said) as caught:
        SafetensorsFile(path)
    assert "strange.safetensors" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1, 1000])
def test_a_header_length_is_not_believed(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidInput, match=str(claimed)):
        SafetensorsFile(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.int8)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidInput, match=r"a\.safetensors"):
            SafetensorsFile(path)


@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = save(tmp_path_factory.mktemp("damaged") / "a.safetensors", {"x": np.ones((2, 3), np.float32)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except InvalidInput:
        return
    for name in file.names():
        assert file.read(name).nbytes == file.info(name).nbytes <= 24


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.ones(1 << 14, np.float32)})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidInput, match="Did the file change"):
        file.read("x")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["absent", "a folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "a.safetensors")
    with pytest.raises(InvalidInput, match=r"cannot be read"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'y'"):
        SafetensorsFile(save(tmp_path / "a.safetensors", {"x": np.ones(1)})).info("y")


# ------------------------------------------------------------------------------------------------------ writing


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"x": np.ones(1)})
    before = path.read_bytes()

    def fail() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, [("x", TensorInfo(np.dtype(np.float32), (1,)), fail)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_contents_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="has 3 bytes"):
        write_safetensors(tmp_path / "a", [("x", TensorInfo(np.dtype(np.float32), (1,)), lambda: b"abc")])


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    item = ("x", TensorInfo(np.dtype(np.int8), (1,)), lambda: b"a")
    with pytest.raises(InvalidInput, match="'x' would be written twice"):
        write_safetensors(tmp_path / "a", [item, item])


def test_an_element_type_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="int4"):
        save(tmp_path / "a", {"x": np.zeros(2, ml_dtypes.int4)})


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="writing a"):
        save(tmp_path / "no" / "a", {"x": np.ones(1)})


# ------------------------------------------------------------------------------------------------------- shards


def shards(folder: Path, weight_map: Mapping[str, Any]) -> Path:
    save(folder / "m-1.safetensors", {"a": np.full(2, 1.0), "b": np.full(2, 2.0)})
    save(folder / "m-2.safetensors", {"c": np.full(2, 3.0)})
    (folder / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


WHOLE = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}


def test_shards_are_one_source(tmp_path: Path) -> None:
    folder = shards(tmp_path, WHOLE)
    for path in (folder, folder / "m.safetensors.index.json"):
        source = SafetensorsFolder(path)
        assert {name: source.read(name)[0] for name in source.names()} == {"a": 1.0, "b": 2.0, "c": 3.0}
        assert source.info("c") == TensorInfo(np.dtype(np.float64), (2,))


def test_a_folder_with_one_file_needs_no_index(tmp_path: Path) -> None:
    save(tmp_path / "only.safetensors", {"x": np.full(1, 7.0)})
    assert SafetensorsFolder(tmp_path).read("x")[0] == 7.0


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({**WHOLE, "d": "m-2.safetensors"}, "'d'"),
        ({"a": "m-1.safetensors", "c": "m-2.safetensors"}, "does not list 'b'"),
        ({**WHOLE, "c": "m-3.safetensors"}, "cannot be read"),
        ({**WHOLE, "c": "../m-2.safetensors"}, "plain name"),
        ({**WHOLE, "c": "/etc/passwd"}, "plain name"),
        ({**WHOLE, "c": ".."}, "plain name"),
        ({**WHOLE, "c": 3}, "no index"),
        ([], "no index"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, weight_map: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        SafetensorsFolder(shards(tmp_path, weight_map))


def test_a_folder_must_hold_one_candidate(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no \.safetensors"):
        SafetensorsFolder(tmp_path)
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", {"x": np.ones(1)})
    with pytest.raises(InvalidInput, match="name the one"):
        SafetensorsFolder(tmp_path)
