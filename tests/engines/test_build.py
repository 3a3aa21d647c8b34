"""Targets, and the ONNX Runtime builder for CPUs."""

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
from lehr.runtime.recipe import RECIPES, Format, Recipe, recipe


@pytest.fixture
def bundle(dit_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))


@pytest.mark.parametrize("name", sorted(targets()))
def test_a_target_states_its_facts(name):
    facts = target(name)
    assert facts.name == name
    assert facts.libraries
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
    record = build(bundle, target("cpu"), recipe("fp32"), threads=1)
    opened = Bundle.open(bundle)
    assert engines.engines(opened) == [record]
    assert record.folder == f"engines/cpu--fp32--onnxruntime-{record.library_version}"
    assert record.sources["model/weights.safetensors"] == opened.manifest.files["model/weights.safetensors"].sha256
    assert record.achieved_precision == {"float": 1.0}
    assert record.operators["Attention"] == 6
    assert record.plans["step"].options["intra_op_threads"] == 1


def test_the_same_build_gives_the_same_samples(bundle):
    feeds = {
        "sample": np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32),
        "timestep": np.full(2, 500, np.float32),
        "class_labels": np.array([1, 10]),
    }
    outputs = []
    for _ in range(2):
        record = build(bundle, target("cpu"), recipe("fp32"), threads=1)
        outputs.append(engines.load(Bundle.open(bundle), record).run(feeds)["output"])
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


@pytest.mark.parametrize("damage", [{"version": 99}, {"surprise": 1}])
def test_a_damaged_record_is_refused(bundle, damage):
    record = engines.find(Bundle.open(bundle), "cpu", "fp32")
    with pytest.raises(BundleError, match="lehr build"):
        engines.EngineRecord.from_json({**record.to_json(), **damage})


def test_a_machine_of_another_kind_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(building.platform, "machine", lambda: "s390x")
    with pytest.raises(IncompatibleEngine, match="s390x"):
        build(bundle, target("cpu"), recipe("fp32"))


def test_an_unknown_library_is_refused_with_the_known_ones(bundle):
    with pytest.raises(UnknownName, match="onnxruntime"):
        build(bundle, target("cpu"), recipe("fp32"), library="tensorrt")


def test_a_graph_the_library_refuses_is_a_build_failure_and_leaves_the_bundle_as_it_was(bundle):
    opened = Bundle.open(bundle)
    graph = opened.path("model/step.onnx").read_bytes().replace(b"LayerNormalization", b"LayerNormalizatiom")
    with opened.edit() as edit:
        edit.add_bytes("model/step.onnx", graph)
    before = sorted(path for path in bundle.rglob("*") if path.is_file())
    with pytest.raises(BuildFailed, match="ONNX Runtime"):
        build(bundle, target("cpu"), recipe("fp32"))
    assert sorted(path for path in bundle.rglob("*") if path.is_file()) == before
