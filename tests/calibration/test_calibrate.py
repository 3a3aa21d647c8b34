"""``lehr calibrate`` and what follows from it: the graph in the bundle, engines, parity, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lehr.commands.build import command as build_command
from lehr.commands.calibrate import command
from lehr.commands.verify import command as verify_command
from lehr.engines.build import build
from lehr.engines.quantised import check_achieved
from lehr.engines.target import target
from lehr.runtime.arrays import write_arrays
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import RECORD, calibrated_names, read_calibrated, recipe_of
from lehr.runtime.engine import find
from lehr.runtime.errors import BuildFailed, BundleError, InvalidInput, LehrError, UnknownName
from lehr.runtime.golden import read
from lehr.runtime.pack import pack, unpack
from lehr.runtime.recipe import RECIPES, Format, recipe
from lehr.runtime.verify import psnr_limit, rel_error_limit, verify

FEW = ["--num", "10", "--steps", "8", "--threads", "1", "--json"]


def invoke(verb: object, *arguments: object) -> Result:
    return CliRunner().invoke(verb, [str(argument) for argument in arguments])  # type: ignore[arg-type]


def calibrate(bundle: Path, data: Path, *arguments: str) -> dict[str, object]:
    result = invoke(command, bundle, "--trajectories", data, *FEW, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    assert isinstance(told, dict)
    return told


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trajectories")


@pytest.fixture(scope="module")
def calibrated(dit_bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is calibrated for a few recipes, and for a variation of int8."""
    bundle = tmp_path_factory.mktemp("calibrated") / "d.lehr"
    shutil.copytree(dit_bundle, bundle)
    for name in ("int8-sq", "int8-asym-attention", "int4-weight", "nvfp4"):
        calibrate(bundle, data, "--recipe", name)
    calibrate(bundle, data, "--recipe", "int8", "--rest", "bf16", "--name", "fast")
    return bundle


def test_the_result_is_in_the_bundle_and_says_what_was_done(calibrated: Path) -> None:
    bundle = Bundle.open(calibrated)
    bundle.verify()
    assert set(calibrated_names(bundle)) == {"int8-sq", "int8-asym-attention", "int4-weight", "nvfp4", "fast"}
    found = read_calibrated(bundle, "int8-sq")
    assert found.recipe == recipe("int8-sq")
    assert len(found.record["plan"]) == len(found.record["choices"]) == 24
    assert found.record["data"]["samples"] == 10
    assert set(found.sources) == {"model/step.onnx", "model/weights.safetensors"}
    step = bundle.manifest.files["calibration/int8-sq/weights.safetensors"].bytes
    assert step < 0.35 * bundle.manifest.files["model/weights.safetensors"].bytes
    assert bundle.manifest.files["calibration/int4-weight/weights.safetensors"].bytes < 0.7 * step


def test_the_same_again_gives_the_same_bytes(calibrated: Path, dit_bundle: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "d.lehr"
    shutil.copytree(dit_bundle, other)
    files = calibrate(other, tmp_path / "anew", "--recipe", "int8-sq")["files"]
    assert isinstance(files, dict)
    one = Bundle.open(calibrated)
    assert files == {name: one.manifest.files[name].sha256 for name in one.names("calibration/int8-sq/")}
    assert len(files) == 3


@pytest.mark.parametrize(
    ("name", "library"),
    [(name, library) for name in ("int8-sq", "int8-asym-attention") for library in ("onnxruntime", "openvino")]
    + [("nvfp4", "openvino")],
)
def test_an_engine_of_a_calibrated_recipe_meets_what_the_recipe_states(
    calibrated: Path, name: str, library: str
) -> None:
    result = invoke(build_command, calibrated, "--recipe", name, "--library", library, "--threads", 1, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    integers = {"int8", "uint8"} & set(told["achieved_precision"])
    assert bool(integers) == name.startswith("int8")
    checked = invoke(verify_command, calibrated, "--recipe", name, "--json")
    levels = json.loads(checked.stdout)["levels"]
    assert checked.exit_code == 0, levels
    assert levels["L1"]["limit"] == RECIPES[name].rel_error
    assert levels["L2"]["psnr_db"] > levels["L2"]["limit_psnr_db"] == RECIPES[name].psnr_db
    assert levels["L1"]["max_rel_error"] > 1e-3  # it is quantised at all
    record = find(Bundle.open(calibrated), "cpu", name)
    assert f"calibration/{name}/weights.safetensors" in record.sources


def test_attention_of_an_engine_multiplies_integers_between_its_softmax(calibrated: Path) -> None:
    record = build(calibrated, target("cpu"), recipe("int8-asym-attention"), library="openvino", threads=1)
    operators = record.plans["step"].operators
    assert operators["Subgraph int8"] == 6  # a block each, the softmax inside
    assert "ScaledDotProductAttention" not in operators
    assert record.plans["step"].achieved_precision["int8"] > 0.02  # products of weights say uint8
    bundle = Bundle.open(calibrated)
    in_floats = {name: count for name, count in operators.items() if name != "Subgraph int8"}
    with pytest.raises(BuildFailed, match="6 of 30 int8 layers in floating point"):
        check_achieved(bundle, recipe("int8-asym-attention"), "openvino", in_floats)


def test_the_rest_computes_in_what_was_asked_for(calibrated: Path) -> None:
    bundle = Bundle.open(calibrated)
    made = recipe_of(bundle, "fast")
    assert (made.rest, made.arithmetic) == (Format.BF16, Format.INT8)
    try:
        record = build(calibrated, target("cpu"), made, threads=1)
    except InvalidInput as e:
        assert "bf16" in str(e)  # noqa: PT017 - a processor without bf16
        return
    assert record.library == "openvino"
    assert "bfloat16" in record.achieved_precision
    assert verify(Bundle.open(calibrated), record).passed


def test_a_packed_engine_takes_along_what_its_recipe_states(calibrated: Path, tmp_path: Path) -> None:
    build(calibrated, target("cpu"), recipe("int4-weight"), library="onnxruntime", threads=1)
    bundle = Bundle.open(calibrated)
    packed = pack(bundle, find(bundle, "cpu", "int4-weight"), tmp_path / "p.zip", golden=True)
    assert f"calibration/int4-weight/{RECORD}" in packed.files
    there = unpack(tmp_path / "p.zip", tmp_path / "there.lehr")
    assert recipe_of(there, "int4-weight") == recipe("int4-weight")
    assert verify(there, find(there, "cpu", "int4-weight")).passed


def test_recorded_inputs_calibrate_as_well(calibrated: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sigmas = np.repeat([0.9, 0.5, 0.1], 8).astype(np.float32)
    arrays = {
        "sample": random.standard_normal((24, 1, 28, 28)).astype(np.float32),
        "timestep": 1000 * sigmas,
        "class_labels": np.arange(24) % 10,
    }
    write_arrays(tmp_path / "mine.npz", arrays)
    bundle = tmp_path / "d.lehr"
    shutil.copytree(calibrated, bundle)
    told = calibrate(bundle, tmp_path / "data", "--recipe", "int8", "--data", str(tmp_path / "mine.npz"))
    assert told["quantised"] == 24
    assert read_calibrated(Bundle.open(bundle), "int8").record["data"]["source"] == "recorded"


def test_stated_losses_stand_beside_eagers_floors(calibrated: Path) -> None:
    golden = read(Bundle.open(calibrated))
    assert rel_error_limit(golden, "fast") == RECIPES["int8"].rel_error
    assert psnr_limit(golden, "int8-sq") == RECIPES["int8-sq"].psnr_db
    assert not golden.floors["bf16"].stated


# ------------------------------------------------------------------------------------------------------- bad input


def refused(result: Result, code: int, *words: str) -> None:
    assert isinstance(result.exception, (LehrError, SystemExit)), result.exception
    found = result.exception.exit_code if isinstance(result.exception, LehrError) else result.exit_code
    assert found == code
    text = f"{result.output} {result.exception}"
    assert all(word in text for word in words), text


def test_a_recipe_without_its_scales_says_how_to_find_them(dit_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "d.lehr"
    shutil.copytree(dit_bundle, bundle)
    refused(invoke(build_command, bundle, "--recipe", "int8"), 2, "lehr calibrate d.lehr --recipe int8")


def test_bad_usage_is_refused(calibrated: Path, data: Path, tmp_path: Path) -> None:
    refused(invoke(command, calibrated), 2, "--recipe")
    refused(invoke(command, calibrated, "--recipe", "int9"), 2, "unknown recipe")
    refused(invoke(command, calibrated, "--recipe", "fp16"), 2, "lehr build NAME.lehr --recipe fp16")
    refused(invoke(command, calibrated, "--recipe", "int8", "--data", tmp_path / "gone"), 2, "no such file")
    few = [*FEW, "--recipe", "int8", "--trajectories", data]
    refused(invoke(command, calibrated, *few, "--name", "int8-sq"), 2, "shipped recipe")
    refused(invoke(command, calibrated, *few, "--name", "../x"), 2, "cannot name a recipe")
    with pytest.raises(UnknownName, match="fast"):
        recipe_of(Bundle.open(calibrated), "fasd")


def test_a_calibration_of_other_weights_or_another_version_is_refused(calibrated: Path, tmp_path: Path) -> None:
    root = tmp_path / "d.lehr"
    shutil.copytree(calibrated, root)
    bundle = Bundle.open(root)
    name = f"calibration/int8-sq/{RECORD}"
    record = bundle.read_json(name)
    for changed, kind, words in (
        ({"sources": dict.fromkeys(record["sources"], "0" * 64)}, InvalidInput, "has changed since"),
        ({"recipe": {**record["recipe"], "version": 0}}, InvalidInput, "version"),
        ({"version": 99}, BundleError, "version 99"),
        ({"recipe": {"name": "int8-sq"}}, BundleError, "damaged"),
    ):
        with bundle.edit() as edit:
            edit.add_json(name, {**record, **changed})
        with pytest.raises(kind, match=words):
            build(root, target("cpu"), recipe("int8-sq"), library="onnxruntime", threads=1)


def test_int8_layers_that_run_in_floating_point_fail_the_build(calibrated: Path) -> None:
    bundle = Bundle.open(calibrated)
    check_achieved(bundle, recipe("int8-sq"), "onnxruntime", {"MatMulIntegerToFloat": 24, "MatMul": 2})
    check_achieved(bundle, recipe("int8-sq"), "tensorrt_rtx", {})  # only the GPU itself could tell
    with pytest.raises(BuildFailed, match="4 of 24 int8 layers in floating point"):
        check_achieved(bundle, recipe("int8-sq"), "onnxruntime", {"MatMulIntegerToFloat": 20, "MatMul": 6})


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "where"), [("int8-sq", "rtx-20"), ("int8-sq", "rtx-30-50"), ("fp8", "rtx-40"), ("nvfp4", "rtx-50")]
)
def test_tensorrt_rtx_builds_quantised_engines_ahead_of_time(
    calibrated: Path, data: Path, name: str, where: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    root = tmp_path / "d.lehr"
    shutil.copytree(calibrated, root)
    if name == "fp8":
        calibrate(root, data, "--recipe", name)
    if where == "rtx-20":  # what is not quantised multiplies in fp16 there, so its ranges must be known
        from lehr.commands.audit import command as audit_command

        assert invoke(audit_command, root, "--steps", 2, "--num", 1).exit_code == 0
    record = build(root, target(where), recipe(name), threads=1)
    assert record.plans["step"].file.endswith(".engine")
    assert record.plans["step"].options["sm"] == list(target(where).sm)
