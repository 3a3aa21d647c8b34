"""The TensorRT builders: held to six releases' names, to a library that fails in every way, and to the real one."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lehr import cli
from lehr.engines import build as building
from lehr.engines import cache, forecast, tensorrt_family
from lehr.engines.build import build
from lehr.engines.builders import TargetBuilder, builder, candidates
from lehr.engines.graph.lowering.half import write_half
from lehr.engines.graph.lowering.products import PRODUCTS
from lehr.engines.graph.tensor_file import SafetensorsFile, TensorInfo, write_safetensors
from lehr.engines.job import Job
from lehr.engines.ranges import MAX_BATCH, InputRange, input_ranges, limits
from lehr.engines.settings import Compatible, Settings, StoredWeights, Weights
from lehr.engines.target import Target, target
from lehr.engines.tensorrt_family import TENSORRT, TENSORRT_RTX
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.host import gpu_compute_capability
from lehr.runtime.parity import relative_error
from lehr.runtime.recipe import Format, recipe
from lehr.runtime.spec import BATCH, Dim, DType, GraphSpec, TensorSpec, Varies

HERE = Path(__file__).parent
RELEASES = json.loads((HERE / "tensorrt_api.json").read_text())["releases"]
TENSORRTS = [name for name in RELEASES if name.startswith("tensorrt ")]
WITHOUT_ATTENTION = {"tensorrt 10.3.0", "tensorrt 10.7.0", "tensorrt 10.13.3"}
RANGES = {
    "x": InputRange(min=(1, 4, 32), opt=(2, 16, 32), max=(16, 32, 32)),
    "x.shape": InputRange(min=(1, 4, 32), opt=(2, 16, 32), max=(16, 32, 32), values=True),
}

# An engine with one product in fp32, as the inspector of TensorRT 10 words it.
INSPECTED = {
    "Layers": [
        {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Float"}], "Outputs": []},
        {
            "Name": "in/MatMul",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "q", "Format/Datatype": "Row major linear FP32"}],
        },
    ]
}


def small_graph(*, odd: bool = False) -> onnx.ModelProto:
    """x (batch, tokens, 32) -> y: an attention with one head of 32 between two products."""
    rng = np.random.default_rng(0)

    def weight(name: str) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal((32, 32)) / 32**0.5).astype(np.float32), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w_in"], ["q"], name="in/MatMul"),
        helper.make_node("Attention", ["q", "x", "x"], ["a"], name="attn/Attention", q_num_heads=1, kv_num_heads=1),
        helper.make_node("MatMul", ["a", "w_out"], ["m"], name="out/MatMul"),
        helper.make_node("Tanh", ["m"], ["y"], name="out/Tanh"),
    ]
    if odd:
        nodes[3] = helper.make_node("Odd", ["m"], ["y"], name="out/Odd", domain="org.example")
    tokens = ["batch", "tokens", 32]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, tokens)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, tokens)],
            [weight("w_in"), weight("w_out")],
            value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, tokens) for name in "qam"],
        ),
        opset_imports=[helper.make_opsetid("", 23), *([helper.make_opsetid("org.example", 1)] if odd else [])],
        ir_version=10,
    )


@pytest.fixture
def graph(tmp_path) -> Path:
    path = tmp_path / "portable" / "step.onnx"
    path.parent.mkdir()
    onnx.save_model(small_graph(), path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    return path


def made(
    family, graph: Path, folder: Path, *, name="rtx-40", recipe_name="fp32", ranges=RANGES, said=None, **more
) -> Plan:
    folder.mkdir(exist_ok=True)
    job = Job(
        name="step",
        graph=graph,
        recipe=recipe(recipe_name),
        target=target(name) if isinstance(name, str) else name,
        library=family.module,
        ranges=ranges,
        threads=2,
        **more,
    )
    return family.build_for(job, folder, (said if said is not None else []).append)


def lehr(*arguments: object) -> int:
    """Run the command line; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


# ------------------------------------------------------------------------------- a library that does as it is told


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that installs a fake release, and gives what was called of it and the graph that it was given."""

    def install(release: str, way: str = "well", **goes):
        folder = tmp_path / f"fake-{release.replace(' ', '-')}-{way}"
        folder.mkdir()
        module, _, version = release.partition(" ")
        shutil.copy(HERE / "fake_tensorrt.py", folder / f"{module}.py")
        goes = {"way": way, "inputs": ["x", "x.shape"], "inspected": INSPECTED, **goes}
        (folder / "release.json").write_text(json.dumps({**RELEASES[release], "version": version, "goes": goes}))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(tensorrt_family.host, "gpu_compute_capability", lambda: "8.9")
        monkeypatch.setenv("LEHR_CACHE", str(tmp_path / "cache"))
        calls = folder / "calls.jsonl"
        return (
            TENSORRT if module == "tensorrt" else TENSORRT_RTX,
            lambda: [tuple(json.loads(line)) for line in calls.read_text().splitlines()],
            folder / "parsed.onnx",
        )

    yield install
    for module in ("tensorrt", "tensorrt_rtx"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("release", RELEASES)
def test_the_builder_uses_no_name_that_a_release_has_not(fake, graph, tmp_path, release):
    """The fake has the release's names alone: a call of any other ends the build.

    Of the releases, 10.3, 10.7 and 10.13 lack IAttention, so attention is taken apart before they read the graph;
    all but TensorRT-RTX lack compute capabilities, so the GPU of the machine is held against the target instead.
    """
    family, calls, parsed = fake(release)
    said: list[str] = []
    name = "rtx-40" if release.startswith("tensorrt_rtx") else "l4"
    plan = made(family, graph, tmp_path / "out", name=name, said=said)
    assert family.version() == release.partition(" ")[2]
    assert (tmp_path / "out" / plan.file).read_bytes() == b"an engine"
    assert plan.options["in_pieces"] == (["Attention"] if release in WITHOUT_ATTENTION else [])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step.engine"]
    rows = calls()
    assert ("Builder", "create_network", 1) in rows  # 1 << STRONGLY_TYPED, alone in the fake's enumeration
    assert ("Builder", "max_threads", 2) in rows
    assert ("IBuilderConfig", "clear_flag", "TF32") in rows
    assert ("IOptimizationProfile", "set_shape", "x", [1, 4, 32], [2, 16, 32], [16, 32, 32]) in rows
    assert ("IOptimizationProfile", "set_shape_input", "x.shape", [1, 4, 32], [2, 16, 32], [16, 32, 32]) in rows
    capabilities = [row[2:] for row in rows if row[1] == "set_compute_capability"]
    assert capabilities == ([("SM89", 0)] if release.startswith("tensorrt_rtx") else [])
    read = onnx.load(parsed, load_external_data=False)
    whole = release not in WITHOUT_ATTENTION
    assert ("Attention" in {node.op_type for node in read.graph.node}) is whole
    assert read.opset_import[0].version == (23 if whole else 20)
    assert ("IAttention", "decomposable", True) in rows if whole else True
    assert len(said) == 1
    assert said[0].startswith(f"step for {target(name).where}: Building 1/2, ")


def without_gpu(monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_family.host, "gpu_compute_capability", lambda: None)


def test_a_plan_records_what_was_asked_for_and_claims_nothing_that_cannot_be_read_here(
    fake, graph, tmp_path, monkeypatch
):
    family, _, _ = fake("tensorrt_rtx 1.7.1")
    without_gpu(monkeypatch)
    plan = made(family, graph, tmp_path / "out", name="rtx-30-50")
    assert plan.achieved_precision == {}
    assert plan.operators == {}
    assert plan.options["sm"] == ["8.6", "8.9", "12.0"]
    assert plan.options["tf32"] is False
    assert plan.options["ranges"]["x"]["max"] == [16, 32, 32]
    assert 5 < plan.options["build_peak_mb"] < 1000


def test_an_engine_for_several_targets_names_each(fake, graph, tmp_path):
    family, calls, _ = fake("tensorrt_rtx 1.7.1")
    made(family, graph, tmp_path / "out", name="rtx-30-50")
    rows = calls()
    assert ("IBuilderConfig", "num_compute_capabilities", 3) in rows
    assert [row[2:] for row in rows if row[1] == "set_compute_capability"] == [("SM86", 0), ("SM89", 1), ("SM120", 2)]


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("memory", r"out of memory.*limit --workspace and --tactic-memory"),
        ("parse", r"node 'blocks\.0/odd' \(Odd\): No importer .* Hint: the library does not know.* And 2 more\."),
        ("build", r"node 'product' \(MATRIX_MULTIPLY\): Cannot compile .* Hint: SM 7\.5 .*--recipe fp16"),
        ("silence", "no reason given"),
        ("profile", "ranges .* are not taken"),
        ("kill", r"the build was killed after using \d+ MB, as a rule because memory ran out"),
        ("crash", r"the build crashed \(SIGABRT\) after using \d+ MB\. the last words"),
        ("raise", r"ended with code 1 .*something nobody expected"),
    ],
)
def test_a_build_that_fails_says_why(fake, graph, tmp_path, way, says):
    family, _, _ = fake("tensorrt_rtx 1.7.1", way)
    with pytest.raises(BuildFailed, match=rf"(?s)TensorRT-RTX cannot build step for rtx-40 \(SM 8\.9\): .*{says}"):
        made(family, graph, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_group_norms_that_the_compiler_fails_on_are_taken_apart_once(fake, tmp_path):
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 32, "tokens"]) for name in ("x", "y")]
    ones = [numpy_helper.from_array(np.ones(32, np.float32), name) for name in ("scale", "bias")]
    norm = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], name="norm", num_groups=32)
    model = helper.make_model(
        helper.make_graph([norm], "norm", tensors[:1], tensors[1:], ones),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.save_model(model, tmp_path / "step.onnx")
    family, _, parsed = fake("tensorrt_rtx 1.7.1", "bug", inputs=["x"])
    said: list[str] = []
    plan = made(family, tmp_path / "step.onnx", tmp_path / "out", said=said)
    assert plan.options["in_pieces"] == ["GroupNormalization"]
    assert "GroupNormalization" not in {node.op_type for node in onnx.load(parsed).graph.node}
    assert any("again with every GroupNormalization in pieces" in line for line in said)


def test_a_shape_tensor_without_known_values_is_refused(fake, graph, tmp_path):
    family, _, _ = fake("tensorrt_rtx 1.7.1", inputs=["x"], shape_tensor="x")
    with pytest.raises(BuildFailed, match=r"node 'x' \(input\): its values decide shapes"):
        made(family, graph, tmp_path / "out")


def test_an_input_without_a_range_is_refused(fake, graph, tmp_path):
    family, _, _ = fake("tensorrt_rtx 1.7.1", inputs=["x", "surprise"])
    with pytest.raises(BuildFailed, match=r"node 'surprise' \(input\): no range"):
        made(family, graph, tmp_path / "out")


@pytest.mark.parametrize(("here", "says"), [(None, "there is no NVIDIA GPU"), ("8.6", "the GPU here has SM 8.6")])
def test_tensorrt_builds_for_no_other_gpu_than_the_one_it_finds(fake, graph, tmp_path, monkeypatch, here, says):
    family, _, _ = fake("tensorrt 11.4.0")
    monkeypatch.setattr(tensorrt_family.host, "gpu_compute_capability", lambda: here)
    with pytest.raises(IncompatibleEngine, match=rf"{says}.*l4 \(SM 8\.9\)"):
        made(family, graph, tmp_path / "out", name="l4")


# --------------------------------------------------------------------------------------------------------- settings

EVERYTHING = Settings(workspace_mb=64, tactic_mb=128, effort=1, compatible=Compatible.VERSION, weights=Weights.STREAMED)


@pytest.mark.parametrize("release", TENSORRTS)
def test_every_setting_reaches_the_library_in_every_release_of_tensorrt(fake, graph, tmp_path, release):
    family, calls, _ = fake(release)
    small = {name: InputRange(min=r.opt, opt=r.opt, max=r.opt, values=r.values) for name, r in RANGES.items()}
    plan = made(family, graph, tmp_path / "out", name="l4", settings=EVERYTHING, narrow=[small])
    rows = calls()
    assert ("IBuilderConfig", "set_memory_pool_limit", "WORKSPACE", 64_000_000) in rows
    assert ("IBuilderConfig", "set_memory_pool_limit", "TACTIC_DRAM", 128_000_000) in rows
    assert ("IBuilderConfig", "builder_optimization_level", 1) in rows
    assert {row[2] for row in rows if row[1] == "set_flag"} == {"VERSION_COMPATIBLE", "WEIGHT_STREAMING"}
    shapes = [row[3:] for row in rows if row[1] == "set_shape"]
    assert shapes == [([1, 4, 32], [2, 16, 32], [16, 32, 32]), ([2, 16, 32],) * 3]  # the wide profile comes first
    assert plan.options["optimization_level"] == 1
    assert plan.options["compatible"] == "version"
    assert plan.options["weights"] == "streamed"
    assert plan.options["narrow"] == [{name: r.to_json() for name, r in small.items()}]


@pytest.mark.parametrize("release", TENSORRTS)
def test_an_engine_for_many_gpus_is_made_by_releases_that_can_and_refused_by_others(fake, graph, tmp_path, release):
    family, calls, _ = fake(release)
    made(family, graph, tmp_path / "out", name="l4", settings=Settings(compatible=Compatible.HARDWARE))
    assert ("IBuilderConfig", "hardware_compatibility_level", 0) in calls()  # AMPERE_PLUS, first in the fake's
    capability = Settings(compatible=Compatible.CAPABILITY)
    if release in ("tensorrt 10.3.0", "tensorrt 10.7.0"):
        with pytest.raises(BuildFailed, match="no HardwareCompatibilityLevel SAME_COMPUTE_CAPABILITY; it has AMPERE"):
            made(family, graph, tmp_path / "same", name="l4", settings=capability)
    else:
        assert made(family, graph, tmp_path / "same", name="l4", settings=capability).options["compatible"]


@pytest.mark.parametrize("name", ["orin-agx", "thor"])
def test_hardware_compatible_engines_are_not_promised_for_jetson(fake, graph, tmp_path, monkeypatch, name):
    family, _, _ = fake("tensorrt 11.4.0")
    monkeypatch.setattr(tensorrt_family.host, "gpu_compute_capability", lambda: target(name).sm[0])
    with pytest.raises(InvalidInput, match="Leave out --compatible hardware"):
        made(family, graph, tmp_path / "out", name=name, settings=Settings(compatible=Compatible.HARDWARE))


def test_a_setting_without_use_is_refused(fake, graph, tmp_path):
    family, _, _ = fake("tensorrt_rtx 1.7.1")
    with pytest.raises(InvalidInput, match=r"TensorRT-RTX has no use for --compatible, --tactic-memory\. Leave"):
        made(family, graph, tmp_path / "out", settings=EVERYTHING)


@pytest.mark.parametrize(("before", "found"), [(None, ""), (b"seven", "seven"), (b"damaged!", "")])
def test_kernel_timings_are_kept_for_the_next_build_and_damaged_ones_forgotten(fake, graph, tmp_path, before, found):
    family, calls, _ = fake("tensorrt 11.4.0")
    file = cache.timing_file("tensorrt", "11.4.0", "sm8.9")
    if before is not None:
        file.parent.mkdir(parents=True)
        file.write_bytes(before)
    made(family, graph, tmp_path / "out", name="l4")
    assert ("IBuilderConfig", "set_timing_cache", found, False) in calls()
    assert file.read_bytes() == f"{found}+timed".encode()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_without_the_cache_nothing_is_written_there(fake, graph, tmp_path):
    family, calls, _ = fake("tensorrt 11.4.0")
    made(family, graph, tmp_path / "out", name="l4", settings=Settings(cached=False))
    assert not (tmp_path / "cache").exists()
    assert "set_timing_cache" not in {row[1] for row in calls()}


def test_a_stripped_plan_says_where_each_weight_is(fake, graph, tmp_path):
    """x holds the weights as a bundle stores them; the graph has one of them in half and one that is no rounding."""
    arrays = {init.name: numpy_helper.to_array(init, str(graph.parent)) for init in onnx.load(graph).graph.initializer}
    rows = [(name, TensorInfo(a.dtype, a.shape), lambda a=a: a) for name, a in arrays.items()]
    stored = StoredWeights(name="model/weights.safetensors", path=tmp_path / "stored.safetensors", bytes=8192)
    write_safetensors(stored.path, rows)
    folder = tmp_path / "half"
    folder.mkdir()
    lowered = write_half(graph, folder, keep_high=())
    changed = onnx.load(lowered)
    other = next(init for init in changed.graph.initializer if init.name == "w_out.float16")
    other.CopyFrom(numpy_helper.from_array(arrays["w_out"].astype(np.float16) + np.float16(1), other.name))
    onnx.save_model(changed, lowered)
    family, calls, _ = fake("tensorrt 11.4.0", inspected={})
    plan = made(
        family,
        lowered,
        tmp_path / "out",
        name="l4",
        recipe_name="fp16",
        settings=Settings(weights=Weights.STRIPPED),
        stored=stored,
    )
    assert {row[2] for row in calls() if row[1] == "set_flag"} == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    refit = plan.options["refit"]
    assert refit["weights"] == stored.name
    assert refit["tensors"]["w_in.float16"] == {"in": "stored", "key": "w_in", "dtype": "float16"}
    assert refit["tensors"]["w_out.float16"] == {"in": "beside", "key": "w_out.float16", "dtype": "float16"}
    beside = SafetensorsFile(tmp_path / "out" / refit["beside"])
    assert list(beside.names()) == ["w_out.float16"]
    np.testing.assert_array_equal(beside.read("w_out.float16"), arrays["w_out"].astype(np.float16) + np.float16(1))
    with pytest.raises(InvalidInput, match="refitted from a bundle's weights file"):
        made(family, lowered, tmp_path / "out", name="l4", settings=Settings(weights=Weights.STRIPPED))


# ------------------------------------------------------------------------------------------- what the inspector says


def layer(kind: str, form: str, name: str = "") -> dict:
    return {"Name": name, "LayerType": kind, "Inputs": [{"Format/Datatype": form}], "Outputs": []}


def test_where_the_gpu_is_formats_and_fusions_are_read_from_the_engine(fake, graph, tmp_path):
    rows = [
        layer("gemm", "Row major linear FP16 format"),
        layer("kgen", "Half", "__myl_MatMul"),
        layer("kgen", "Float"),
        layer("Reformat", "Float"),
        layer("conv", "N/A due to dynamic shapes"),
    ]
    family, calls, _ = fake("tensorrt 10.3.0", inspected={"Layers": rows})
    plan = made(family, graph, tmp_path / "out", name="l4", recipe_name="fp16")
    assert plan.operators == {"conv": 1, "gemm": 1, "kgen": 2}
    assert plan.achieved_precision == {"float": 0.3333, "float16": 0.6667}
    assert ("IExecutionContext", "set_input_shape", "x", [2, 16, 32]) in calls()


@pytest.mark.parametrize(("recipe_name", "says"), [("fp16", r"asked for in fp16 .*\(1 in float\)"), ("bf16", "bf16")])
def test_a_silent_fall_back_to_fp32_fails_the_build(fake, graph, tmp_path, recipe_name, says):
    family, _, _ = fake("tensorrt 10.13.3")
    with pytest.raises(BuildFailed, match=says):
        made(family, graph, tmp_path / "out", name="l4", recipe_name=recipe_name)
    assert made(family, graph, tmp_path / "out", name="l4").achieved_precision == {"float": 1.0}


@pytest.mark.parametrize("inspected", [{}, {"Layers": ["only", "names"]}, {"Layers": [layer("gemm", "N/A")]}])
def test_what_the_inspector_does_not_say_is_not_claimed(fake, graph, tmp_path, inspected):
    family, _, _ = fake("tensorrt 10.16.1", inspected=inspected)
    assert made(family, graph, tmp_path / "out", name="l4", recipe_name="fp16").achieved_precision == {}


def test_an_engine_that_the_machines_own_driver_refuses_is_not_kept_for_good(fake, graph, tmp_path):
    family, _, _ = fake("tensorrt 11.4.0", "driver")
    with pytest.raises(BuildFailed, match=r"does not load on this machine's GPU: CUDA driver version is insufficient"):
        made(family, graph, tmp_path / "out", name="l4")


# ---------------------------------------------------------------------------------------------------------- memory


def test_memory_is_forecast_from_the_weights(fake, graph, tmp_path):
    family, _, _ = fake("tensorrt_rtx 1.7.1")
    assert 210 <= made(family, graph, tmp_path / "out").options["forecast_mb"] < 211
    stored = StoredWeights(name="w", path=graph.parent / "w", bytes=1_000_000_000)
    assert 3260 <= forecast.forecast_mb(graph, stored) < 3261


def test_a_build_beyond_the_machines_memory_is_refused_and_one_beyond_the_free_part_announced(
    fake, graph, tmp_path, monkeypatch
):
    family, _, _ = fake("tensorrt_rtx 1.7.1")
    monkeypatch.setattr(forecast, "memory_mb", lambda: (100.0, 50.0))
    with pytest.raises(BuildFailed, match=r"about 210 MB of memory to build and this machine has 100 MB"):
        made(family, graph, tmp_path / "out")
    monkeypatch.setattr(forecast, "memory_mb", lambda: (1000.0, 50.0))
    said: list[str] = []
    made(family, graph, tmp_path / "out", said=said)
    assert "about 210 MB of memory will be needed and 50 MB are free" in said[0]


def test_the_machines_memory_is_known_here():
    total, free = forecast.memory_mb()
    assert 100 < free <= total


# ----------------------------------------------------------------------------------------------------- not installed


def test_a_library_that_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lehr\[trt-rtx\]'"):
        TENSORRT_RTX.version()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BuildFailed, match=r"no Python module 'tensorrt' here.*JetPack"):
        TENSORRT.version()
    assert candidates(target("h100"), recipe("fp16")) == ("tensorrt",)


def test_both_libraries_are_builders_for_targets():
    for family in (TENSORRT, TENSORRT_RTX):
        assert builder(family.module) is family
        assert isinstance(family, TargetBuilder)
    assert not isinstance(builder("onnxruntime"), TargetBuilder)


# ----------------------------------------------------------------------------------------------- sizes of the inputs


def test_ranges_follow_the_models_dimensions_through_expressions_and_shapes(dit_bundle):
    manifest = Bundle.open(dit_bundle).manifest
    step = input_ranges(manifest.graphs["step"].signature, manifest.model)
    table = next(given for name, given in step.items() if len(given.opt) == 3 and given.opt[1] > 1)
    assert (table.min, table.opt, table.max) == ((1, 1, 128), (1, 49, 128), (1, 196, 128))  # height*width/16 tokens
    assert step["sample"].max == (MAX_BATCH, 1, 56, 56)
    prompt = input_ranges(manifest.graphs["prompt"].signature, manifest.model)
    assert prompt["sample.shape"] == InputRange(min=(1, 1, 4, 4), opt=(2, 1, 28, 28), max=(16, 1, 56, 56), values=True)


@pytest.mark.parametrize(
    ("dim", "low", "high"),
    [
        (BATCH, 1, MAX_BATCH),
        (Dim(name="batch", default=32, max=64), 1, 32),
        (Dim(name="height", default=64, min=5, max=1000, multiple=8), 8, 128),
        (Dim(name="height", default=64, max=70, multiple=8), 8, 64),
        (Dim(name="tokens", default=77, min=77, max=77), 77, 77),
    ],
)
def test_limits_are_sizes_that_the_dimension_allows(dim, low, high):
    assert limits(dim) == (low, high)
    for size in (low, high):
        dim.check(size, "here")


@pytest.mark.parametrize(("size", "says"), [("u0", "'u0' that does not follow"), ("64-height", "must not shrink")])
def test_a_size_without_a_range_is_refused(dit_bundle, size, says):
    spec = Bundle.open(dit_bundle).manifest.model
    odd = TensorSpec(name="odd", dtype=DType.FLOAT32, shape=(size,), varies=Varies.PROMPT)
    with pytest.raises(BuildFailed, match=says):
        input_ranges(GraphSpec(inputs=(odd,), outputs=()), spec)


# -------------------------------------------------------------------------------------------------- the real library


def rtx_missing() -> bool:
    try:
        TENSORRT_RTX.version()
    except (MissingExtra, BuildFailed):
        return True
    return False


real = pytest.mark.skipif(rtx_missing(), reason="TensorRT-RTX is not installed")
ONE_INPUT = {"x": RANGES["x"]}


def engine_bytes(graph: Path, folder: Path, name: str, recipe_name: str = "fp16") -> bytes:
    plan = made(TENSORRT_RTX, graph, folder, name=name, recipe_name=recipe_name, ranges=ONE_INPUT)
    return (folder / plan.file).read_bytes()


@pytest.fixture
def half(graph, tmp_path) -> Path:
    folder = tmp_path / "half"
    folder.mkdir()
    return write_half(graph, folder, keep_high=())


@real
def test_a_build_gives_the_same_bytes_again_and_other_bytes_for_another_gpu(half, tmp_path):
    digests = {}
    for name in ("rtx-30", "rtx-40", "rtx-50"):
        first, again = (engine_bytes(half, tmp_path / f"{name}-{k}", name) for k in range(2))
        assert first == again
        assert len(first) > 4096  # the weights alone, in half precision
        digests[name] = hashlib.sha256(first).hexdigest()
    assert len(set(digests.values())) == 3


@real
def test_bf16_builds_where_the_gpu_has_it(graph, tmp_path):
    folder = tmp_path / "bf16"
    folder.mkdir()
    brain = write_half(graph, folder, keep_high=(), dtype=ir.DataType.BFLOAT16)
    assert len(engine_bytes(brain, tmp_path / "ampere", "rtx-30", "bf16")) > 4096
    with pytest.raises(BuildFailed, match=r"rtx-20 \(SM 7\.5\)"):
        engine_bytes(brain, tmp_path / "turing", "rtx-20", "bf16")


@real
@pytest.mark.parametrize(("name", "recipe_name"), [("rtx-40", "fp32"), ("rtx-20", "fp16"), ("rtx-30-50", "fp16")])
def test_attention_builds_in_fp32_and_on_every_gpu_in_fp16(graph, half, tmp_path, name, recipe_name):
    given = graph if recipe_name == "fp32" else half
    assert len(engine_bytes(given, tmp_path / "out", name, recipe_name)) > 4096


@real
def test_products_in_fp32_are_refused_on_turing_with_the_node_and_the_recipe_to_take(graph, tmp_path):
    with pytest.raises(BuildFailed, match=r"(?s)rtx-20 \(SM 7\.5\): node '.*MatMul.*' .*FP32 GEMM.*--recipe fp16"):
        engine_bytes(graph, tmp_path / "out", "rtx-20")


@real
def test_an_operator_that_nobody_knows_is_refused_by_name(tmp_path):
    onnx.save_model(small_graph(odd=True), tmp_path / "step.onnx")
    with pytest.raises(BuildFailed, match=r"(?s)cannot build step for rtx-40 .*node 'out/Odd' \(Odd\)"):
        engine_bytes(tmp_path / "step.onnx", tmp_path / "out", "rtx-40")


def fp8_graph() -> onnx.ModelProto:
    """x (batch, tokens, 32) times a matrix, both rounded to fp8."""
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    tokens = ["batch", "tokens", 32]
    nodes = []
    for name in ("x", "w"):
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"], name=f"{name}/Q"))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"], name=f"{name}/D")
        )
    nodes.append(helper.make_node("MatMul", ["x_d", "w_d"], ["y"], name="MatMul"))
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    return helper.make_model(
        helper.make_graph(
            nodes,
            "fp8",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, tokens)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, tokens)],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(0.02), "scale"), zero],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )


@real
def test_a_format_that_the_gpu_has_not_is_refused(tmp_path):
    onnx.save_model(fp8_graph(), tmp_path / "step.onnx")
    assert len(engine_bytes(tmp_path / "step.onnx", tmp_path / "ada", "rtx-40")) > 1024
    with pytest.raises(BuildFailed, match=r"(?s)rtx-30 \(SM 8\.6\): .*a target lacks a number format"):
        engine_bytes(tmp_path / "step.onnx", tmp_path / "ampere", "rtx-30")


@real
def test_a_gpu_that_the_library_does_not_know_is_refused_with_those_it_does(half, tmp_path):
    hopper = Target(
        name="hopper",
        summary="",
        os=("linux",),
        arch=("x86_64",),
        libraries=("tensorrt_rtx",),
        formats=(Format.FP16,),
        opset=23,
        sm=("9.0",),
    )
    with pytest.raises(BuildFailed, match=r"hopper \(SM 9\.0\): it has no SM90; it knows SM120, SM121, SM75"):
        made(TENSORRT_RTX, half, tmp_path / "out", name=hopper, recipe_name="fp16", ranges=ONE_INPUT)


# ------------------------------------------------------------------------------------------------------ in a bundle


@pytest.fixture(scope="module")
def audited_bundle(dit_bundle, tmp_path_factory) -> Path:
    from lehr.calibration.audit import audit

    copied = Path(shutil.copytree(dit_bundle, tmp_path_factory.mktemp("audited") / "d.lehr"))
    audit(Bundle.open(copied), steps=2, num=1, threads=1)
    return copied


@real
def test_a_bundle_gets_an_engine_for_a_gpu_that_is_not_here_and_says_that_it_cannot_run_it(
    audited_bundle, tmp_path, capsys
):
    bundle = Path(shutil.copytree(audited_bundle, tmp_path / "d.lehr"))
    assert lehr("build", bundle, "--target", "rtx-40", "--recipe", "fp16") == 0
    out = capsys.readouterr().out
    assert "precision unknown" in out
    assert "cannot run or verify it" in out
    opened = Bundle.open(bundle)
    record = engines.find(opened, "rtx-40", "fp16")
    assert record.library == "tensorrt_rtx"
    assert record.library_version == TENSORRT_RTX.version()
    assert record.host == {"os": "linux", "arch": "x86_64"}
    assert set(record.plans) == set(opened.manifest.graphs)
    assert "calibration/ranges.json" in record.sources
    assert record.peak_rss_mb >= max(plan.options["build_peak_mb"] for plan in record.plans.values()) > 50
    assert record.plans["step"].options["sm"] == ["8.9"]
    if gpu_compute_capability() == "8.9":
        return
    (wrong,) = engines.differences(opened, record)
    assert "the engine is for SM 8.9" in wrong
    for verb in (["run", bundle, "-o", tmp_path / "x.npz"], ["verify", bundle]):
        assert lehr(*verb, "--target", "rtx-40", "--recipe", "fp16") == 5
        assert "the engine is for SM 8.9" in capsys.readouterr().err
    assert lehr("inspect", bundle) == 0
    assert "rtx-40" in capsys.readouterr().out


@real
def test_turing_computes_products_in_fp16_also_in_graphs_that_run_once(audited_bundle, tmp_path):
    bundle = Path(shutil.copytree(audited_bundle, tmp_path / "d.lehr"))
    record = build(bundle, target("rtx-20"), recipe("fp16"))
    assert set(record.plans) == set(Bundle.open(bundle).manifest.graphs)


def test_graphs_for_turing_multiply_in_fp16_and_compute_what_the_portable_ones_do(audited_bundle, tmp_path):
    bundle = Bundle.open(audited_bundle)
    feeds = building.example_feeds(bundle)
    for name, entry in bundle.manifest.graphs.items():
        folder = tmp_path / name
        folder.mkdir()
        chosen = recipe("fp16" if name == "step" else "fp32")
        lowered = building._lowered(
            bundle, target("rtx-20"), "tensorrt_rtx", name, chosen, TENSORRT_RTX.LOWERED, folder
        )
        products = [node for node in ir.load(lowered).graph if node.op_type in PRODUCTS]
        assert all(
            value.dtype == ir.DataType.FLOAT16 for node in products for value in node.inputs if value is not None
        )
        assert products or name == "prompt"
        wanted, got = (
            ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds[name])
            for path in (bundle.path(entry.file), lowered)
        )
        for a, b in zip(wanted, got, strict=True):
            assert a.dtype == b.dtype
            assert relative_error(a[None], b[None]) <= 5e-3


@real
def test_turing_is_refused_a_model_whose_products_leave_fp16(audited_bundle, tmp_path, capsys):
    bundle = Path(shutil.copytree(audited_bundle, tmp_path / "d.lehr"))
    opened = Bundle.open(bundle)
    ranges = opened.read_json("calibration/ranges.json")
    product = next(node["node"] for node in ranges["tensors"] if node["operator"] == "MatMul")
    ranges["findings"] = [{"node": product, "format": "fp16", "kind": "overflows"}]
    with opened.edit() as edit:
        edit.add_json("calibration/ranges.json", ranges)
    assert lehr("build", bundle, "--target", "rtx-20", "--recipe", "fp16") == 2
    assert f"{product!r} first. Choose a target that has fp32." in capsys.readouterr().err


@real
def test_without_an_audit_a_half_precision_build_is_refused_with_the_command(dit_bundle, tmp_path, capsys):
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    for name in ("fp16", "bf16"):
        assert lehr("build", bundle, "--target", "rtx-40", "--recipe", name) == 2
        assert "lehr audit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("cuda", 6, "pip install 'lehr[ort-cuda]'"),
        ("rtx-20", 2, "The nearest recipe that it runs: --recipe fp16"),
    ],
)
def test_a_target_that_cannot_be_built_here_says_what_is_missing(
    dit_bundle, tmp_path, capsys, monkeypatch, name, code, says
):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    assert lehr("build", bundle, "--target", name, "--recipe", "fp32") == code
    assert says in capsys.readouterr().err
