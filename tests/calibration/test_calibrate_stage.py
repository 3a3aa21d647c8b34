"""``lehr calibrate --stage`` and what follows: data as the pipeline feeds it, engines, parity, pictures, refusals."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from PIL import Image

from lehr import cli
from lehr.calibration import stage_feeds
from lehr.calibration.collected import cache_folder
from lehr.calibration.layers import Role
from lehr.calibration.stage_calibrate import calibrate_stage, stage_graph
from lehr.calibration.stage_feeds import LATENTS, StageData, gather_feeds, prompts_for
from lehr.calibration.stage_layers import stage_layers
from lehr.calibration.stage_prompts import PROMPTS
from lehr.ci.checks import Outcome
from lehr.ci.policy import policy
from lehr.ci.stages import judge_stages
from lehr.commands.build import command as build_command
from lehr.commands.calibrate import command
from lehr.commands.inspect import command as inspect_command
from lehr.commands.verify import command as verify_command
from lehr.engines import stages as building
from lehr.engines.stages import build_stage, build_stage_kit
from lehr.engines.target import target
from lehr.runtime.arrays import write_arrays
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import GRAPH, RECORD, WEIGHTS, calibrated_names, read_calibrated, recipe_of
from lehr.runtime.engine import STEP, engines, find
from lehr.runtime.errors import BuildFailed, InvalidInput, LehrError
from lehr.runtime.pack import pack, unpack
from lehr.runtime.parity import relative_error
from lehr.runtime.picture_golden import (
    PictureGolden,
    picture_limit,
    read_pictures,
    verify_pictures,
    write_pictures,
)
from lehr.runtime.pipeline_spec import LatentSpec
from lehr.runtime.recipe import RECIPES, Format, recipe
from lehr.runtime.stage_golden import read_stage_golden
from lehr.runtime.stages import open_stage
from lehr.runtime.text_to_image import PictureRequest, TextToImage
from lehr.runtime.tokenizer import Tokenizer
from lehr.runtime.verify_stage import verify_stage

TEXT, DECODER, ENCODER = "text_encoder", "vae_decoder", "vae_encoder"


def invoke(verb: object, *arguments: object) -> Result:
    return CliRunner().invoke(verb, [str(argument) for argument in arguments])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion with golden pictures, built in fp32; read-only for tests."""
    root = tmp_path_factory.mktemp("stages") / "p.lehr"
    for words in (
        ("export", tiny_pipeline("StableDiffusionPipeline"), "-o", root, "--steps", "2", "--golden", "steps"),
        ("build", root, "--library", "onnxruntime", "--threads", 1),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        assert not ended.value.code
    golden = PictureGolden(
        prompts=("a photo of the cat", ""),
        class_labels=(),
        seed=11,
        num_inference_steps=2,
        pictures=np.zeros((2, 3, *TextToImage.open(root).default_size()), np.float32),
    )
    # Eager's are as near to them as fp32 engines are (test_picture_golden), and take longer.
    with Bundle.open(root).edit() as edit:
        write_pictures(edit, replace(golden, pictures=TextToImage.open(root)(golden.request)))
    return root


@pytest.fixture(scope="module")
def calibrated(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its text encoder in int8-weight, by the command line; read-only for tests."""
    root = Path(shutil.copytree(exported, tmp_path_factory.mktemp("calibrated") / "p.lehr"))
    told = invoke(command, root, "--stage", TEXT, "--recipe", "int8-weight", "--threads", 1, "--json")
    assert told.exit_code == 0, (told.output, told.exception)
    assert json.loads(told.stdout)["stage"] == TEXT
    options = ("--stage", TEXT, "--stage-recipe", f"{TEXT}=int8-weight")
    built = invoke(build_command, root, *options, "--library", "onnxruntime", "--threads", 1, "--json")
    assert built.exit_code == 0, (built.output, built.exception)
    return root


@pytest.fixture
def bundle(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "p.lehr"))


# ------------------------------------------------------------------------------------------------- what is left


def test_the_result_is_in_the_stages_folder_and_says_what_was_done(calibrated: Path) -> None:
    opened = Bundle.open(calibrated)
    opened.verify()
    assert (calibrated_names(opened), calibrated_names(opened, TEXT)) == ((), ("int8-weight",))
    found = read_calibrated(opened, "int8-weight", TEXT)
    assert (found.recipe, found.stage) == (recipe("int8-weight"), TEXT)
    assert set(found.sources) == {f"stages/{TEXT}/model.onnx", f"stages/{TEXT}/weights.safetensors"}
    assert set(found.record["plan"]) == set(found.record["choices"])
    assert found.record["tables"]  # the vocabulary
    data = found.record["data"]
    golden = read_pictures(opened)
    assert golden is not None
    assert data["source"] == "prompts"
    assert data["samples"] == len({*golden.prompts, *PROMPTS, ""})
    before = opened.manifest.stage(TEXT).graph.weight_bytes
    assert opened.manifest.files[f"stages/{TEXT}/calibration/int8-weight/{WEIGHTS}"].bytes < 0.35 * before


def test_the_same_again_gives_the_same_bytes(calibrated: Path, exported: Path, tmp_path: Path) -> None:
    other = Bundle.open(shutil.copytree(exported, tmp_path / "p.lehr"))
    made = calibrate_stage(other, TEXT, "int8-weight", data=StageData(threads=1))
    first = Bundle.open(calibrated)
    folder = f"stages/{TEXT}/calibration/int8-weight"
    assert set(made.files) == {f"{folder}/{name}" for name in (GRAPH, WEIGHTS, RECORD)}
    assert made.files == {name: first.manifest.files[name].sha256 for name in made.files}


def test_inspect_says_what_a_stage_is_calibrated_for(calibrated: Path) -> None:
    (row,) = json.loads(invoke(inspect_command, calibrated, "--json").stdout)["stages"][TEXT]["calibrated"]
    assert (row["recipe"], row["data"]["source"]) == ("int8-weight", "prompts")
    assert row["weight_bytes"] > 0
    assert f"stage {TEXT} is calibrated for: int8-weight (" in invoke(inspect_command, calibrated).stdout


# ------------------------------------------------------------------------------------------------------ engines


def test_an_engine_is_smaller_and_meets_what_its_recipe_states(calibrated: Path) -> None:
    opened = Bundle.open(calibrated)
    small, whole = (find(opened, "cpu", name, TEXT) for name in ("int8-weight", "fp32"))
    size = {
        record.recipe: sum(opened.manifest.files[name].bytes for name in opened.names(f"{record.folder}/"))
        for record in (small, whole)
    }
    assert size["int8-weight"] < 0.6 * size["fp32"]
    assert f"stages/{TEXT}/calibration/int8-weight/{WEIGHTS}" in small.sources
    l1 = verify_stage(opened, small).levels["L1"]
    assert l1.passed
    assert l1.measures["limit"] == RECIPES["int8-weight"].rel_error
    assert l1.measures["max_rel_error"] > 1e-4  # it is quantised at all


def test_pictures_are_drawn_with_it_and_held_to_its_loss(calibrated: Path) -> None:
    opened = Bundle.open(calibrated)
    golden = read_pictures(opened)
    assert golden is not None
    assert picture_limit(opened, golden, "fp32", {TEXT: "int8-weight"}) == RECIPES["int8-weight"].psnr_db
    level = verify_pictures(opened, "cpu", "fp32", {TEXT: "int8-weight"})
    assert level is not None
    assert level.passed, level.reason
    assert level.measures["limit_psnr_db"] == RECIPES["int8-weight"].psnr_db
    request = PictureRequest(prompts=["a photo of the cat"], num_inference_steps=2, seed=3)
    whole, small = (
        TextToImage.open(calibrated, stage_recipes={TEXT: name})(request) for name in ("fp32", "int8-weight")
    )
    assert 0 < np.abs(whole - small).max() < 0.1


def test_a_wrong_scale_fails_verification_and_the_gate(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    folder = f"stages/{TEXT}/calibration/int8-weight"
    model = onnx.load(opened.path(f"{folder}/{GRAPH}"), load_external_data=False)
    scale = next(t for t in model.graph.initializer if t.name.endswith(".weight.scale"))
    scale.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(scale), scale.name))
    weights = opened.path(f"{folder}/{WEIGHTS}").read_bytes()
    with opened.edit() as edit:
        edit.add_bytes(f"{folder}/{GRAPH}", model.SerializeToString())
        edit.add_bytes(f"{folder}/{WEIGHTS}", weights)
    record = find(opened, "cpu", "int8-weight", TEXT)
    options = ("--stage", TEXT, "--stage-recipe", f"{TEXT}=int8-weight")
    stale = invoke(verify_command, bundle, *options)
    assert "has changed since it was built" in str(stale.exception)
    build_stage(bundle, TEXT, target("cpu"), recipe("int8-weight"), library="onnxruntime", threads=1)
    told = invoke(verify_command, bundle, *options, "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["stages"][TEXT]["levels"]["L1"]["passed"] is False
    opened = Bundle.open(bundle)
    checks, _ = judge_stages(
        opened, find(opened, "cpu", "fp32"), policy("smoke", dt.date(2030, 1, 1)), {TEXT: record.recipe}
    )
    failed = [check.name for check in checks if check.outcome is Outcome.FAILED]
    assert failed == [f"L1.{TEXT}.rel_error"]


def test_a_packed_stage_takes_along_what_its_recipe_states(calibrated: Path, tmp_path: Path) -> None:
    opened = Bundle.open(calibrated)
    record = find(opened, "cpu", "int8-weight", TEXT)
    archive = pack(opened, find(opened, "cpu", "fp32"), tmp_path / "p.zip", golden=True, stages=[record])
    assert f"stages/{TEXT}/calibration/int8-weight/{RECORD}" in archive.files
    assert f"stages/{TEXT}/calibration/int8-weight/{WEIGHTS}" not in archive.files
    there = unpack(archive.path, tmp_path / "there.lehr")
    assert recipe_of(there, "int8-weight", TEXT) == recipe("int8-weight")
    assert verify_stage(there, find(there, "cpu", "int8-weight", TEXT)).passed


def test_a_kit_holds_the_quantised_graph(bundle: Path) -> None:
    record = build_stage_kit(bundle, TEXT, target("orin-agx"), recipe("int8-weight"))
    opened = Bundle.open(bundle)
    assert f"stages/{TEXT}/calibration/int8-weight/{WEIGHTS}" in record.sources
    graph = opened.path(f"{record.folder}/{record.graphs[STEP]['']}")
    kinds = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    assert "DequantizeLinear" in kinds


def test_the_rest_computes_in_half_precision_where_it_was_asked_for(exported: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(exported, tmp_path / "p.lehr"))
    opened = Bundle.open(root)
    made = calibrate_stage(
        opened, TEXT, "int8-weight", data=StageData(threads=1), rest=Format.FP16, stored_as="small"
    ).recipe
    assert (made.name, made.rest) == ("small", Format.FP16)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    graph = building._lowered(opened, TEXT, target("h100"), "tensorrt", made, frozenset({Format.FP16}), scratch)
    golden = read_stage_golden(opened, TEXT)
    outputs = dict(zip(golden.outputs, ort.InferenceSession(graph).run(None, dict(golden.inputs)), strict=True))
    assert all(relative_error(golden.outputs[name], outputs[name]) < 0.03 for name in outputs)
    kinds = {tensor.data_type for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16} <= kinds
    # The name that a user gave is judged by what the recipe states, not by fp32's limit.
    build_stage(root, TEXT, target("cpu"), made, library="onnxruntime", threads=1)
    l1 = verify_stage(Bundle.open(root), find(Bundle.open(root), "cpu", "small", TEXT)).levels["L1"]
    assert (l1.passed, l1.measures["limit"]) == (True, RECIPES["int8-weight"].rel_error)


# --------------------------------------------------------------------------------------- what stages are fed


def test_a_text_encoder_is_fed_the_tokens_of_golden_and_built_in_prompts(exported: Path, tmp_path: Path) -> None:
    opened = Bundle.open(exported)
    golden = read_pictures(opened)
    pipeline = opened.manifest.pipeline
    assert golden is not None
    assert pipeline is not None
    spec = pipeline.tokenizers[TEXT]
    tokens = Tokenizer(spec, opened.read_bytes(spec.file, 1 << 24))
    for file, prompts in ((None, PROMPTS), (tmp_path / "mine.txt", ("a fox", "two cats"))):
        if file is not None:
            file.write_text("a fox\n\n  two cats \na fox\n", encoding="utf-8")
        assert prompts_for(opened, file)[0] == tuple(dict.fromkeys((*golden.prompts, *prompts)))
        feeds = gather_feeds(opened, TEXT, StageData(prompts=file, threads=1))
        expected = tokens(list(dict.fromkeys([*prompts_for(opened, file)[0], ""]))).ids
        assert np.array_equal(np.concatenate([batch["input_ids"] for batch in feeds.batches]), expected)


def test_a_decoder_is_fed_the_latents_that_the_pipeline_draws(exported: Path, tmp_path: Path) -> None:
    opened = Bundle.open(exported)
    feeds = gather_feeds(opened, DECODER, StageData(num=2, steps=2, threads=1, folder=tmp_path))
    batch = {name: np.concatenate([one[name] for one in feeds.batches]) for name in feeds.batches[0]}
    prompts, _ = prompts_for(opened, None)
    seed = stage_feeds.CALIBRATION_SEEDS
    request = PictureRequest(prompts=prompts[:2], seeds=[seed, seed + 1], num_inference_steps=2)
    latents = TextToImage.open(exported).latents(request)
    latent: LatentSpec | None = None if opened.manifest.pipeline is None else opened.manifest.pipeline.latent
    assert latent is not None
    inner = latents / latent.scaling_factor + latent.shift_factor
    (tensor,) = opened.manifest.stage(DECODER).spec.inputs
    assert relative_error(inner, batch[tensor.name]) < 1e-4
    pictures = gather_feeds(opened, ENCODER, StageData(num=2, steps=2, threads=1, folder=tmp_path)).batches
    decoded = open_stage(opened, DECODER)({tensor.name: batch[tensor.name]})
    (drawn,), given = decoded.values(), np.concatenate([value for one in pictures for value in one.values()])
    assert relative_error(np.clip(drawn, -1, 1), given) < 1e-4


def test_an_interrupted_run_goes_on_with_the_pictures_that_are_missing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, asked = Bundle.open(exported), StageData(num=5, steps=2, threads=1, folder=tmp_path)
    drawn: list[range] = []
    draw = stage_feeds._Drawer.draw

    def counted(self, prompts, numbers, seed, steps):
        drawn.append(numbers)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(self, prompts, numbers, seed, steps)

    monkeypatch.setattr(stage_feeds._Drawer, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        gather_feeds(opened, DECODER, asked)
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    whole = gather_feeds(opened, DECODER, asked)
    assert drawn == [range(4), range(4, 5), range(4, 5)]
    first = next(iter(sorted(tmp_path.rglob("*.npz"))))
    first.write_bytes(first.read_bytes()[:-9])
    again = gather_feeds(opened, DECODER, asked)
    assert drawn[3:] == [range(4)]  # the damaged file alone
    assert (again.digest, again.rows) == (whole.digest, 5)
    assert not list(tmp_path.rglob("*.partial"))
    assert LATENTS > 1
    assert cache_folder().name == "trajectories"


def test_an_encoder_takes_pictures_of_the_users(exported: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for k in range(5):
        Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    opened = Bundle.open(exported)
    made = calibrate_stage(opened, ENCODER, "int8-weight", data=StageData(path=tmp_path, threads=1))
    assert made.plan
    data = read_calibrated(Bundle.open(exported), "int8-weight", ENCODER).record["data"]
    assert (data["source"], data["samples"], data["evaluations"]) == ("recorded", 5, 5)
    with opened.edit() as edit:
        edit.remove(f"stages/{ENCODER}/calibration")


def test_a_decoder_in_int8_is_built_by_the_library_that_has_integer_convolutions(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    calibrate_stage(opened, DECODER, "int8", data=StageData(num=4, steps=2, threads=1, folder=tmp_path))
    with pytest.raises(BuildFailed, match="int8 layers in floating point"):
        build_stage(bundle, DECODER, target("cpu"), recipe("int8"), library="onnxruntime", threads=1)
    record = build_stage(bundle, DECODER, target("cpu"), recipe("int8"), threads=1)
    assert record.library == "openvino"
    assert {"int8", "uint8"} & set(record.achieved_precision)
    assert engines(Bundle.open(bundle), DECODER)
    assert verify_stage(Bundle.open(bundle), record).levels["L1"].measures["limit"] == RECIPES["int8"].rel_error


# ------------------------------------------------------------------------------------------------------- layers


def test_of_a_residual_stream_no_layer_is_the_last(stage_bundle: Path, exported: Path) -> None:
    opened = Bundle.open(exported)
    text = stage_layers(stage_graph(opened, TEXT), opened.manifest.stage(TEXT).spec)
    assert text
    assert not any(layer.roles & {Role.FIRST, Role.LAST} for layer in text)
    decoder = stage_layers(stage_graph(opened, DECODER), opened.manifest.stage(DECODER).spec)
    assert [layer.name for layer in decoder if Role.LAST in layer.roles] == ["decoder.conv_out/Conv"]
    toy = Bundle.open(stage_bundle)
    pooled = stage_layers(stage_graph(toy, TEXT), toy.manifest.stage(TEXT).spec)
    assert [layer.name for layer in pooled if Role.LAST in layer.roles] == ["Attention", "project/Gemm"]


# ---------------------------------------------------------------------------------------------------- bad input


def refused(result: Result, code: int, *words: str) -> None:
    assert isinstance(result.exception, (LehrError, SystemExit)), result.exception
    found = result.exception.exit_code if isinstance(result.exception, LehrError) else result.exit_code
    assert found == code, (result.output, result.exception)
    text = " ".join(f"{result.output} {result.exception}".split())
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stage", "text_encodr", "--recipe", "int8"), ("unknown stage", "Did you mean 'text_encoder'")),
        (("--stage", TEXT, "--recipe", "int9"), ("unknown recipe 'int9'", "int8-weight")),
        (("--stage", TEXT, "--recipe", "fp16"), ("needs no calibration", f"--stage-recipe {TEXT}=fp16", "int8-sq")),
        (("--stage", TEXT), ("Give --recipe",)),
        (("--stage", TEXT, "--budget", "psnr>=35"), ("--budget is for the denoiser",)),
        (("--stage", TEXT, "--recipe", "int8", "--last", "2:fp32"), ("--last is for the denoiser",)),
        (("--stage", TEXT, "--recipe", "int8", "--num", "4"), ("no pictures are drawn",)),
        (("--stage", TEXT, "--recipe", "int8", "--prompts", "gone.txt"), ("gone.txt", "cannot be read")),
        (("--stage", TEXT, "--recipe", "int8", "--data", "gone"), ("gone is no file",)),
        (("--recipe", "int8", "--prompts", "gone.txt"), ("--prompts goes with --stage",)),
        (("--stage", TEXT, "--recipe", "int8-weight", "--name", "int8"), ("shipped recipe",)),
    ],
)
def test_wrong_words_are_refused_and_nothing_is_left(
    exported: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    before = Bundle.open(exported).manifest
    refused(invoke(command, exported, *options), 2, *words)
    assert Bundle.open(exported).manifest == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b" \n\t\n", "holds no prompt"),
        (b"a cat\na f\xfcr\n", r"is not UTF-8: line 2 holds the byte 0xfc"),
    ],
)
def test_a_file_without_prompts_is_refused(exported: Path, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match=words):
        calibrate_stage(Bundle.open(exported), TEXT, "int8-weight", data=StageData(prompts=file))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"ids": np.ones((2, 9), np.int64)}, r"holds the arrays \['ids'\], expected .*input_ids, attention_mask"),
        ({"input_ids": np.ones((2, 9)), "attention_mask": np.ones((2, 9), np.int64)}, "holds float64, expected int64"),
        ({"input_ids": np.ones((2, 8), np.int64), "attention_mask": np.ones((2, 9), np.int64)}, "input_ids"),
    ],
)
def test_recorded_inputs_that_do_not_fit_are_refused(
    stage_bundle: Path, tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    write_arrays(tmp_path / "mine.npz", arrays)
    with pytest.raises(InvalidInput, match=words):
        gather_feeds(Bundle.open(stage_bundle), TEXT, StageData(path=tmp_path / "mine.npz"))


def test_a_stage_outside_of_a_pipeline_is_fed_its_golden_inputs(stage_bundle: Path) -> None:
    opened = Bundle.open(stage_bundle)
    feeds = gather_feeds(opened, DECODER, StageData())
    assert (feeds.source, feeds.rows) == ("golden", 2)
    with pytest.raises(InvalidInput, match="--prompts, --num"):
        gather_feeds(opened, DECODER, StageData(num=3))


def test_a_recipe_that_fits_no_layer_names_those_that_do(stage_bundle: Path) -> None:
    with pytest.raises(InvalidInput, match=r"'nvfp4' quantises no layer of stage 'vae_decoder' .*int8-weight"):
        calibrate_stage(Bundle.open(stage_bundle), DECODER, "nvfp4")


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_recipe_that_was_not_calibrated_says_how_it_is(stage_bundle: Path, name: str) -> None:
    for build in (build_stage, build_stage_kit):
        with pytest.raises(InvalidInput, match=rf"Run: lehr calibrate p\.lehr --stage {DECODER} --recipe {name}"):
            build(stage_bundle, DECODER, target("cpu"), recipe(name))
    with pytest.raises(InvalidInput, match="which is for a denoiser's loop"):
        build_stage(stage_bundle, DECODER, target("cpu"), recipe("bf16-matmul"))


def test_a_calibration_of_other_weights_is_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    name = f"stages/{TEXT}/calibration/int8-weight/{RECORD}"
    record = opened.read_json(name)
    with opened.edit() as edit:
        edit.add_json(name, {**record, "sources": dict.fromkeys(record["sources"], "0" * 64)})
    with pytest.raises(InvalidInput, match=rf"has changed since .*--stage {TEXT} --recipe int8-weight"):
        build_stage(bundle, TEXT, target("cpu"), recipe("int8-weight"), threads=1)
