"""Targets, and engines in a bundle: what is recorded, what is replaced, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lehr.engines import build as building
from lehr.engines.build import build
from lehr.engines.target import target, targets
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BuildFailed, BundleError, IncompatibleEngine, InvalidInput, UnknownName
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.host import cpu_features
from lehr.runtime.recipe import RECIPES, Format, Recipe, recipe
from lehr.runtime.verify import record_parity, verify


@pytest.fixture
def bundle(dit_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))


@pytest.mark.parametrize("name", sorted(targets()))
def test_a_target_states_its_facts(name):
    facts = target(name)
    assert facts.name == name
    assert facts.formats
    assert 17 <= facts.opset <= 26


def test_a_recipe_the_target_cannot_run_is_refused_before_anything_is_built():
    class Strange:
        value = "fp3"

    odd = Recipe(name="fp3", version=1, weights=Strange(), arithmetic=Format.FP32, summary="")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="no fp3; it has fp32"):
        target("cpu").check(odd)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_found_by_name(name):
    assert recipe(name).name == name


def test_an_engine_records_what_was_built_from_what(bundle):
    record = build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime", threads=1)
    opened = Bundle.open(bundle)
    assert engines.engines(opened) == [record]
    assert record.folder == f"engines/cpu--fp32--onnxruntime-{record.library_version}"
    assert record.sources["model/weights.safetensors"] == opened.manifest.files["model/weights.safetensors"].sha256
    assert record.achieved_precision == {"float": 1.0}
    assert record.operators["Attention"] == 6
    assert record.plans["step"].options["intra_op_threads"] == 1


@pytest.mark.parametrize("library", target("cpu").libraries)
def test_the_same_build_gives_the_same_samples(bundle, library):
    sample = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    outputs = []
    for _ in range(2):
        record = build(bundle, target("cpu"), recipe("fp32"), library=library, threads=1)
        denoiser = load_denoiser(Bundle.open(bundle), record)
        outputs.append(denoiser(sample, 500.0, {"class_labels": np.array([1, 10])}))
    assert np.array_equal(*outputs)


def test_a_stale_engine_is_refused_after_its_weights_changed(bundle):
    opened = Bundle.open(bundle)
    data = bytearray(opened.path("model/weights.safetensors").read_bytes())
    data[-1] ^= 1
    with opened.edit() as edit:
        edit.add_bytes("model/weights.safetensors", bytes(data))
    opened = Bundle.open(bundle)
    with pytest.raises(IncompatibleEngine, match=r"weights\.safetensors has changed"):
        engines.load(opened, engines.find(opened, "cpu", "fp32"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"host": {"os": "linux", "arch": "riscv", "isa": "0"}}, "arch is"),
        ({"library_version": "0.1"}, "onnxruntime is"),
    ],
)
def test_an_engine_built_elsewhere_is_refused_with_the_difference(bundle, change, says):
    opened = Bundle.open(bundle)
    record = engines.find(opened, "cpu", "fp32")
    other = engines.EngineRecord.from_json({**record.to_json(), **change})
    with pytest.raises(IncompatibleEngine, match=says):
        engines.load(opened, other)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"version": 1}, "version 1, expected 2"),
        ({"version": 99}, "version 99"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"plans": {}}, "no 'step'"),
        ({"plans": {"step": "step.onnx"}}, r"plans\.step is 'step\.onnx', expected dict"),
        ({"plans": {"step": {"file": "step.onnx"}}}, r"plans\.step lacks achieved_precision"),
        ({"sources": {"model/step.onnx": 3}}, r"sources\.model/step\.onnx is 3, expected str"),
        ({"seconds": "long"}, "seconds is 'long'"),
        ({"candidates": [1]}, r"candidates\[0\] is 1"),
    ],
)
def test_a_damaged_record_is_refused_with_the_field(bundle, damage, says):
    record = engines.find(Bundle.open(bundle), "cpu", "fp32")
    assert engines.EngineRecord.from_json(record.to_json()) == record
    with pytest.raises(BundleError, match=f"{says}.*lehr build"):
        engines.EngineRecord.from_json({**record.to_json(), **damage})


def test_a_record_that_lacks_a_field_is_refused(bundle):
    data = engines.find(Bundle.open(bundle), "cpu", "fp32").to_json()
    del data["host"]
    with pytest.raises(BundleError, match="lacks host"):
        engines.EngineRecord.from_json(data)


def test_a_graph_the_engine_has_not_is_refused(bundle):
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match="no graph 'decoder'"):
        engines.load(opened, engines.find(opened, "cpu", "fp32"), "decoder")


def test_a_machine_of_another_kind_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(building.platform, "machine", lambda: "s390x")
    with pytest.raises(IncompatibleEngine, match="s390x"):
        build(bundle, target("cpu"), recipe("fp32"))


def test_an_unknown_library_is_refused_with_the_known_ones(bundle):
    with pytest.raises(UnknownName, match="onnxruntime"):
        build(bundle, target("cpu"), recipe("fp32"), library="tensorrt")


@pytest.mark.parametrize("library", target("cpu").libraries)
def test_a_graph_the_library_refuses_is_a_build_failure_and_leaves_the_bundle_as_it_was(bundle, library):
    opened = Bundle.open(bundle)
    graph = opened.path("model/step.onnx").read_bytes().replace(b"LayerNormalization", b"LayerNormalizatiom")
    assert b"LayerNormalizatiom" in graph
    with opened.edit() as edit:
        edit.add_bytes("model/step.onnx", graph)
    before = sorted(path for path in bundle.rglob("*") if path.is_file())
    with pytest.raises(BuildFailed, match=r"step\.onnx"):
        build(bundle, target("cpu"), recipe("fp32"), library=library)
    assert sorted(path for path in bundle.rglob("*") if path.is_file()) == before


def test_a_build_replaces_the_engine_of_the_same_target_and_recipe_and_its_verdict(bundle):
    opened = Bundle.open(bundle)
    before = engines.find(opened, "cpu", "fp32")
    record_parity(opened, verify(opened, before))
    assert opened.manifest.parity[before.folder]["passed"] is True
    after = build(bundle, target("cpu"), recipe("fp32"), library="openvino")
    opened = Bundle.open(bundle)
    assert engines.engines(opened) == [after]
    assert not opened.names(before.folder)
    assert opened.manifest.parity == {}


def test_an_engine_of_an_older_record_is_replaced_by_a_build(bundle):
    opened = Bundle.open(bundle)
    old = engines.find(opened, "cpu", "fp32")
    with opened.edit() as edit:
        edit.add_json(f"{old.folder}/build.json", {"version": 1})
    with pytest.raises(BundleError, match="version 1"):
        engines.find(opened, "cpu", "fp32")
    new = build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime")
    assert engines.find(Bundle.open(bundle), "cpu", "fp32") == new


def test_every_graph_has_a_plan_and_only_the_step_leaves_fp32(bundle):
    if not set(target("cpu").hardware[Format.BF16]) & set(cpu_features()):
        pytest.skip("this processor would emulate bf16")
    record = build(bundle, target("cpu"), recipe("bf16"))
    opened = Bundle.open(bundle)
    assert set(record.plans) == set(opened.manifest.graphs)
    assert record.achieved_precision["bfloat16"] > 0.9
    assert all(dict(p.achieved_precision) == {"float": 1.0} for name, p in record.plans.items() if name != "step")
    verdict = verify(opened, record)
    assert verdict.passed
    assert 1e-4 < verdict.levels["L1"].measures["max_rel_error"] < 0.1
    assert {r.recipe for r in engines.engines(opened)} == {"fp32", "bf16"}


def test_openvino_meets_the_parity_of_fp32(bundle):
    record = build(bundle, target("cpu"), recipe("fp32"), library="openvino")
    opened = Bundle.open(bundle)
    verdict = verify(opened, record)
    assert verdict.passed
    assert verdict.levels["L2"].measures["psnr_db"] > 100


def test_a_processor_without_bf16_is_refused_before_anything_is_built(bundle, monkeypatch):
    monkeypatch.setattr(building, "cpu_features", lambda: ("avx2", "avx512f"))
    with pytest.raises(InvalidInput, match="no bf16 arithmetic"):
        build(bundle, target("cpu"), recipe("bf16"))


@pytest.mark.parametrize("library", target("cpu").libraries)
def test_a_damaged_plan_is_refused(bundle, library):
    record = build(bundle, target("cpu"), recipe("fp32"), library=library)
    plan = bundle / record.folder / record.plans["step"].file
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=plan.name.replace(".", r"\.")):
        engines.load(Bundle.open(bundle), record)


@pytest.mark.parametrize("library", target("cpu").libraries)
def test_an_engine_of_another_version_of_its_library_is_refused_with_the_rebuild_command(bundle, library):
    record = build(bundle, target("cpu"), recipe("fp32"), library=library)
    other = engines.EngineRecord.from_json({**record.to_json(), "library_version": "0.1"})
    with pytest.raises(IncompatibleEngine, match=rf"{library} is .* here and 0\.1 where .* lehr build d\.lehr"):
        engines.load(Bundle.open(bundle), other)
