"""ONNX Runtime's TensorRT provider, by a stand-in: what it is asked for, and everything that must not pass in silence.

The stand-in is an ONNX Runtime that lists the provider. Asked to leave a plan behind, it writes the graph that it was
given; its sessions compute on the processor, and their profiles say that TensorRT did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lehr.engines import onnxruntime_tensorrt
from lehr.engines.builders import TargetBuilder, buildable, builder, candidates
from lehr.engines.job import Job
from lehr.engines.ranges import InputRange
from lehr.engines.settings import Compatible, Settings, StoredWeights
from lehr.engines.target import target
from lehr.runtime.backends import backend, backends, drives
from lehr.runtime.backends import onnxruntime as runtime
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.gpu_engine import gpu_difference
from lehr.runtime.parity import relative_error
from lehr.runtime.recipe import recipe

NAME = "onnxruntime-tensorrt"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
RANGES = {
    "x": InputRange(min=(1, 4, 8, 16), opt=(2, 4, 8, 16), max=(16, 4, 8, 16)),
    "x.shape": InputRange(min=(1, 4, 8, 16), opt=(2, 4, 8, 16), max=(16, 4, 8, 16), values=True),
}
Real = ort.capi.onnxruntime_inference_collection.InferenceSession


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x (batch, 4, 8, 16) and its shape -> y: attention of x with itself and a product, in the given shape."""
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Attention", ["x", "x", "x"], ["a"], name="attention"),
        helper.make_node("MatMul", ["a", "w"], ["p"], name="product"),
        helper.make_node("Reshape", ["p", "x.shape"], ["y"], name="shaped"),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 16]),
            helper.make_tensor_value_info("x.shape", TensorProto.INT64, [4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8, 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path_factory.mktemp("portable") / "step.onnx"
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save_model(onnx.shape_inference.infer_shapes(model), path)
    return path


class StandIn:
    """Sessions with TensorRT; ``faults`` says what goes wrong, ``asked`` what was asked for."""

    def __init__(self) -> None:
        self.faults: set[str] = set()
        self.asked: list[tuple[str, dict[str, str], list[str], ort.SessionOptions]] = []

    def __call__(
        self, given: Path, made: ort.SessionOptions, *, providers: list[Any], enable_fallback: int, **_: Any
    ) -> Session:
        assert enable_fallback == 0
        name, options = providers[0]
        self.asked.append((name, dict(options), providers[1:], made))
        if "fails" in self.faults:
            raise runtime.FAILURES[0]("TensorRT EP failed to create engine from network.")
        if options.get("trt_dump_ep_context_model") == "1" and "partial" not in self.faults:
            onnx.save_model(onnx.load(given), options["trt_ep_context_file_path"])
        return Session(given, made, self.faults)


class Session:
    def __init__(self, given: Path, made: ort.SessionOptions, faults: set[str]) -> None:
        plain = ort.SessionOptions()
        plain.enable_profiling, plain.profile_file_prefix = made.enable_profiling, made.profile_file_prefix
        self.inner, self.faults = Real(given, plain, providers=[CPU]), faults

    def get_providers(self) -> list[str]:
        return [CPU] if "no driver" in self.faults else [TENSORRT, CPU]

    def get_inputs(self) -> Any:
        return self.inner.get_inputs()

    def get_outputs(self) -> Any:
        return self.inner.get_outputs()

    def run(self, *given: Any) -> Any:
        return self.inner.run(*given)

    def end_profiling(self) -> str:
        file = Path(self.inner.end_profiling())
        events = json.loads(file.read_text())
        for event in events:
            arguments = event.get("args", {})
            stays = "falls back" in self.faults and arguments.get("op_name") == "MatMul"
            if arguments.get("provider") == CPU and not stays:
                arguments["provider"] = TENSORRT
        file.write_text(json.dumps(events))
        return str(file)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(runtime.ort, "InferenceSession", made)
    monkeypatch.setattr(onnxruntime_tensorrt.host, "gpu_compute_capability", lambda: "9.0")
    return made


def build(graph: Path, folder: Path, name: str = "fp32", **more: Any) -> Plan:
    made = builder(NAME)
    assert isinstance(made, TargetBuilder)
    given: dict[str, Any] = {"target": target("h100"), "ranges": RANGES, "threads": 1, **more}
    job = Job(name="step", graph=graph, recipe=recipe(name), library=NAME, **given)
    return made.build_for(job, folder, lambda _: None)


def test_the_plan_is_asked_for_with_its_sizes_and_loads_without_them(
    graph: Path, tmp_path: Path, fake: StandIn
) -> None:
    plan = build(graph, tmp_path)
    name, made, others, options = fake.asked[0]
    assert (name, others) == (TENSORRT, [])  # nothing to fall back to
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert made["trt_profile_min_shapes"] == "x:1x4x8x16,x.shape:1x4x8x16"
    assert made["trt_profile_max_shapes"] == "x:16x4x8x16,x.shape:16x4x8x16"
    assert (made["trt_fp16_enable"], made["trt_int8_enable"]) == ("0", "0")
    assert (made["trt_dump_ep_context_model"], made["trt_ep_context_embed_mode"]) == ("1", "1")
    assert made["trt_ep_context_file_path"] == str(tmp_path / plan.file)
    assert plan.options["sm"] == ["9.0"]
    assert plan.options["files"] == ["step.onnx"]
    assert not plan.achieved_precision  # unknown, and nothing is claimed
    assert not any(key.startswith(("trt_dump", "trt_ep", "trt_profile")) for key in plan.options["provider_options"])
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 4, 8, 16)).astype(np.float32)}
    feeds["x.shape"] = np.array(feeds["x"].shape)
    got = backend(NAME).load(tmp_path / plan.file, plan.options).run(feeds)["y"]
    (expected,) = Real(graph, providers=[CPU]).run(None, feeds)
    assert relative_error(expected[None], got[None]) < 1e-6
    assert fake.asked[-1][:3] == (TENSORRT, plan.options["provider_options"], [])


def test_the_graph_is_one_that_the_providers_tensorrt_reads(graph: Path, tmp_path: Path, fake: StandIn) -> None:
    build(graph, tmp_path)
    read = onnx.load(tmp_path / "step.onnx")
    assert {entry.domain: entry.version for entry in read.opset_import}[""] == 20
    assert "Attention" not in {node.op_type for node in read.graph.node}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(workspace_mb=64), {"trt_max_workspace_size": str(64 << 20)}),
        (Settings(effort=4), {"trt_builder_optimization_level": "4"}),
        (Settings(compatible=Compatible.HARDWARE), {"trt_engine_hw_compatible": "1"}),
    ],
)
def test_settings_reach_the_provider_at_the_build_and_at_the_load(
    graph: Path, tmp_path: Path, fake: StandIn, settings: Settings, expected: Mapping[str, str]
) -> None:
    plan = build(graph, tmp_path, settings=settings)
    for options in (fake.asked[0][1], plan.options["provider_options"]):
        assert expected.items() <= options.items()


def test_half_precision_and_integers_are_allowed_where_the_recipe_has_them(
    graph: Path, tmp_path: Path, fake: StandIn
) -> None:
    build(graph, tmp_path, "fp16")
    assert fake.asked[0][1]["trt_fp16_enable"] == fake.asked[0][1]["trt_layer_norm_fp32_fallback"] == "1"
    build(graph, tmp_path, "int8")
    assert fake.asked[-2][1]["trt_int8_enable"] == "1"
    for name, words in (("bf16", "does not say so"), ("fp8", "no such arithmetic")):
        with pytest.raises(BuildFailed, match=words):
            build(graph, tmp_path, name)


def test_a_large_engine_stands_beside_its_plan(graph: Path, tmp_path: Path, fake: StandIn) -> None:
    build(graph, tmp_path, stored=StoredWeights(name="w", path=graph, bytes=1 << 31))
    assert fake.asked[0][1]["trt_ep_context_embed_mode"] == "0"


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("fails", BuildFailed, "failed to create engine"),
        ("partial", BuildFailed, "left no plan"),
        ("falls back", BuildFailed, "2 MatMul of step.onnx on the processor|MatMul of step.onnx on the processor"),
        ("no driver", IncompatibleEngine, "TensorRT, CUDA and cuDNN"),
    ],
)
def test_what_would_fall_back_in_silence_is_an_error(
    graph: Path, tmp_path: Path, fake: StandIn, fault: str, kind: type[Exception], words: str
) -> None:
    fake.faults.add(fault)
    with pytest.raises(kind, match=words):
        build(graph, tmp_path)


def test_only_the_targets_own_gpu_will_do(
    graph: Path, tmp_path: Path, fake: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IncompatibleEngine, match=r"the GPU here has SM 9\.0"):
        build(graph, tmp_path, target=target("l4"))
    build(graph, tmp_path, target=target("cuda"))  # any will do
    with pytest.raises(InvalidInput, match="--compatible version"):
        build(graph, tmp_path, settings=Settings(compatible=Compatible.VERSION))
    monkeypatch.setattr(onnxruntime_tensorrt.host, "gpu_compute_capability", lambda: None)
    with pytest.raises(IncompatibleEngine, match="there is no NVIDIA GPU"):
        build(graph, tmp_path)


def test_it_is_used_only_where_it_is_named() -> None:
    assert NAME in backends()
    assert drives(NAME)
    for name in ("h100", "a100", "cuda"):
        assert NAME not in target(name).libraries
        assert candidates(target(name), recipe("fp16"), NAME) == (NAME,)
    assert "SM 1.0" in str(gpu_difference(NAME, {"sm": ["1.0"]}))


@pytest.mark.skipif(TENSORRT in ort.get_available_providers(), reason="this ONNX Runtime has TensorRT")
def test_without_the_provider_it_is_named_with_the_way_to_get_it(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match="TensorrtExecutionProvider"):
        build(graph, tmp_path)
    assert NAME not in buildable(target("h100"), "linux", "x86_64")
    assert NAME not in buildable(target("cuda"), "linux", "x86_64")
