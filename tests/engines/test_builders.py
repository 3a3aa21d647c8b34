"""What every builder and its backend promise, held on one small denoiser with a convolution, a product and a table."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lehr.engines import openvino_cpu
from lehr.engines.builders import builder, builder_for, candidates, fitting
from lehr.engines.job import Job
from lehr.engines.target import target, targets
from lehr.runtime import host
from lehr.runtime.backends import backend, backends
from lehr.runtime.errors import BuildFailed, BundleError, InvalidInput, MissingExtra, RunFailed, UnknownName
from lehr.runtime.parity import decibels, relative_error
from lehr.runtime.recipe import RECIPES, Format, Scope, recipe

LIBRARIES = sorted(target("cpu").libraries)  # those that run what they build; test_tensorrt_family has the others
WIDTH, CLASSES = 16, 4


def native(name: str) -> bool:
    try:
        target("cpu").check_machine(recipe(name), host.cpu_features())
    except InvalidInput:
        return False
    return True


PAIRS = [
    pytest.param(
        library,
        name,
        id=f"{library}-{name}",
        marks=pytest.mark.skipif(not native(name), reason=f"this processor would emulate {name}"),
    )
    for library in LIBRARIES
    for name in RECIPES
    # What a builder is given for fp16 is a graph in fp16, and one in both for single products in bf16: the library
    # converts nothing.
    if recipe(name).arithmetic in builder(library).FORMATS - {Format.FP16}
    and not recipe(name).calibrated
    and recipe(name).scope is Scope.GRAPH
]


def small_graph(*, first: str = "Conv", domain: str = "") -> onnx.ModelProto:
    """sample (B, 2, H, W), timestep (B,), class_labels (B,) -> output (B, 2, H, W)."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        fan = max(1, int(np.prod(shape[1:])))
        return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32), name)

    nodes = [
        helper.make_node(first, ["sample", "w_in"], ["h_0"], pads=[1, 1, 1, 1], domain=domain),
        helper.make_node("Unsqueeze", ["timestep", "one"], ["t_0"]),
        helper.make_node("Mul", ["t_0", "freqs"], ["t_1"]),
        helper.make_node("Cos", ["t_1"], ["t_2"]),
        helper.make_node("MatMul", ["t_2", "w_t"], ["t_3"]),
        helper.make_node("Gather", ["table", "class_labels"], ["c_0"]),
        helper.make_node("Add", ["t_3", "c_0"], ["v_0"]),
        helper.make_node("Unsqueeze", ["v_0", "last_two"], ["v_1"]),
        helper.make_node("Add", ["h_0", "v_1"], ["h_1"]),
        helper.make_node("Sigmoid", ["h_1"], ["g"]),
        helper.make_node("Mul", ["h_1", "g"], ["h_2"]),
        helper.make_node("Conv", ["h_2", "w_out"], ["output"], pads=[1, 1, 1, 1]),
    ]
    image = ["batch", 2, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, image),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, image)],
        [
            weight("w_in", WIDTH, 2, 3, 3),
            weight("w_t", WIDTH, WIDTH),
            weight("w_out", 2, WIDTH, 3, 3),
            weight("table", CLASSES, WIDTH),
            numpy_helper.from_array(np.exp(-np.arange(WIDTH, dtype=np.float32) / 4), "freqs"),
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(np.array([2, 3]), "last_two"),
        ],
    )
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds(batch: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, 2, height, width)).astype(np.float32),
        "timestep": rng.uniform(0, 10, batch).astype(np.float32),
        "class_labels": np.arange(batch) % CLASSES,
    }


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "step.onnx"
    onnx.save_model(small_graph(), path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    return path


@pytest.fixture(scope="module")
def reference(graph):
    """The graph as it was written, run by ONNX Runtime without optimisations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(["output"], given)[0]


def built(graph: Path, folder: Path, library: str, recipe_name: str, *, name: str = "step", threads: int = 1):
    job = Job(
        name=name,
        graph=graph,
        recipe=recipe(recipe_name),
        target=target("cpu"),
        library=library,
        feeds=feeds(),
        threads=threads,
    )
    return builder(library).build(job, folder)


@pytest.fixture(scope="module")
def engine(graph, tmp_path_factory):
    """A function that builds and loads an engine, once for each library and recipe."""
    made = {}

    def get(library: str, name: str):
        if (library, name) not in made:
            folder = tmp_path_factory.mktemp(f"{library}-{name}")
            plan = built(graph, folder, library, name)
            made[library, name] = plan, folder, backend(library).load(folder / plan.file, plan.options)
        return made[library, name]

    return get


# ------------------------------------------------------------------------------------------------ what is promised


@pytest.mark.parametrize(("library", "name"), PAIRS)
@pytest.mark.parametrize("size", [(1, 8, 8), (4, 8, 8), (16, 8, 8), (3, 7, 5), (2, 1, 9)])
def test_an_engine_computes_what_the_graph_does_at_any_batch_and_size(engine, reference, library, name, size):
    _, _, session = engine(library, name)
    given = feeds(*size, seed=1)
    expected, got = reference(given), session.run(given)["output"]
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    if name == "fp32":
        assert relative_error(expected, got) <= 1e-4
    else:
        assert 25 <= decibels(float(np.mean(expected**2)), float(np.mean((expected - got) ** 2))) <= 80


@pytest.mark.parametrize(("library", "name"), PAIRS)
def test_a_plan_says_what_the_engine_computes_in(engine, library, name):
    plan, folder, _ = engine(library, name)
    assert plan.file.startswith("step.")
    assert (folder / plan.file).is_file()
    assert sum(plan.operators.values()) >= 5
    assert sum(plan.achieved_precision.values()) == pytest.approx(1, abs=1e-3)
    asked, least = {"fp32": ("float", 1.0), "bf16": ("bfloat16", 0.4)}[name]
    assert plan.achieved_precision[asked] >= least
    assert set(plan.achieved_precision) <= {"float", asked}


@pytest.mark.parametrize(("library", "name"), PAIRS)
def test_results_stay_as_they_were_after_the_next_call_and_are_the_same_the_next_time(engine, library, name):
    _, _, session = engine(library, name)
    first = session.run(feeds(seed=2))["output"]
    kept = first.copy()
    session.run(feeds(seed=3))
    gc.collect()
    assert np.array_equal(first, kept)
    assert np.array_equal(session.run(feeds(seed=2))["output"], kept)


@pytest.mark.parametrize("library", LIBRARIES)
def test_inputs_that_are_views_are_read_in_their_own_order(engine, library):
    _, _, session = engine(library, "fp32")
    given = feeds(4, seed=4)
    views = {name: array[::-1] for name, array in given.items()}
    straight = session.run({name: np.ascontiguousarray(array) for name, array in views.items()})["output"]
    assert np.array_equal(session.run(views)["output"], straight)


@pytest.mark.parametrize("library", LIBRARIES)
def test_plans_of_several_graphs_share_a_folder(graph, reference, tmp_path, library):
    plans = [built(graph, tmp_path, library, "fp32", name=name) for name in ("prompt", "step")]
    assert len({plan.file for plan in plans}) == 2
    for plan in plans:
        output = backend(library).load(tmp_path / plan.file, plan.options).run(feeds())["output"]
        assert relative_error(reference(feeds()), output) <= 1e-4


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_threads_are_recorded_for_loading(graph, tmp_path, library, threads):
    plan = built(graph, tmp_path, library, "fp32", threads=threads)
    assert threads in plan.options.values()


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "change",
    [
        {"sample": np.zeros((2, 2, 8, 8))},
        {"class_labels": np.zeros(2, np.int32)},
        {"sample": np.zeros((2, 3, 8, 8), np.float32)},
        {"sample": np.zeros((2, 2, 8), np.float32)},
        {"surprise": np.zeros(2, np.float32)},
    ],
    ids=["float64", "int32", "channels", "rank", "unknown-input"],
)
def test_feeds_that_do_not_fit_fail_the_run(engine, library, change):
    _, _, session = engine(library, "fp32")
    with pytest.raises(RunFailed):
        session.run(feeds() | change)
    assert session.run(feeds())["output"].shape == (2, 2, 8, 8)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_input_fails_the_run(engine, library):
    _, _, session = engine(library, "fp32")
    with pytest.raises(RunFailed):
        session.run({"sample": feeds()["sample"]})


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_damaged_plan_is_refused_with_the_way_out(engine, tmp_path, library, keep):
    plan, folder, _ = engine(library, "fp32")
    data = (folder / plan.file).read_bytes()
    damaged = tmp_path / plan.file
    damaged.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(BundleError, match="lehr build"):
        backend(library).load(damaged, plan.options)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("junk", [b"\x00", b"\xff"])
def test_a_plan_of_junk_is_refused(tmp_path, engine, library, junk):
    plan, _, _ = engine(library, "fp32")
    (tmp_path / plan.file).write_bytes(junk * 5000)
    with pytest.raises(BundleError):
        backend(library).load(tmp_path / plan.file, plan.options)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_graph_with_an_operator_nobody_knows_is_a_build_failure(tmp_path, library):
    onnx.save_model(small_graph(first="Convolve", domain="org.example"), tmp_path / "odd.onnx")
    with pytest.raises(BuildFailed, match=r"odd\.onnx"):
        built(tmp_path / "odd.onnx", tmp_path, library, "fp32")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_format_the_builder_has_not_is_a_build_failure(graph, tmp_path, library):
    for name in RECIPES:
        if recipe(name).arithmetic not in builder(library).FORMATS:
            with pytest.raises(BuildFailed, match=name):
                built(graph, tmp_path, library, name)


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_its_library_a_backend_says_what_to_install(graph, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"lehr.runtime.backends.{library}", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'lehr\["):
        backend(library)
    with pytest.raises(MissingExtra, match=r"pip install 'lehr\["):
        built(graph, tmp_path, library, "fp32")
    assert builder(library).FORMATS


# --------------------------------------------------------------------------------------------- who builds what


def test_every_library_of_a_target_has_a_builder_and_those_of_the_cpu_a_backend():
    assert set(LIBRARIES) <= set(backends())
    for facts in targets().values():
        for library in (*facts.libraries, *facts.on_request):
            assert builder_for(facts, library).FORMATS


@pytest.mark.parametrize("name", sorted(targets()))
def test_a_target_has_no_format_that_none_of_its_builders_has(name):
    facts = target(name)
    built = set().union(*(builder_for(facts, name).FORMATS for name in (*facts.libraries, *facts.on_request)))
    assert set(facts.formats) <= built or not facts.libraries


def test_the_cpu_has_all_formats_of_its_builders():
    built = set().union(*(builder(library).FORMATS for library in LIBRARIES))
    assert set(target("cpu").formats) == built


def test_bf16_is_refused_to_onnxruntime_with_the_library_that_has_it():
    with pytest.raises(InvalidInput, match="no bf16 MatMul or Conv; use --library openvino"):
        candidates(target("cpu"), recipe("bf16"), "onnxruntime")
    assert candidates(target("cpu"), recipe("bf16")) == ("openvino",)
    assert fitting(target("cpu"), recipe("fp32")) == ("onnxruntime", "openvino")


def test_a_library_nobody_knows_is_refused():
    with pytest.raises(UnknownName, match="Did you mean 'openvino'"):
        candidates(target("cpu"), recipe("fp32"), "openvno")


def test_auto_passes_over_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "lehr.runtime.backends.onnxruntime", raising=False)
    assert candidates(target("cpu"), recipe("fp32")) == ("openvino",)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "lehr.runtime.backends.openvino", raising=False)
    assert candidates(target("cpu"), recipe("fp32")) == ("onnxruntime",)


def test_a_processor_that_would_emulate_bf16_is_told_so():
    with pytest.raises(InvalidInput, match=r"no bf16 arithmetic .*avx512_bf16.*--recipe fp32"):
        target("cpu").check_machine(recipe("bf16"), {"avx2", "avx512f"})
    target("cpu").check_machine(recipe("bf16"), {"avx512_bf16"})
    target("cpu").check_machine(recipe("fp32"), set())


# ---------------------------------------------------------------------------------------------- OpenVINO's hints


def has_fp16() -> bool:
    import openvino as ov

    return "FP16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.skipif(has_fp16(), reason="this processor has the format that must be missing here")
def test_a_silent_fall_back_to_another_format_fails_the_build(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_cpu, "PRECISIONS", dict.fromkeys(openvino_cpu.PRECISIONS, "f16"))
    with pytest.raises(BuildFailed, match="asked for f16 and falls back to"):
        built(graph, tmp_path, "openvino", "fp32")


@pytest.mark.skipif(has_fp16(), reason="this processor has the format that must be missing here")
def test_an_engine_that_would_compute_in_another_format_is_not_loaded(engine):
    plan, folder, _ = engine("openvino", "fp32")
    with pytest.raises(BundleError, match="not in f16 as it was built"):
        backend("openvino").load(folder / plan.file, {**plan.options, "precision": "f16"})


def test_a_plan_that_computes_something_else_once_loaded_fails_the_build(graph, tmp_path, monkeypatch):
    kind = type(backend("openvino"))
    load = kind.load

    def swapped(self, plan, options):
        session = load(self, plan, options)
        run = session.run
        monkeypatch.setattr(session, "run", lambda given: {"output": run(given)["output"][::-1]})
        return session

    monkeypatch.setattr(kind, "load", swapped)
    with pytest.raises(BuildFailed, match="does not compute 'output' as before it was saved"):
        built(graph, tmp_path, "openvino", "fp32")
