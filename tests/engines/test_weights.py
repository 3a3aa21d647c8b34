"""Weights bound into a graph: what ONNX Runtime computes with them, what is refused, and what memory it takes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lehr.engines.graph.check import check_graph
from lehr.engines.graph.tensor_file import SafetensorsFile, TensorInfo, write_safetensors
from lehr.engines.graph.weights import (
    TIED,
    UNUSED,
    Storage,
    bind_weights,
    node_count,
    parameter_count,
    save_graph,
    weight_bytes,
)
from lehr.runtime.errors import ExportFailed, InvalidInput
from lehr.runtime.paths import VP
from lehr.runtime.prediction import EPSILON
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
W, B = RNG.standard_normal((3, 4)).astype(np.float32), RNG.standard_normal(4).astype(np.float32)

SPEC = ModelSpec(
    name="linear",
    inputs=(
        TensorSpec(name="sample", shape=("batch", "tokens", 3), varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
    ),
    outputs=(TensorSpec(name="output", shape=("batch", "tokens", 4), varies=Varies.SAMPLE),),
    dims=(BATCH, Dim(name="tokens", default=8)),
    path=VP(),
    prediction=EPSILON,
)


class Stored:
    """Arrays in memory as a source; counts reads, and gives raw bytes if asked to."""

    def __init__(self, tensors: Mapping[str, Array], *, raw: bool = False) -> None:
        self.tensors, self.raw, self.reads = dict(tensors), raw, list[str]()

    def names(self) -> Iterable[str]:
        return self.tensors

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].dtype, self.tensors[name].shape)

    def read(self, name: str) -> Array | memoryview:
        self.reads.append(name)
        return memoryview(self.tensors[name].tobytes()) if self.raw else self.tensors[name]


def weight(name: str, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def linear(extra: Mapping[str, tuple[int, ...]] | None = None, **metadata: Any) -> ir.Model:
    """output = sample @ w + b + one, w and b without data, one embedded; ``extra`` weights are added unused."""
    inputs = [weight("sample", ()), weight("timestep", ())]
    for value, tensor in zip(inputs, SPEC.inputs, strict=True):
        value.shape = ir.Shape(tensor.shape)
    w, b = weight("w", (3, 4)), weight("b", (4,))
    one = ir.Value(name="one", const_value=ir.tensor(np.ones(1, np.float32), name="one"))
    product = ir.node("MatMul", [inputs[0], w])
    shifted = ir.node("Add", [product.outputs[0], b])
    total = ir.node("Add", [shifted.outputs[0], one])
    total.outputs[0].name, total.outputs[0].shape = "output", ir.Shape(("batch", "tokens", 4))
    total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    others = [weight(name, shape) for name, shape in (extra or {}).items()]
    graph = ir.Graph(
        inputs,
        total.outputs,
        nodes=[product, shifted, total],
        initializers=[w, b, one, *others],
        opset_imports={"": 23},
        name="linear",
    )
    props = {key: json.dumps(value) for key, value in metadata.items()}
    return ir.Model(graph, ir_version=10, metadata_props=props)


def run(folder: Path, x: Array) -> Array:
    session = ort.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"sample": x, "timestep": np.zeros(len(x), np.float32)})[0]
    return result


def bind(model: ir.Model, tensors: Mapping[str, Array], folder: Path, **kwargs: Any) -> None:
    bind_weights(model, Stored(tensors), folder / "weights.safetensors", **kwargs)


# ------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("raw", [False, True], ids=["arrays", "raw bytes"])
def test_a_bound_graph_computes_with_its_weights(tmp_path: Path, raw: bool) -> None:
    model, x = linear(), RNG.standard_normal((5, 2, 3)).astype(np.float32)
    bind_weights(model, Stored({"b": B, "w": W}, raw=raw), tmp_path / "weights.safetensors")
    save_graph(model, tmp_path / "step.onnx")
    check_graph(tmp_path / "step.onnx", SPEC)
    np.testing.assert_allclose(run(tmp_path, x), x @ W + B + 1, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.onnx", "weights.safetensors"]
    stored = SafetensorsFile(tmp_path / "weights.safetensors")
    assert {name: stored.read(name).tobytes() for name in stored.names()} == {"w": W.tobytes(), "b": B.tobytes()}


def test_the_graph_refers_to_its_weights_by_file_name_and_moves_with_them(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    model = linear()
    bind(model, {"w": W, "b": B}, tmp_path / "here")
    save_graph(model, tmp_path / "here" / "step.onnx")
    assert str(tmp_path).encode() not in (tmp_path / "here" / "step.onnx").read_bytes()
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(tmp_path / "there", np.zeros((1, 1, 3), np.float32)).shape == (1, 1, 4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_converted_to_the_graphs(tmp_path: Path, dtype: Any) -> None:
    model = linear()
    bind(model, {"w": W.astype(dtype), "b": B}, tmp_path)
    stored = SafetensorsFile(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(stored.read("w"), W.astype(dtype).astype(np.float32))
    assert stored.info("w").dtype == np.float32


def test_weights_can_be_bound_from_a_file_and_give_that_file_again(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    bind(linear(), {"w": W, "b": B}, tmp_path / "first")
    path = tmp_path / "first" / "weights.safetensors"
    bind_weights(linear(), SafetensorsFile(path), tmp_path / "second" / "weights.safetensors")
    assert (tmp_path / "second" / "weights.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rename", [{"weight": "w", "bias": "b"}, {"weight": "w", "bias": "b"}.get])
def test_a_key_map_renames(tmp_path: Path, rename: Any) -> None:
    model = linear()
    extra = {} if isinstance(rename, dict) else {"left_out": B}
    bind(model, {"weight": W, "bias": B, **extra}, tmp_path, rename=rename)
    assert set(SafetensorsFile(tmp_path / "weights.safetensors").names()) == {"w", "b"}


@pytest.mark.parametrize("names", [("w",), ("head",), ("w", "head")])
def test_a_shared_tensor_may_be_stored_under_any_of_its_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    model = linear(**{TIED: {"head": "w"}})
    bind(model, {**dict.fromkeys(names, W), "b": B}, tmp_path)
    assert set(SafetensorsFile(tmp_path / "weights.safetensors").names()) == {"w", "b"}


def test_what_the_module_stores_and_the_graph_does_not_need_may_be_there_or_not(tmp_path: Path) -> None:
    for extra in ({}, {"mask_token": B}):
        bind(linear(**{UNUSED: ["mask_token"]}), {"w": W, "b": B, **extra}, tmp_path)
        assert set(SafetensorsFile(tmp_path / "weights.safetensors").names()) == {"w", "b"}


def test_binding_holds_a_tensor_or_two_and_never_all(tmp_path: Path) -> None:
    size = 1 << 18
    names = [f"layer.{k}" for k in range(32)]
    write_safetensors(
        tmp_path / "half.safetensors",
        [(name, TensorInfo(np.dtype(np.float16), (size,)), lambda: np.ones(size, np.float16)) for name in names]
        + [("w", TensorInfo(W.dtype, W.shape), lambda: W), ("b", TensorInfo(B.dtype, B.shape), lambda: B)],
    )
    model = linear(dict.fromkeys(names, (size,)))
    tracemalloc.start()
    bind_weights(model, SafetensorsFile(tmp_path / "half.safetensors"), tmp_path / "weights.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "weights.safetensors").stat().st_size > 32 * 4 * size
    assert peak < 4 * 4 * size, "a converted tensor has 1 MiB, all of them 32"


def test_each_tensor_is_read_once(tmp_path: Path) -> None:
    source = Stored({"w": W, "b": B})
    bind_weights(linear(), source, tmp_path / "weights.safetensors")
    assert sorted(source.reads) == ["b", "w"]


def test_parameters_are_weights_and_not_constants(tmp_path: Path) -> None:
    model = linear()
    assert (parameter_count(model), node_count(model)) == (16, 3)
    bind(model, {"w": W, "b": B}, tmp_path)
    assert parameter_count(model) == 16


# ---------------------------------------------------------------------------------------------- what is refused


def refused(tensors: Mapping[str, Array], folder: Path, **kwargs: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        bind(kwargs.pop("model", None) or linear(), tensors, folder, **kwargs)
    assert list(folder.iterdir()) == [], "nothing may be left behind"
    return str(caught.value)


def test_missing_unexpected_and_misshapen_weights_are_listed(tmp_path: Path) -> None:
    message = refused({"w": W.T, "c": B}, tmp_path)
    assert "missing (1): b" in message
    assert "unexpected (1): c" in message
    assert "w is float32 (4, 3), expected float32 (3, 4)" in message


def test_a_long_list_is_cut_after_ten_and_counted(tmp_path: Path) -> None:
    wanted = {f"layer.{k:02}": (1,) for k in range(25)}
    message = refused({"w": W, "b": B}, tmp_path, model=linear(wanted))
    assert "missing (25): layer.00, " in message
    assert "layer.09 and 15 more" in message
    assert "layer.10" not in message


def test_an_integer_is_no_float(tmp_path: Path) -> None:
    assert "w is int8 (3, 4)" in refused({"w": W.astype(np.int8), "b": B}, tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_damaged_weights_are_named(tmp_path: Path, bad: float, dtype: Any) -> None:
    damaged = W.astype(dtype)
    damaged[1, 2] = bad
    message = refused({"w": damaged, "b": B}, tmp_path)
    assert "'w'" in message
    assert f"{bad}" in message
    assert "element 6" in message


def test_a_value_beyond_the_graphs_float_is_refused(tmp_path: Path) -> None:
    assert "1e+300" in refused({"w": np.full((3, 4), 1e300), "b": B}, tmp_path)


def test_a_key_map_that_sends_two_tensors_to_one_is_refused(tmp_path: Path) -> None:
    assert "both 'w' and 'v'" in refused({"w": W, "v": W, "b": B}, tmp_path, rename={"v": "w"})


def test_bytes_of_another_size_are_refused(tmp_path: Path) -> None:
    class Lying(Stored):
        def read(self, name: str) -> memoryview:
            return memoryview(bytes(3))

    with pytest.raises(InvalidInput, match="has 3 bytes"):
        bind_weights(linear(), Lying({"w": W, "b": B}), tmp_path / "weights.safetensors")


def test_a_graph_is_saved_beside_its_weights_only(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    model = linear()
    bind(model, {"w": W, "b": B}, tmp_path)
    with pytest.raises(InvalidInput, match="into the folder of its weights"):
        save_graph(model, tmp_path / "other" / "step.onnx")


# ---------------------------------------------------------------------------------------------- structure only


def test_a_graph_without_weights_refers_to_where_they_will_be(tmp_path: Path) -> None:
    (tmp_path / "bound").mkdir()
    model = linear()
    save_graph(model, tmp_path / "step.onnx")
    assert parameter_count(ir.load(tmp_path / "step.onnx")) == 16
    assert all(model.graph.initializers[name].const_value is None for name in ("w", "b")), "saving binds nothing"
    bind(model, {"w": W, "b": B}, tmp_path / "bound")
    save_graph(model, tmp_path / "bound" / "step.onnx")
    assert (tmp_path / "bound" / "step.onnx").read_bytes() == (tmp_path / "step.onnx").read_bytes()


# ---------------------------------------------------------------------------------------------- checking a graph


def saved(folder: Path, model: ir.Model) -> Path:
    bind(model, {"w": W, "b": B}, folder)
    save_graph(model, folder / "step.onnx")
    return folder / "step.onnx"


def test_a_missing_weights_file_fails_the_check(tmp_path: Path) -> None:
    path = saved(tmp_path, linear())
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ExportFailed, match=r"step\.onnx is not valid ONNX"):
        check_graph(path, SPEC)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "x"}, "inputs"),
        ({"dtype": DType.FLOAT16}, "float16"),
        ({"shape": ("batch", 8, 3)}, "tokens"),
        ({"shape": ("batch", "tokens", 3, 1)}, "inputs"),
    ],
)
def test_another_signature_fails_the_check(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    first = {"name": "sample", "dtype": DType.FLOAT32, "shape": ("batch", "tokens", 3), "varies": Varies.SAMPLE}
    inputs = (TensorSpec(**{**first, **change}), SPEC.inputs[1])
    other = ModelSpec(
        name="other", inputs=inputs, outputs=SPEC.outputs, dims=SPEC.dims, path=SPEC.path, prediction=SPEC.prediction
    )
    with pytest.raises(ExportFailed, match=said):
        check_graph(saved(tmp_path, linear()), other)


@pytest.mark.parametrize("opsets", [{"": 17}, {"": 24}, {"": 23, "com.microsoft": 1}])
def test_operator_sets_that_engines_do_not_all_know_fail_the_check(tmp_path: Path, opsets: dict[str, int]) -> None:
    model = linear()
    model.opset_imports.clear()
    model.opset_imports.update(opsets)
    with pytest.raises(ExportFailed, match="operator sets"):
        check_graph(saved(tmp_path, model), SPEC)


def test_a_newer_file_format_fails_the_check(tmp_path: Path) -> None:
    model = linear()
    model.ir_version = 12
    with pytest.raises(ExportFailed, match="IR version 12"):
        check_graph(saved(tmp_path, model), SPEC)


def test_an_ill_typed_graph_fails_the_check(tmp_path: Path) -> None:
    model = linear()
    model.graph.node(0).op_type = "NoSuchOperator"
    with pytest.raises(ExportFailed, match="NoSuchOperator"):
        check_graph(saved(tmp_path, model), SPEC)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_weights_kept_in_sixteen_bits_are_widened_in_the_graph(half: Any, tmp_path: Path) -> None:
    x = RNG.standard_normal((2, 5, 3)).astype(np.float32)
    results = []
    for storage, size in ((Storage.GRAPH, 4 * W.size), (Storage.SOURCE, 2 * W.size)):
        folder = tmp_path / storage.value
        folder.mkdir()
        model = linear()
        bind(model, {"w": W.astype(half), "b": B}, folder, storage=storage)
        assert weight_bytes(model) == size + 4 * B.size
        assert parameter_count(model) == W.size + B.size
        save_graph(model, folder / "step.onnx")
        check_graph(folder / "step.onnx", SPEC)
        results.append(run(folder, x))
    np.testing.assert_array_equal(*results)
