"""TensorRT engines are loaded, fed and refused by the rules, with every release's own names."""

from __future__ import annotations

import gc
import importlib
import json
import struct
import sys

import numpy as np
import pytest
from device_toy import SPLIT, WHOLE, Machine, engine, prompt, step, whole
from fake_device import Misuse, collecting
from fake_tensorrt_runtime import RELEASES, NumpyEngine
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime import cuda
from lehr.runtime.backends import backend, backends
from lehr.runtime.backends import tensorrt as tensorrt_backend
from lehr.runtime.backends.base import DeviceSession
from lehr.runtime.device import DeviceArray
from lehr.runtime.errors import BundleError, IncompatibleEngine, MissingExtra, RunFailed
from lehr.runtime.gpu_engine import gpu_difference, version_difference
from lehr.runtime.refit import TensorFile, rounded
from lehr.runtime.spec import DType, GraphSpec, TensorSpec, Varies
from lehr.runtime.tensorrt_context import Log, TensorRtBindings

FEEDS = {
    "sample": np.random.default_rng(0).standard_normal((2, 2, 4, 3)).astype(np.float32),
    "timestep": np.array([3.0, 700.0], np.float32),
    "class_labels": np.array([1, 4]),
}
BOUNDS = {"timestep": ((1,), (2,), (8,)), "class_labels": ((1,), (2,), (8,))}


def profile(low: int, usual: int, high: int) -> dict:
    rows = dict.fromkeys(BOUNDS, ((low,), (usual,), (high,)))
    return {"sample": tuple((k, 2, height, 3) for k, height in ((low, 2), (usual, 4), (high, 8))), **rows}


@pytest.fixture
def on(monkeypatch, request):
    made = []

    def build(release: str = "tensorrt 10.3.0", **engines: NumpyEngine) -> Machine:
        machine = Machine(release, **engines)
        monkeypatch.setitem(sys.modules, release.split(maxsplit=1)[0], machine.library)
        monkeypatch.setattr(cuda, "stream", lambda: machine.stream)
        monkeypatch.setattr(tensorrt_backend, "_log", Log)
        made.append(machine)
        return machine

    with collecting():
        yield build
    for machine in made:
        machine.close()


def plan(tmp_path, text: str):
    path = tmp_path / "step.engine"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------------ running


@pytest.mark.parametrize("release", RELEASES)
def test_an_engine_of_every_release_computes_with_that_releases_names(on, tmp_path, release):
    library = release.split()[0]
    on(release, e=engine(WHOLE["step"], whole))
    session = backend(library).load(plan(tmp_path, "plan e"), {})
    assert isinstance(session, DeviceSession)
    session.check_signature(WHOLE["step"])
    for _ in range(2):
        np.testing.assert_array_equal(session.run(FEEDS)["output"], whole(FEEDS)["output"])


def test_both_libraries_of_the_family_are_backends():
    assert {"tensorrt", "tensorrt_rtx"} <= set(backends())
    assert backend("tensorrt").name == "tensorrt"
    assert backend("tensorrt_rtx").name == "tensorrt_rtx"


def test_feeds_may_stand_on_the_device_and_results_may_stay_there(on):
    machine = on(e=engine(WHOLE["step"], whole))
    session = machine.session("e")
    feeds = {**FEEDS, "sample": machine.stream.put(FEEDS["sample"])}
    machine.device.log.clear()
    first = session.run_resident(feeds)["output"]
    second = session.run_resident({**feeds, "timestep": FEEDS["timestep"] + 50})["output"]
    assert "synchronize" not in machine.device.log
    assert isinstance(first, DeviceArray)
    np.testing.assert_array_equal(session.run(FEEDS)["output"], whole(FEEDS)["output"])
    np.testing.assert_array_equal(machine.stream.download(first), whole(FEEDS)["output"])
    later = {**FEEDS, "timestep": FEEDS["timestep"] + 50}
    np.testing.assert_array_equal(machine.stream.download(second), whole(later)["output"])


def test_an_input_that_decides_shapes_is_handed_over_in_host_memory(on):
    machine = on(e=engine(SPLIT["prompt"], prompt))
    session = machine.session("e")
    for height in (3, 5, 3):
        feeds = {"class_labels": FEEDS["class_labels"], "sample.shape": np.array([2, 2, height, 3])}
        made = session.run(feeds)
        assert made["positions"].shape == (height,)
        np.testing.assert_array_equal(made["k"], prompt(feeds)["k"])


def test_an_output_whose_shape_follows_from_values_is_allocated_by_the_engine_itself(on):
    def positive(feeds):
        return {"y": feeds["x"][feeds["x"] > 0]}

    machine = on(
        e=NumpyEngine(
            inputs={"x": ("float32", (-1,))},
            outputs={"y": ("float32", (-1,))},
            function=positive,
            unknown_shapes=frozenset({"y"}),
        )
    )
    session = machine.session("e")
    x = np.array([1, -2, 3, 4, -5], np.float32)
    for values in (x, -x, x):
        np.testing.assert_array_equal(session.run({"x": values})["y"], values[values > 0])
    kept = session.run_resident({"x": x})["y"]
    session.run({"x": -x})
    np.testing.assert_array_equal(machine.stream.download(kept), [1, 3, 4])
    with pytest.raises(RunFailed, match="no shape before"):
        session.bind({"x": (5,)}, {})


def test_the_narrowest_profile_that_holds_the_shapes_is_chosen(on, monkeypatch):
    chosen = []
    original = TensorRtBindings._profile

    def spy(bindings):
        chosen.append(original(bindings))
        return chosen[-1]

    monkeypatch.setattr(TensorRtBindings, "_profile", spy)
    narrow = tuple({**row, "sample": ((k, 2, 4, 3),) * 3} for k, row in ((2, profile(2, 2, 2)), (1, profile(1, 1, 1))))
    machine = on(e=engine(WHOLE["step"], whole, profiles=(profile(1, 4, 8), *narrow)))
    session = machine.session("e")
    session.run(FEEDS)
    session.run({name: value[:1] for name, value in FEEDS.items()})
    session.run({**FEEDS, "sample": FEEDS["sample"][:, :, :2]})
    assert chosen == [1, 2, 0]


def test_contexts_share_scratch_memory_and_old_shapes_are_forgotten(on):
    machine = on(e=engine(WHOLE["step"], whole, scratch=1 << 16))
    session = machine.session("e")
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 1, 2):
        feeds = {name: np.resize(value, (batch, *value.shape[1:])) for name, value in FEEDS.items()}
        np.testing.assert_array_equal(session.run(feeds)["output"], whole(feeds)["output"])
    assert machine.stream.workspace(1).size == 8 << 16
    gc.collect(1)
    # The last two contexts share the largest one; with a place each the sum would be 8 + … > 30 units.
    assert machine.device.in_use < (8 + 7 + 8 + 2) << 16


def test_an_engine_is_not_let_go_while_its_work_is_queued(on):
    machine = on(e=engine(WHOLE["step"], whole))
    session = machine.session("e")
    feeds = {name: machine.stream.put(value) for name, value in FEEDS.items()}  # freeing its own would wait, too
    result = session.run_resident(feeds)["output"]
    del session
    np.testing.assert_array_equal(machine.stream.download(result), whole(FEEDS)["output"])


# ---------------------------------------------------------------------------------------------------- wrong input


def test_shapes_that_no_profile_holds_are_refused_with_the_ranges(on):
    machine = on(e=engine(WHOLE["step"], whole, profiles=(profile(1, 2, 4), profile(8, 8, 8))))
    session = machine.session("e")
    feeds = {name: np.resize(value, (6, *value.shape[1:])) for name, value in FEEDS.items()}
    with pytest.raises(RunFailed) as caught:
        session.run(feeds)
    for words in ("'sample' has shape (6, 2, 4, 3)", "(1, 2, 2, 3) to (4, 2, 8, 3)", "--batch"):
        assert words in str(caught.value)


def test_shapes_that_fit_one_by_one_but_not_together_are_refused(on):
    profiles = (profile(1, 1, 1), {**profile(2, 2, 2), "sample": ((1, 2, 4, 3),) * 3})
    session = on(e=engine(WHOLE["step"], whole, profiles=profiles)).session("e")
    feeds = {**FEEDS, "sample": FEEDS["sample"][:1], "timestep": FEEDS["timestep"][:1]}
    with pytest.raises(RunFailed, match="together"):
        session.run(feeds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep": FEEDS["timestep"].astype(np.float64)}, "'timestep' is float64, expected float32"),
        ({"class_labels": None}, r"inputs \['class_labels'\] are not fed"),
    ],
)
def test_feeds_of_another_type_or_none_are_refused(on, change, words):
    session = on(e=engine(WHOLE["step"], whole)).session("e")
    feeds = {name: value for name, value in {**FEEDS, **change}.items() if value is not None}
    with pytest.raises(RunFailed, match=words):
        session.run(feeds)


def test_a_failure_of_the_engine_says_what_its_log_says(on):
    machine = on(e=engine(WHOLE["step"], whole, fails="myelin went wrong\nbadly"))
    with pytest.raises(RunFailed, match="TensorRT failed: myelin went wrong badly"):
        machine.session("e").run(FEEDS)


def test_an_engine_of_another_graph_is_refused_with_each_difference(on):
    session = on(e=engine(WHOLE["step"], whole)).session("e")
    session.check_signature(WHOLE["step"])
    unread = TensorSpec(name="nobody reads this", shape=("batch",), varies=Varies.PROMPT)
    session.check_signature(GraphSpec(inputs=(*WHOLE["step"].inputs, unread), outputs=WHOLE["step"].outputs))
    half = TensorSpec(name="timestep", dtype=DType.FLOAT16, shape=("batch",), varies=Varies.TIMESTEP)
    other = GraphSpec(
        inputs=(TensorSpec(name="sample", shape=("batch", 9, "height", 3), varies=Varies.SAMPLE), half),
        outputs=(TensorSpec(name="samples", shape=("batch",), varies=Varies.SAMPLE),),
    )
    with pytest.raises(BundleError) as caught:
        session.check_signature(other)
    for words in ("['class_labels', 'output']", "lacks ['samples']", "'sample' is float32 (-1, 2, -1, 3)", "float16"):
        assert words in str(caught.value)


# What TensorRT-RTX 1.7 and TensorRT 10 write into their log where a plan does not load.
DAMAGED = (
    "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion header.magicTag == "
    "kEXPECTED_MAGIC_TAG failed.Trying to load an engine created with incompatible serialization version)"
)
NO_DRIVER = "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)"
OTHER = "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match."


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (DAMAGED, BundleError, "damaged"),
        ("", BundleError, "damaged"),
        (NO_DRIVER, IncompatibleEngine, "Update the driver"),
        (OTHER, IncompatibleEngine, "another GPU or release"),
        (
            "The engine plan file is generated on an incompatible device, expecting compute 8.7",
            IncompatibleEngine,
            "GPU",
        ),
        ("Requested amount of GPU memory (9 bytes) could not be allocated", RunFailed, "too little memory"),
        ("something else", BundleError, "Build it again"),
    ],
)
def test_a_plan_that_does_not_load_is_refused_with_the_reason_and_what_to_do(on, tmp_path, said, error, words):
    on(e=engine(WHOLE["step"], whole))
    with pytest.raises(error, match=words) as caught:
        backend("tensorrt").load(plan(tmp_path, said), {})
    assert type(caught.value) is error
    assert "step.engine" in str(caught.value)


def test_a_library_that_is_missing_says_where_it_comes_from(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="JetPack"):
        backend("tensorrt").version()
    with pytest.raises(MissingExtra, match=r"lehr\[trt-rtx\]"):
        backend("tensorrt_rtx").version()


# ----------------------------------------------------------------------------------------------- other options


@pytest.mark.parametrize("release", RELEASES)
def test_a_streamed_engine_gets_its_budget_and_a_version_compatible_one_may_run_its_own_code(on, tmp_path, release):
    machine = on(release, e=engine(WHOLE["step"], whole))
    made = []
    original = machine.library.Runtime

    class Runtime(original):
        def __init__(self, logger):
            made.append(self)
            super().__init__(logger)

    Runtime.__name__ = "Runtime"
    machine.library.Runtime = Runtime
    load = backend(release.split()[0]).load
    session = load(plan(tmp_path, "plan e"), {"weights": "streamed", "compatible": "version"})
    assert session._engine.engine.weight_streaming_budget_v2 == 12345
    assert made[0].engine_host_code_allowed
    load(plan(tmp_path, "plan e"), {})
    assert not made[1].engine_host_code_allowed


def safetensors(path, tensors: dict[str, tuple[str, bytes]]):
    header, data = {}, b""
    for name, (kind, content) in tensors.items():
        header[name] = {"dtype": kind, "shape": [1], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refit_options(tmp_path, **tensors) -> dict:
    wide = np.arange(4, dtype=np.float32) / 3
    stored = safetensors(tmp_path / "weights.safetensors", {"w": ("F32", wide.tobytes())})
    beside = safetensors(tmp_path / "step.refit", {"c": ("F16", np.ones(2, np.float16).tobytes())})
    rows = {
        "w": {"in": "stored", "key": "w", "dtype": "float16"},
        "c": {"in": "beside", "key": "c", "dtype": "float16"},
        **tensors,
    }
    return {"refit": {"tensors": rows, "files": {"stored": stored, "beside": beside}}, "weights": "stripped"}


@pytest.mark.parametrize("release", RELEASES)
def test_a_stripped_engine_is_given_the_stored_weights_rounded_as_it_wants_them(on, tmp_path, release):
    made = engine(WHOLE["step"], whole, weights={"w": 4, "c": 2})
    on(release, e=made)
    backend(release.split()[0]).load(plan(tmp_path, "plan e"), refit_options(tmp_path))
    expected = (np.arange(4, dtype=np.float32) / 3).astype(np.float16)
    np.testing.assert_array_equal(made.taken["w"].view(np.float16), expected)
    np.testing.assert_array_equal(made.taken["c"].view(np.float16), 1)


@pytest.mark.parametrize(
    ("weights", "tensors", "words"),
    [
        ({"w": 4, "other": 1}, {}, "'other', which its record does not have"),
        ({"w": 5}, {}, "count mismatch"),
        ({"w": 4}, {"w": {"in": "stored", "key": "gone", "dtype": "float16"}}, "no readable tensor 'gone'"),
        ({"w": 4}, {"w": {"in": "nowhere", "key": "w", "dtype": "float16"}}, "no source for its weights"),
    ],
)
def test_weights_that_do_not_fit_a_stripped_engine_are_refused(on, tmp_path, weights, tensors, words):
    on(e=engine(WHOLE["step"], whole, weights=weights))
    with pytest.raises(BundleError, match=words):
        backend("tensorrt").load(plan(tmp_path, "plan e"), refit_options(tmp_path, **tensors))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"no{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}'.ljust(60),
    ],
)
def test_a_damaged_weights_file_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="no weights that can be read"):
        TensorFile(path).read("w", "float32")


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bfloat16_is_rounded_to_nearest_and_ties_to_even(values):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    wide = np.array(values, np.float32)
    expected = wide.astype(ml_dtypes.bfloat16)
    bits = rounded(wide, "float32", "bfloat16")
    nan = np.isnan(wide)
    np.testing.assert_array_equal(bits[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(bits.view(ml_dtypes.bfloat16)[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(
        rounded(expected.view(np.uint16), "bfloat16", "float32")[~nan], expected.astype(np.float32)[~nan]
    )


# ------------------------------------------------------------------------------------------------- which machine


@pytest.mark.parametrize(
    ("here", "options", "words"),
    [
        ("8.7", {"sm": ["8.7"]}, None),
        ("8.9", {"sm": ["8.6", "8.9"]}, None),
        ("8.6", {"sm": ["8.9"]}, "the GPU here has SM 8.6, and the engine is for SM 8.9"),
        (None, {"sm": ["8.9"]}, "no NVIDIA GPU with a driver"),
        ("9.0", {"sm": ["8.0"], "compatible": "hardware"}, None),
        ("7.5", {"sm": ["8.0"], "compatible": "hardware"}, "SM 7.5"),
        ("8.7", {"sm": ["8.0"], "compatible": "hardware"}, "SM 8.7"),
        ("9.0", {}, "SM 9.0"),
    ],
)
def test_an_engine_is_for_the_gpus_that_it_was_built_for(monkeypatch, here, options, words):
    monkeypatch.setattr("lehr.runtime.gpu_engine.gpu_compute_capability", lambda: here)
    found = gpu_difference("tensorrt", options)
    assert found is None if words is None else words in str(found)
    assert gpu_difference("onnxruntime", options) is None


@pytest.mark.parametrize(
    ("built", "here", "compatible", "loads"),
    [
        ("10.3.0", "10.3.0", None, True),
        ("10.3.0", "10.7.0", None, False),
        ("10.3.0", "10.7.0", "version", True),
        ("10.7.0", "10.3.0", "version", False),
        ("10.3.0", "11.4.0", "version", False),
    ],
)
def test_an_engine_loads_with_its_own_release_or_later_ones_if_it_was_built_so(built, here, compatible, loads):
    options = {} if compatible is None else {"compatible": compatible}
    assert (version_difference("tensorrt", built, here, options) is None) == loads


def test_another_library_needs_the_very_version(monkeypatch):
    assert "2 here and 1" in str(version_difference("onnxruntime", "1", "2", {"compatible": "version"}))


# -------------------------------------------------------------------------------------------- against the libraries


@pytest.mark.parametrize("release", RELEASES)
def test_every_name_that_is_used_exists_in_the_release(release):
    classes, enums = RELEASES[release]["classes"], RELEASES[release]["enums"]
    needed = {
        "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed"},
        "ICudaEngine": {
            "create_execution_context",
            "get_tensor_dtype",
            "get_tensor_location",
            "get_tensor_mode",
            "get_tensor_name",
            "get_tensor_profile_shape",
            "get_tensor_shape",
            "get_weight_streaming_automatic_budget",
            "num_io_tensors",
            "num_optimization_profiles",
            "weight_streaming_budget_v2",
        },
        "IExecutionContext": {
            "execute_async_v3",
            "get_tensor_shape",
            "infer_shapes",
            "set_device_memory",
            "set_input_shape",
            "set_optimization_profile_async",
            "set_output_allocator",
            "set_tensor_address",
            "update_device_memory_size_for_shapes",
        },
        "Refitter": {"get_all_weights", "get_missing_weights", "refit_cuda_engine", "set_named_weights"},
    }
    for name, members in needed.items():
        assert members <= set(classes[name]), name
    assert "USER_MANAGED" in enums["ExecutionContextAllocationStrategy"]
    assert {"FLOAT", "HALF", "INT64", "INT32", "BOOL"} <= set(enums["DataType"])
    if release.startswith("tensorrt_rtx"):
        assert "EAGER" in enums["DynamicShapesKernelSpecializationStrategy"]
        assert "dynamic_shapes_kernel_specialization_strategy" in classes["IRuntimeConfig"]


def test_the_recorded_names_are_those_of_the_installed_library():
    library = pytest.importorskip("tensorrt_rtx")
    recorded = RELEASES["tensorrt_rtx 1.7.1"]
    for kind in ("classes", "enums"):
        for name, members in recorded[kind].items():
            assert [member for member in members if not hasattr(getattr(library, name), member)] == []


def test_without_a_driver_the_real_library_says_so(run_python):
    pytest.importorskip("tensorrt_rtx")
    from lehr.runtime.host import gpu_compute_capability

    if gpu_compute_capability() is not None:
        pytest.skip("there is a GPU here")
    code = """
import pathlib, tempfile
from lehr.runtime import cuda
from lehr.runtime.backends import backend
from lehr.runtime.errors import BundleError
cuda.stream = lambda: None
with tempfile.TemporaryDirectory() as folder:
    plan = pathlib.Path(folder) / "step.engine"
    for content in (b"x" * 4096, b""):
        plan.write_bytes(content)
        try:
            backend("tensorrt_rtx").load(plan, {})
        except BundleError as e:
            print(type(e).__name__, "damaged" in str(e))
"""
    assert run_python(code).split() == ["BundleError", "True"] * 2


def test_the_backend_is_imported_without_its_library(run_python):
    code = """
import sys
sys.modules["tensorrt"] = sys.modules["cuda"] = None
from lehr.runtime.backends import backend
print(backend("tensorrt").name)
"""
    assert run_python(code).split() == ["tensorrt"]


def test_the_fake_library_has_no_names_that_the_release_has_not():
    machine = Machine("tensorrt 10.3.0", e=engine(SPLIT["step"], step))
    loaded = machine.library.Runtime(machine.log.logger).deserialize_cuda_engine(b"plan e")
    with pytest.raises(AttributeError):
        loaded.create_runtime_config()
    context = loaded.create_execution_context(machine.library.ExecutionContextAllocationStrategy.USER_MANAGED)
    with pytest.raises(Misuse, match="scratch"):
        context.execute_async_v3(machine.stream.handle)
    assert importlib.import_module("lehr.runtime.backends.tensorrt_rtx").BACKEND.title == "TensorRT-RTX"
    machine.close()
