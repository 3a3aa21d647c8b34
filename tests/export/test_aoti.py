"""AOTInductor as an engine library: a graph as a module, compiled, loaded, and refused where it must be."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lehr.engines.builders import builder, candidates, fitting
from lehr.engines.graph.lowering.half import write_half
from lehr.engines.job import Job
from lehr.engines.settings import Mode, Settings
from lehr.engines.target import target
from lehr.export import aoti
from lehr.export.graph_module import GraphModule
from lehr.runtime.backends import backend, backends, drives
from lehr.runtime.errors import BuildFailed, BundleError, IncompatibleEngine, InvalidInput, MissingExtra, RunFailed
from lehr.runtime.recipe import Format, recipe

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")


def small_graph(*, odd: str = "Tanh") -> onnx.ModelProto:
    """sample (B, 4, H, W), sample.shape (4,), class_labels (B,) -> y: a table, sizes, a norm, attention."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 4).astype(np.float32), name)

    def ints(name: str, values) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    nodes = [
        helper.make_node("Conv", ["sample", "w_in"], ["h"], pads=[1, 1, 1, 1], name="in"),
        helper.make_node("GroupNormalization", ["h", "scale", "bias"], ["n"], num_groups=2, name="norm"),
        helper.make_node("Gather", ["table", "class_labels"], ["c"], name="table"),
        helper.make_node("Unsqueeze", ["c", "last_two"], ["c4"], name="c4"),
        helper.make_node("Add", ["n", "c4"], ["a"], name="add"),
        helper.make_node("Gather", ["sample.shape", "three"], ["width"], name="width"),
        helper.make_node("Cast", ["width"], ["w_float"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Range", ["zero", "w_float", "one_f"], ["columns"], name="range"),
        helper.make_node("Add", ["a", "columns"], ["b"], name="columns"),
        helper.make_node("Shape", ["b"], ["size"], name="size"),
        helper.make_node("Slice", ["size", "first", "second"], ["batch"], name="batch"),
        helper.make_node("Concat", ["batch", "four_rest"], ["flat_size"], axis=0, name="flat_size"),
        helper.make_node("Reshape", ["b", "flat_size"], ["flat"], name="flat"),
        helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1], name="tokens"),
        helper.make_node(
            "Attention", ["tokens", "tokens", "tokens"], ["att"], q_num_heads=1, kv_num_heads=1, name="attention"
        ),
        helper.make_node("Transpose", ["att"], ["back"], perm=[0, 2, 1], name="back"),
        helper.make_node("Reshape", ["back", "size"], ["image"], name="image"),
        helper.make_node(odd, ["image"], ["y"], name="last", domain="" if odd == "Tanh" else "org.example"),
    ]
    image = ["batch", 4, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, image),
            helper.make_tensor_value_info("sample.shape", TensorProto.INT64, [4]),
            helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, image)],
        [
            weight("w_in", 4, 4, 3, 3),
            weight("scale", 4),
            weight("bias", 4),
            weight("table", 5, 4),
            ints("three", 3),
            ints("first", [0]),
            ints("second", [1]),
            ints("four_rest", [4, -1]),
            ints("last_two", [2, 3]),
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(np.float32(1), "one_f"),
        ],
    )
    opsets = [helper.make_opsetid("", 23)] + ([helper.make_opsetid("org.example", 1)] if odd != "Tanh" else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds(batch: int = 2, height: int = 6, width: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(seed).standard_normal((batch, 4, height, width)).astype(np.float32)
    return {"sample": sample, "sample.shape": np.array(sample.shape), "class_labels": np.arange(batch) % 5}


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "step.onnx"
    onnx.save_model(small_graph(), path, save_as_external_data=True, location="w.bin", size_threshold=100)
    return path


@pytest.fixture(scope="module")
def reference(graph):
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return lambda given: session.run(["y"], given)[0]


@pytest.mark.parametrize("size", [(2, 6, 8), (1, 6, 8), (3, 5, 7)])
def test_a_graph_as_a_module_computes_what_the_graph_does(graph, reference, size):
    module, given = GraphModule(graph), feeds(*size)
    with torch.no_grad():
        (got,) = module(*(aoti._tensor(name, given[name], "cpu") for name in module.inputs))
    np.testing.assert_allclose(got.numpy(), reference(given), rtol=1e-5, atol=1e-5)


def test_an_operator_without_a_counterpart_is_refused_by_name(tmp_path):
    onnx.save_model(small_graph(odd="Odd"), tmp_path / "step.onnx")
    with pytest.raises(BuildFailed, match="node 'last': Odd has no counterpart"):
        GraphModule(tmp_path / "step.onnx")


def test_it_is_plugged_in_and_used_on_request_only():
    assert builder("aotinductor") is aoti.CPU
    assert builder("aotinductor", "cuda") is aoti.CUDA
    assert backend("aotinductor") is aoti.BACKEND
    assert "aotinductor" in backends()
    assert drives("aotinductor")
    assert "aotinductor" not in fitting(target("cpu"), recipe("fp32"))
    assert candidates(target("cpu"), recipe("bf16"), "aotinductor") == ("aotinductor",)
    with pytest.raises(InvalidInput, match="use --library aotinductor"):
        candidates(target("cuda"), recipe("bf16"))


def test_without_pytorch_the_message_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lehr.export.aoti")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    for find in (builder, backend):
        with pytest.raises(MissingExtra, match=r"pip install 'lehr\[export\]'"):
            find("aotinductor")


def job(graph: Path, name: str, **given) -> Job:
    known = {"target": target("cpu"), "library": aoti.NAME, "feeds": feeds(), "threads": 1}
    return Job(name="step", graph=graph, recipe=recipe(name), **known, **given)


@pytest.fixture(scope="module")
def engine(graph, tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("there is no g++ here")
    folder = tmp_path_factory.mktemp("aoti")
    plan = aoti.CPU.build(job(graph, "fp32"), folder)
    return plan, folder / plan.file, aoti.BACKEND.load(folder / plan.file, plan.options)


@pytest.mark.parametrize("size", [(2, 6, 8), (1, 6, 8), (5, 6, 8), (3, 5, 7), (2, 16, 9)])
def test_an_engine_computes_what_the_graph_does_at_any_batch_and_size(engine, reference, size):
    given = feeds(*size, seed=1)
    np.testing.assert_allclose(engine[2].run(given)["y"], reference(given), rtol=1e-4, atol=1e-5)


def test_a_plan_says_what_it_is_made_of(engine):
    plan = engine[0]
    assert plan.achieved_precision == {"float": 1.0}
    assert plan.operators["scaled_dot_product_attention"] == 1
    assert [row["name"] for row in plan.options["inputs"]] == ["sample", "sample.shape", "class_labels"]
    assert [row["dtype"] for row in plan.options["inputs"]] == ["float32", "int64", "int64"]
    assert plan.options["inputs"][0]["shape"][1] == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample": np.zeros((2, 3, 6, 8), np.float32)}, "has shape .2, 3, 6, 8."),
        ({"class_labels": np.zeros(3, np.int64)}, "'class_labels' has shape"),
        ({"class_labels": np.zeros(2, np.int32)}, "'class_labels' is int32, expected int64"),
        ({"class_labels": np.array([0, 99])}, "AOTInductor failed: index out of bounds"),
        ({"extra": np.zeros(1)}, "inputs are"),
    ],
)
def test_inputs_that_compiled_code_would_misread_are_refused(engine, change, says):
    with pytest.raises(RunFailed, match=says):
        engine[2].run({**feeds(), **change})


def test_native_code_that_nobody_built_here_is_not_loaded_unless_trusted(engine, tmp_path, monkeypatch):
    plan, file, _ = engine
    monkeypatch.setenv("LEHR_CACHE", str(tmp_path / "another"))
    with pytest.raises(IncompatibleEngine, match="native code that was not built by this user"):
        aoti.BACKEND.load(file, plan.options)
    monkeypatch.setenv(aoti.TRUST, "1")
    assert aoti.BACKEND.load(file, plan.options).run(feeds())["y"].shape == (2, 4, 6, 8)


def test_a_damaged_package_and_one_of_a_gpu_that_is_not_here_are_refused(engine, tmp_path):
    plan = engine[0]
    (tmp_path / "step.pt2").write_bytes(b"not a package")
    with pytest.raises(BundleError, match="no package of AOTInductor"):
        aoti.BACKEND.load(tmp_path / "step.pt2", plan.options)
    with pytest.raises(IncompatibleEngine, match=r"compiled for SM 9\.0"):
        aoti.BACKEND.load(engine[1], {**plan.options, "gpu": "9.0"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_built_for_one(graph, tmp_path):
    with pytest.raises(IncompatibleEngine, match="PyTorch finds no NVIDIA GPU"):
        aoti.CUDA.build(job(graph, "fp32"), tmp_path)


def test_without_a_compiler_and_with_a_useless_setting_the_build_is_refused(graph, tmp_path, monkeypatch):
    settings = Settings(mode=Mode.THROUGHPUT)
    with pytest.raises(InvalidInput, match="no use for --mode"):
        aoti.CPU.build(job(graph, "fp32", settings=settings), tmp_path)
    monkeypatch.setattr(aoti.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildFailed, match="needs a C\\+\\+ compiler"):
        aoti.CPU.build(job(graph, "fp32"), tmp_path)


@compiler
@pytest.mark.long
def test_half_precision_is_the_graphs_own(graph, reference, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    half = write_half(graph, folder, keep_high=())
    plan = aoti.CPU.build(job(half, "fp16"), tmp_path)
    assert plan.achieved_precision["float16"] > 0.5
    got = aoti.BACKEND.load(tmp_path / plan.file, plan.options).run(feeds())["y"]
    assert 1e-6 < np.abs(got - reference(feeds())).max() < 0.05
    assert Format.FP16 in aoti.CPU.LOWERED
