"""Builders for devices beside the processor, as far as that can be held without one; and settings that are refused."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lehr import cli
from lehr.engines import onnxruntime_cuda
from lehr.engines.builders import buildable, builder, candidates
from lehr.engines.job import Job
from lehr.engines.onnxruntime_cpu import optimise
from lehr.engines.onnxruntime_cuda import check_placement
from lehr.engines.ranges import input_ranges, narrow_ranges, narrow_sizes
from lehr.engines.settings import Compatible, Mode, Settings
from lehr.engines.target import target
from lehr.runtime.backends import backend
from lehr.runtime.backends import onnxruntime as backend_module
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.parity import relative_error
from lehr.runtime.recipe import recipe

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def lehr(*arguments: object) -> int:
    """Run the command line; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """x (batch, 8, 16) -> y: a group norm and a product."""
    rng = np.random.default_rng(0)
    weights = {"scale": rng.standard_normal(8), "bias": rng.standard_normal(8), "w": rng.standard_normal((16, 16))}
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["n"], num_groups=2, name="norm"),
        helper.make_node("MatMul", ["n", "w"], ["y"], name="product"),
    ]
    shape = ["batch", 8, 16]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    path = tmp_path_factory.mktemp("portable") / "step.onnx"
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=True, location="w.bin", size_threshold=100)
    return path


FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 8, 16)).astype(np.float32)}


def job(graph: Path, **given) -> Job:
    known = {"recipe": recipe("fp32"), "target": target("cpu"), "library": "onnxruntime", "threads": 1}
    return Job(name="step", graph=graph, feeds=FEEDS, **{**known, **given})


# ---------------------------------------------------------------------------------------------------- ONNX Runtime


def test_group_norms_are_taken_apart_for_the_processor_and_the_engine_computes_the_same(graph, tmp_path):
    plan = builder("onnxruntime").build(job(graph), tmp_path)
    assert plan.options["in_pieces"] == ["GroupNormalization"]
    assert "InstanceNormalization" in plan.operators
    (expected,) = ort.InferenceSession(graph, providers=[CPU]).run(None, FEEDS)
    got = backend("onnxruntime").load(tmp_path / plan.file, plan.options).run(FEEDS)["y"]
    assert relative_error(expected[None], got[None]) < 1e-6


def test_without_onnxs_own_tools_the_graph_stays_whole(graph, tmp_path, monkeypatch):
    from lehr.engines import onnxruntime_cpu

    monkeypatch.setattr(onnxruntime_cpu.importlib.util, "find_spec", lambda name: None)
    plan = builder("onnxruntime").build(job(graph), tmp_path)
    assert plan.options["in_pieces"] == []


cpu_only = pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")


@cpu_only
def test_without_its_cuda_provider_onnxruntime_is_named_with_the_way_to_get_it(dit_bundle, tmp_path, capsys):
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    assert lehr("build", bundle, "--target", "cuda") == 6
    assert "pip install 'lehr[ort-cuda]'" in capsys.readouterr().err
    assert buildable(target("cuda"), "linux", "x86_64") == ()
    with pytest.raises(MissingExtra):
        backend_module.open_session(b"", ort.SessionOptions(), {"provider": CUDA})


def test_a_machine_without_a_gpu_builds_nothing_for_cuda(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda.host, "gpu_compute_capability", lambda: None)
    with pytest.raises(IncompatibleEngine, match="there is no NVIDIA GPU"):
        onnxruntime_cuda.build(job(graph, recipe=recipe("fp32")), tmp_path)
    with pytest.raises(BuildFailed, match="no bf16 kernels"):
        onnxruntime_cuda.build(job(graph, recipe=recipe("bf16")), tmp_path)


def test_a_provider_that_does_not_load_is_an_error_and_no_fall_back(graph, monkeypatch):
    """ONNX Runtime is asked for a provider that it lists and cannot load: it opens a session on the processor."""
    monkeypatch.setattr(backend_module.ort, "get_available_providers", lambda: [CUDA, CPU])
    asked = []

    def session(given, made, *, providers, **_):
        asked.append(providers)
        return ort.capi.onnxruntime_inference_collection.InferenceSession(given, made, providers=[CPU])

    monkeypatch.setattr(backend_module.ort, "InferenceSession", session)
    with pytest.raises(IncompatibleEngine, match="does not load here, and it would compute on the processor"):
        backend_module.open_session(graph, ort.SessionOptions(), {"provider": CUDA, "provider_options": {"a": "1"}})
    assert asked == [[(CUDA, {"a": "1"}), CPU]]


def test_operators_that_would_run_on_the_processor_are_refused_by_name(graph, tmp_path):
    plan, placement = optimise(job(graph), tmp_path, {"intra_op_threads": 1, "spinning": False})
    assert set(placement) == {CPU}
    check_placement(placement, CPU, "step.onnx")
    with pytest.raises(BuildFailed, match=r"would compute .*1 InstanceNormalization, 1 MatMul.* of step\.onnx on the"):
        check_placement(placement, CUDA, "step.onnx")
    check_placement({CUDA: {"MatMul": 2}, CPU: {"Shape": 1}}, CUDA, "step.onnx")
    assert isinstance(plan, Plan)


def test_a_session_that_may_not_fall_back_does_not_open_on_another_provider(graph):
    options = {"intra_op_threads": 1, "spinning": False, "cpu_fallback": False}
    made = backend_module.session_options(options)
    assert made.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


# -------------------------------------------------------------------------------------------------------- OpenVINO


@pytest.mark.parametrize("name", ["openvino-gpu", "openvino-npu"])
def test_a_device_that_openvino_does_not_find_is_refused_with_those_it_does(dit_bundle, tmp_path, capsys, name):
    ov = pytest.importorskip("openvino")
    if any(device.startswith(name[-3:].upper()) for device in ov.Core().available_devices):
        pytest.skip("the device is here")
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    given = ("--recipe", "fp32") if name == "openvino-gpu" else ("--recipe", "fp16")
    if name == "openvino-npu":  # hoisted graphs come first and are for the processor, so the device is asked for first
        assert frozenset({recipe("fp16").arithmetic}) == builder("openvino", "NPU").FORMATS
    assert lehr("build", bundle, "--target", name, *given) == 5
    assert f"finds no {name[-3:].upper()} on this machine (devices: CPU" in capsys.readouterr().err
    assert Bundle.open(bundle).names("engines/openvino") == []


def test_an_engine_of_a_device_that_is_not_here_is_not_loaded(tmp_path):
    pytest.importorskip("openvino")
    options = {"precision": "f32", "threads": 1, "device": "NPU7"}
    with pytest.raises(IncompatibleEngine, match="OpenVINO finds no NPU7"):
        backend("openvino").load(tmp_path / "step.blob", options)


def test_an_engine_made_for_throughput_answers_several_calls_at_the_same_time(graph, tmp_path):
    pytest.importorskip("openvino")
    asked = job(graph, library="openvino", threads=2, settings=Settings(mode=Mode.THROUGHPUT))
    plan = builder("openvino").build(asked, tmp_path)
    assert plan.options["mode"] == "throughput"
    session = backend("openvino").load(tmp_path / plan.file, plan.options)
    inputs = [{"x": np.random.default_rng(k).standard_normal((2, 8, 16)).astype(np.float32)} for k in range(8)]
    alone = [session.run(given)["y"] for given in inputs]
    together: dict[int, np.ndarray] = {}

    def call(k: int) -> None:
        together[k] = session.run(inputs[k])["y"]

    threads = [threading.Thread(target=call, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, expected in enumerate(alone):
        np.testing.assert_allclose(together[k], expected, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- settings


def test_auto_keeps_to_libraries_that_heed_every_setting():
    throughput = Settings(mode=Mode.THROUGHPUT)
    assert candidates(target("cpu"), recipe("fp32"), settings=throughput) == ("openvino",)
    with pytest.raises(InvalidInput, match="onnxruntime has no use for --mode"):
        candidates(target("cpu"), recipe("fp32"), "onnxruntime", throughput)
    with pytest.raises(InvalidInput, match=r"tensorrt_rtx has no use for --compatible"):
        candidates(target("rtx-40"), recipe("fp16"), settings=Settings(compatible=Compatible.VERSION))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--batch", "1,x"), "--batch '1,x' cannot be read at 'x'"),
        (("--sizes", "28"), "--sizes 28 does not fit this model, expected heightxwidth"),
        (("--sizes", "28x30"), "width is 30, expected between"),
        (("--batch", "100000"), "batch is 100000, expected"),
        (("--target", "cpu", "--batch", "2"), "no use for --batch"),
    ],
)
def test_options_that_cannot_be_read_or_do_not_fit_end_with_code_2(dit_bundle, tmp_path, capsys, options, says):
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    assert lehr("build", bundle, "--target", "rtx-40", *options) == 2
    assert says in capsys.readouterr().err


def test_narrow_profiles_are_every_batch_with_every_size_and_the_wide_one_takes_them_in(dit_bundle):
    manifest = Bundle.open(dit_bundle).manifest
    spec, signature = manifest.model, manifest.graphs["step"].signature
    narrow = narrow_sizes(spec, Settings(batches=(1, 32), sizes=((28, 28), (64, 32))))
    assert [(n["batch"], n["height"], n["width"]) for n in narrow] == [
        (1, 28, 28),
        (1, 64, 32),
        (32, 28, 28),
        (32, 64, 32),
    ]
    wide = input_ranges(signature, spec, narrow)["sample"]
    assert (wide.min, wide.opt, wide.max) == ((1, 1, 4, 4), (2, 1, 28, 28), (32, 1, 64, 56))
    each = [given["sample"] for given in narrow_ranges(signature, spec, narrow)]
    assert all(given.min == given.opt == given.max for given in each)
    assert [given.opt for given in each] == [(1, 1, 28, 28), (1, 1, 64, 32), (32, 1, 28, 28), (32, 1, 64, 32)]
    assert narrow_sizes(spec, Settings()) == ()
    assert narrow_sizes(spec, Settings(batches=(4,)))[0]["height"] == 28
