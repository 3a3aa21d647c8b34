"""Engines of stages: what is recorded, what half precision leaves in float32, what is refused, kits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import stage_toys as toys
from onnx.reference import ReferenceEvaluator

from lehr import cli
from lehr.engines import stages as building
from lehr.engines.kit import open_kit
from lehr.engines.ranges import MAX_BATCH, input_ranges
from lehr.engines.stage_audit import audit_file, audited_stage, overflowing
from lehr.engines.stages import build_stage, build_stage_kit, default_recipe
from lehr.engines.target import target
from lehr.export.stages import StageSource, export_stage
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import STEP, engines
from lehr.runtime.errors import BuildFailed, BundleError, InvalidInput, UnknownName
from lehr.runtime.golden import Tier
from lehr.runtime.kits import find_kit, kits
from lehr.runtime.pack import pack, unpack
from lehr.runtime.parity import relative_error
from lehr.runtime.recipe import Format, recipe
from lehr.runtime.stage import PICTURES_AT_ONCE
from lehr.runtime.stage_golden import read_stage_golden
from lehr.runtime.verify_stage import verify_stage

DECODER, ENCODER = "vae_decoder", "text_encoder"
FP16, BF16 = (frozenset({form}) for form in (Format.FP16, Format.BF16))


@pytest.fixture
def bundle(stage_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(stage_bundle, tmp_path / "p.lehr"))


@pytest.fixture
def unaudited(bundle) -> Path:
    """A bundle whose decoder was exported without golden data."""
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        entry = export_stage(edit, toys.decoder(), tier=Tier.NONE, device="cpu", progress=lambda text: None)
        edit.set_manifest(stages={**opened.manifest.stages, DECODER: entry})
    return bundle


def lehr(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- building


def test_a_stages_engine_records_what_it_was_built_from(stage_bundle):
    opened = Bundle.open(stage_bundle)
    (record,) = engines(opened, DECODER)
    assert record.folder == f"stages/vae_decoder/engines/cpu--fp32--onnxruntime-{record.library_version}"
    assert record.to_json()["stage"] == DECODER
    assert set(record.plans) == {STEP}
    assert set(record.sources) == {"stages/vae_decoder/model.onnx", "stages/vae_decoder/weights.safetensors"}
    assert record.achieved_precision == {"float": 1.0}
    assert record not in engines(opened)


def test_fp16_keeps_what_overflows_in_float32_and_is_as_near_as_eager_in_bf16(bundle):
    record = build_stage(bundle, DECODER, target("cpu"), recipe("fp16"), threads=1)
    opened = Bundle.open(bundle)
    assert audit_file(opened.manifest.stage(DECODER)) in record.sources
    verdict = verify_stage(opened, record)
    assert verdict.passed
    assert verdict.levels["L1"].measures["max_rel_error"] > 1e-6  # it does compute in fp16


@pytest.mark.parametrize("audited", [True, False])
def test_the_audit_is_what_keeps_fp16_finite(stage_bundle, tmp_path, monkeypatch, audited):
    opened = Bundle.open(stage_bundle)
    if not audited:
        monkeypatch.setattr(building, "audited_stage", lambda *_: frozenset())
    graph = building._lowered(opened, DECODER, target("h100"), "tensorrt", recipe("fp16"), FP16, tmp_path)
    with np.errstate(all="ignore"):
        # ONNX Runtime rounds nothing between two operators that it computes in float32; the reference does.
        (made,) = ReferenceEvaluator(onnx.load(graph)).run(None, dict(read_stage_golden(opened, DECODER).inputs))
    assert bool(np.isfinite(made).all()) is audited


def test_a_text_encoder_in_fp16_attends_in_fp16_under_a_mask_that_fp16_cannot_hold(stage_bundle, tmp_path):
    opened = Bundle.open(stage_bundle)
    graph = building._lowered(opened, ENCODER, target("h100"), "tensorrt", recipe("fp16"), FP16, tmp_path)
    (attention,) = (node for node in onnx.load(graph).graph.node if node.op_type == "Attention")
    golden = read_stage_golden(opened, ENCODER)
    shapes = onnx.shape_inference.infer_shapes(onnx.load(graph)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in shapes.value_info}
    assert {types[name] for name in attention.input if name} == {onnx.TensorProto.FLOAT16}
    outputs = dict(zip(golden.outputs, ort.InferenceSession(graph).run(None, dict(golden.inputs)), strict=True))
    for name, expected in golden.outputs.items():
        assert relative_error(expected, outputs[name]) < 10 * golden.floors["fp16"][name]


def test_all_libraries_are_measured_and_one_is_kept(bundle):
    record = build_stage(bundle, ENCODER, target("cpu"), recipe("fp32"), threads=1)
    rows = {row["library"]: row for row in record.candidates}
    assert set(rows) == {"onnxruntime", "openvino"}
    assert all(row["passed"] and row["step_ms"] > 0 and row["max_rel_error"] < 1e-5 for row in rows.values())
    opened = Bundle.open(bundle)
    assert engines(opened, ENCODER) == [record]
    assert not [name for name in opened.names("stages/") if record.library not in name and "/engines/" in name]


def test_where_no_library_meets_parity_nothing_is_kept(bundle, monkeypatch):
    before = Bundle.open(bundle).manifest
    monkeypatch.setattr(building, "worst_output", lambda errors, *_: (next(iter(errors)), 0.0))
    with pytest.raises(BuildFailed, match="no library's fp32 engine meets parity"):
        build_stage(bundle, ENCODER, target("cpu"), recipe("fp32"), threads=1)
    assert Bundle.open(bundle).manifest == before


def test_an_engine_takes_few_pictures_and_many_prompts():
    pictures = input_ranges(toys.DECODER.signature, toys.DECODER)["latent_sample"]
    prompts = input_ranges(toys.ENCODER.signature, toys.ENCODER)["input_ids"]
    assert (pictures.max, prompts.max[0]) == ((PICTURES_AT_ONCE, 4, 16, 16), MAX_BATCH)


def test_tensorrt_rtx_builds_the_stages_for_a_gpu_that_is_not_here(bundle):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    for name in (ENCODER, DECODER):
        record = build_stage(bundle, name, target("rtx-40"), recipe("fp16"))
        assert record.library == "tensorrt_rtx"
        assert record.plans[STEP].options["sm"] == ["8.9"]


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_stage_that_was_never_audited_is_refused_in_fp16_and_built_in_bf16(unaudited, tmp_path):
    with pytest.raises(InvalidInput, match=r"without golden data.*--stage-recipe vae_decoder=bf16"):
        build_stage(unaudited, DECODER, target("cpu"), recipe("fp16"), threads=1)
    opened = Bundle.open(unaudited)
    graph = building._lowered(opened, DECODER, target("h100"), "tensorrt", recipe("bf16"), BF16, tmp_path)
    kinds = {tensor.data_type for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    record = build_stage(unaudited, DECODER, target("cpu"), recipe("fp32"), library="onnxruntime", threads=1)
    assert record.stage == DECODER  # looked at with numbers of no meaning


def test_an_audit_of_other_golden_data_is_refused(bundle):
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        edit.add_bytes("stages/vae_decoder/golden.npz", b"other")
    with pytest.raises(InvalidInput, match=r"golden\.npz has changed since stages/vae_decoder/ranges\.json was made"):
        audited_stage(Bundle.open(bundle), DECODER, Format.FP16)


@pytest.mark.parametrize(
    ("reads", "damage"),
    [
        (audited_stage, {"version": 9}),
        (audited_stage, {"sources": 1}),
        (audited_stage, {"keep_high": {}}),
        (audited_stage, {"keep_high": 3}),
        (overflowing, {"findings": [1]}),
    ],
)
def test_a_damaged_audit_is_refused(bundle, reads, damage):
    opened = Bundle.open(bundle)
    name = audit_file(opened.manifest.stage(DECODER))
    with opened.edit() as edit:
        edit.add_json(name, {**opened.read_json(name), **damage})
    with pytest.raises(BundleError, match="is damaged"):
        reads(Bundle.open(bundle), DECODER, Format.FP16)


def test_products_that_leave_fp16_are_refused_where_there_is_nothing_else(stage_bundle, tmp_path):
    opened = Bundle.open(stage_bundle)
    with pytest.raises(InvalidInput, match=r"1 products of stage 'vae_decoder' leave its range, 'conv_in/Conv' first"):
        building._lowered(opened, DECODER, target("rtx-20"), "tensorrt", recipe("fp16"), FP16, tmp_path)


def test_an_unknown_stage_is_refused(stage_bundle):
    with pytest.raises(UnknownName, match="unknown stage 'vae'"):
        build_stage(stage_bundle, "vae", target("cpu"), recipe("fp32"))


def test_structure_alone_cannot_be_built(bundle):
    found = toys.encoder()
    hollow = StageSource(spec=found.spec, module=found.module, weights=None, origin="none", feeds=found.feeds)
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        entry = export_stage(edit, hollow, tier=None, device="cpu", progress=lambda text: None)
        edit.set_manifest(stages={ENCODER: entry})
    with pytest.raises(BundleError, match="structure only"):
        build_stage(bundle, ENCODER, target("cpu"), recipe("fp32"), library="onnxruntime")


# ------------------------------------------------------------------------------------------------- which recipe


@pytest.mark.parametrize(
    ("where", "denoiser", "stage"),
    [
        ("cpu", "bf16", "fp32"),
        ("h100", "fp16", "fp16"),
        ("h100", "bf16", "bf16"),
        ("h100", "int8-sq", "fp16"),
        ("rtx-20", "int8", "fp16"),
    ],
)
def test_beside_the_denoiser_a_stage_gets_a_recipe_that_needs_no_calibration(stage_bundle, where, denoiser, stage):
    opened = Bundle.open(stage_bundle)
    assert default_recipe(opened, DECODER, target(where), recipe(denoiser)).name == stage


@pytest.mark.parametrize(("where", "stage"), [("h100", "bf16"), ("rtx-20", "fp32")])
def test_fp16_is_not_chosen_for_a_stage_that_nobody_measured(unaudited, where, stage):
    assert default_recipe(Bundle.open(unaudited), DECODER, target(where), recipe("fp16")).name == stage


# -------------------------------------------------------------------------------------------------------------- kits


def test_a_kit_holds_the_stages_graph_for_the_device(bundle, tmp_path):
    record = build_stage_kit(bundle, DECODER, target("orin-agx"), recipe("fp16"), options=("--threads", "2"))
    opened = Bundle.open(bundle)
    assert (find_kit(opened, "orin-agx", "fp16", DECODER), kits(opened)) == (record, [])
    assert record.command[-6:] == ("--stage", DECODER, "--stage-recipe", "vae_decoder=fp16", "--threads", "2")
    archive = pack(opened, engines(opened)[0], tmp_path / "p.zip", golden=True, stages=[record]).path
    there = unpack(archive, tmp_path / "there.lehr")
    assert kits(there, DECODER) == [record]
    kit = open_kit(there, "orin-agx", "fp16", "tensorrt", DECODER)
    assert kit is not None
    golden = read_stage_golden(there, DECODER)
    (made,) = ort.InferenceSession(kit.graphs[STEP]).run(None, dict(golden.inputs))
    assert relative_error(golden.outputs["sample"], np.asarray(made)) < golden.floors["bf16"]["sample"]
    assert open_kit(there, "orin-agx", "fp16", "tensorrt", ENCODER) is None


def test_a_device_finishes_a_stages_kit_without_onnx_and_pytorch(run_python):
    out = run_python(
        "import sys\n"
        "import lehr.ci.stages, lehr.commands.build, lehr.engines.stages, lehr.runtime.verify_stage\n"
        "print(sorted({'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'openvino'} & set(sys.modules)))"
    )
    assert out.strip() == "[]"


# ------------------------------------------------------------------------------------------------- the command line


def test_build_verify_and_inspect_take_the_denoiser_and_every_stage(bundle, capsys):
    code, out = lehr("build", bundle, "--library", "onnxruntime", "--threads", 1, "--json", capsys=capsys)
    data = json.loads(out)
    assert (code, [row["stage"] for row in data["stages"]]) == (0, [ENCODER, DECODER])
    assert {"target", "recipe", "library", "seconds", "engine", "candidates"} <= set(data["stages"][0]) & set(data)
    code, out = lehr("verify", bundle, "--json", capsys=capsys)
    data = json.loads(out)
    assert (code, data["passed"], data["levels"]["L1"]["passed"]) == (0, True, True)
    assert all(stage["passed"] for stage in data["stages"].values())
    _, out = lehr("inspect", bundle, "--json", capsys=capsys)
    stages = json.loads(out)["stages"]
    assert stages[DECODER]["kind"] == "latent_decoder"
    assert stages[DECODER]["engines"][0]["parity"]["passed"]
    _, out = lehr("inspect", bundle, capsys=capsys)
    assert "toy_decoder" in out


def test_one_stage_alone_is_built_in_the_recipe_named_for_it(bundle, capsys):
    denoiser = engines(Bundle.open(bundle))
    options = ("--stage", DECODER, "--stage-recipe", f"{DECODER}=fp16")
    code, out = lehr("build", bundle, *options, "--json", capsys=capsys)
    data = json.loads(out)
    assert (code, data["engine"], [row["recipe"] for row in data["stages"]]) == (0, None, ["fp16"])
    assert engines(Bundle.open(bundle)) == denoiser
    assert lehr("verify", bundle, *options, capsys=capsys)[0] == 0
    code, out = lehr("pack", bundle, *options[2:], "-o", bundle.with_name("p.zip"), "--json", capsys=capsys)
    assert code == 0
    assert "--fp16--" in json.loads(out)["stages"][DECODER]


def test_verify_fails_with_a_stage_that_fails(bundle, capsys):
    opened = Bundle.open(bundle)
    arrays = opened.read_arrays("stages/vae_decoder/golden.npz")
    with opened.edit() as edit:
        edit.add_arrays("stages/vae_decoder/golden.npz", {**arrays, "output.sample": -arrays["output.sample"]})
    code, out = lehr("verify", bundle, "--json", capsys=capsys)
    data = json.loads(out)
    assert (code, data["passed"]) == (1, False)
    assert (data["stages"][DECODER]["passed"], data["stages"][ENCODER]["passed"]) == (False, True)
    assert "FAILED" in lehr("verify", bundle, "--stage", DECODER, capsys=capsys)[1]


def test_verify_says_which_stage_it_could_not_judge(unaudited, capsys):
    code, out = lehr("verify", unaudited, "--json", capsys=capsys)
    data = json.loads(out)
    assert (code, data["stages"][DECODER]["passed"]) == (0, None)
    assert data["stages"][DECODER]["reason"] == "no engine for target 'cpu'"
    build_stage(unaudited, DECODER, target("cpu"), recipe("fp32"), library="onnxruntime")
    assert "stage vae_decoder: not judged, no golden data" in lehr("verify", unaudited, capsys=capsys)[1]
    assert lehr("verify", unaudited, "--stage", DECODER, capsys=capsys)[0] == 5


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--stage", "vae"), 2),
        (("--stage-recipe", "vae_decoder"), 2),
        (("--stage-recipe", "vae=fp32"), 2),
        (("--stage-recipe", "denoiser=fp32"), 2),
        (("--stage-recipe", "vae_decoder=fp7"), 2),
        (("--stage-recipe", "vae_decoder=fp32", "--stage-recipe", "vae_decoder=fp16"), 2),
        (("--stage-recipe", "vae_decoder=int8"), 2),
    ],
)
def test_wrong_stages_and_recipes_are_refused_before_anything_is_built(bundle, options, code, capsys):
    before = Bundle.open(bundle).manifest
    assert lehr("build", bundle, *options, capsys=capsys)[0] == code
    assert Bundle.open(bundle).manifest == before


def test_for_a_device_the_kits_of_all_parts_are_made_at_once(bundle, capsys):
    code, out = lehr("build", bundle, "--target", "orin-agx", "--json", capsys=capsys)
    data = json.loads(out)
    assert (code, data["kit"]) == (0, "kits/orin-agx--fp32")
    assert [row["kit"] for row in data["stages"]] == [f"stages/{n}/kits/orin-agx--fp32" for n in (ENCODER, DECODER)]
    archive = bundle.with_name("p.zip")
    code, out = lehr("pack", bundle, "--target", "orin-agx", "-o", archive, "--json", capsys=capsys)
    assert (code, json.loads(out)["stages"][ENCODER]) == (0, "stages/text_encoder/kits/orin-agx--fp32")
