"""The shipped emoji model: from the package to pictures, by engines as by PyTorch."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lehr import cli
from lehr.commands import _demo_emoji, run
from lehr.commands._output import Progress
from lehr.engines.build import build
from lehr.engines.stages import build_stage
from lehr.engines.target import target
from lehr.export.backbones import pixart, preset
from lehr.export.eager_pipeline import eager_text_to_image
from lehr.export.package import Options, export
from lehr.export.pipelines.parts import Parts
from lehr.export.pipelines.read import read_pipeline
from lehr.export.pipelines.source import PipelineSource
from lehr.export.reference.emoji import captions, denoiser, pipeline, text
from lehr.export.reference.emoji.ship import RECORD, WEIGHTS, read_log
from lehr.export.source import Source, resolve, shipped_weights
from lehr.runtime.errors import InvalidInput
from lehr.runtime.golden import Tier
from lehr.runtime.parity import compare
from lehr.runtime.recipe import recipe
from lehr.runtime.text_to_image import PictureRequest, TextToImage

STEPS, PARITY_DB = 3, 45
FOLDER = Path(str(files("lehr.export.reference").joinpath("weights")))


@pytest.fixture(scope="module")
def source() -> Source:
    return resolve("emoji", preset=None, seed=0, structure_only=False)


@pytest.fixture(scope="module")
def found(source: Source) -> PipelineSource:
    whole = read_pipeline("emoji", source)
    assert whole is not None
    return whole


@pytest.fixture(scope="module")
def eager(found: PipelineSource) -> TextToImage:
    return eager_text_to_image(found)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emoji") / "e.lehr"
    export("emoji", root, Options(tier=Tier.NONE), progress=lambda text: None)
    build(root, target("cpu"), recipe("fp32"), library="onnxruntime")
    for stage in ("text_encoder", "vae_decoder", "vae_encoder"):
        build_stage(root, stage, target("cpu"), recipe("fp32"), library="onnxruntime", threads=1)
    return root


@pytest.fixture(scope="module")
def engines(bundle: Path) -> TextToImage:
    return TextToImage.open(bundle)


# -------------------------------------------------------------------------------------------------- what is shipped


def test_the_weights_fit_into_25_megabytes_and_are_those_of_the_record():
    record = json.loads((FOLDER / RECORD).read_text())
    assert sum((FOLDER / name).stat().st_size for name in WEIGHTS.values()) <= 25e6
    for name, digest in record["weights_sha256"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    assert set(record["weights_sha256"]) == set(WEIGHTS.values())
    assert record["stages"]["denoiser"]["loss"]
    assert "CC-BY 4.0" in (FOLDER / "emoji-NOTICE.txt").read_text()


def test_the_preset_is_what_training_trains():
    assert preset("emoji").params == pixart.EMOJI == denoiser.Settings().denoiser
    assert shipped_weights("emoji") is not None


def test_the_bundles_tokenizer_gives_the_tokens_of_the_training(found):
    prompts = [prompt for _, prompt in captions.held_out()] + ["", "Füße & ★ UPPER_case"]
    trained = text.load_tokenizer(FOLDER / "emoji-tokenizer.json")
    expected, expected_mask = text.tokens(trained, prompts, multiple=32)
    tokens = pipeline.Tokenizer(found.spec.tokenizers["text_encoder"], found.tokenizers["text_encoder"])(prompts)
    np.testing.assert_array_equal(tokens.ids, expected.numpy())
    np.testing.assert_array_equal(tokens.mask, expected_mask.numpy())


def test_structure_alone_has_no_weights(source):
    hollow = resolve("emoji", preset=None, seed=0, structure_only=True)
    whole = read_pipeline("emoji", hollow, structure_only=True)
    assert whole is not None
    assert [stage.weights for stage in whole.stages] == [None, None, None]
    assert all(stage.weights is not None for stage in read_pipeline("emoji", source).stages)


def test_the_pipeline_is_whole_and_takes_no_other_parts(source):
    with pytest.raises(InvalidInput, match="complete a file"):
        read_pipeline("emoji", source, parts=Parts(vae=Path("vae")))


# -------------------------------------------------------------------------------------------------- pictures


def test_the_pipeline_draws_what_the_training_code_draws(found, eager):
    """Both sides start from the same noise; the sampler of the training code is Euler on equal steps of s."""
    request = PictureRequest(prompts=["a red heart"], seed=5, num_inference_steps=STEPS, sampler="flow_euler")
    table = eager.table(request)
    settings = denoiser.Settings()
    model = denoiser.Model(settings).eval()
    model.denoiser = found.denoiser.runnable().eval()
    model.text = next(stage for stage in found.stages if stage.spec.name == "text_encoder").runnable()
    ids, mask = text.tokens(text.load_tokenizer(FOLDER / "emoji-tokenizer.json"), ["a red heart", ""])
    latents = eager.latents(request)
    x = torch.from_numpy(_noise(5))
    sigmas = [*table.sigmas, 0.0]
    with torch.no_grad():
        for k in range(STEPS):
            both = torch.cat([x, x])
            flow = model(both, torch.full((2,), 1000 * sigmas[k], dtype=torch.float32), ids, mask)
            wanted, without = flow.chunk(2)
            x = x + (sigmas[k + 1] - sigmas[k]) * (without + 2.0 * (wanted - without))
    np.testing.assert_allclose(latents, x.numpy(), atol=2e-4)


def _noise(seed: int) -> np.ndarray:
    from lehr.runtime.noise import batch_normal

    return np.asarray(batch_normal(seed, range(1), (4, 16, 16)), dtype=np.float32)


def test_engines_draw_what_eager_draws_from_the_same_noise(engines, eager):
    request = PictureRequest(prompts=["a red heart", "the face of a cat"], seed=3, num_inference_steps=STEPS)
    drawn = engines(request)
    assert drawn.shape == (2, 3, 64, 64)
    assert compare(eager(request), drawn, (0.0, 1.0)).psnr_db >= PARITY_DB
    assert np.abs(drawn[0] - drawn[1]).mean() > 0.02, "the prompt makes no difference"


def test_a_picture_can_be_started_from_a_picture(engines, eager):
    picture = engines(PictureRequest(prompts=["a red heart"], seed=1, num_inference_steps=STEPS))[0]
    request = PictureRequest(prompts=["a green heart"], init=picture, strength=0.5, seed=2, num_inference_steps=4)
    assert compare(eager(request), engines(request), (0.0, 1.0)).psnr_db >= PARITY_DB


def test_a_long_prompt_is_cut_and_said_so(bundle):
    told: list[str] = []
    drawing = TextToImage.open(bundle, warn=told.append)
    drawing(PictureRequest(prompts=["a very big red heart " * 12], num_inference_steps=1))
    assert len(told) == 1
    assert "longer than 32 tokens" in told[0]
    assert "heart" in told[0]


def test_an_empty_prompt_draws_something_without_a_wish(engines):
    drawn = engines(PictureRequest(prompts=[""], num_inference_steps=STEPS))
    guided = engines(PictureRequest(prompts=[""], num_inference_steps=STEPS, guidance_scale=1.0))
    np.testing.assert_allclose(drawn, guided, atol=1e-3)  # what is subtracted is the same text


def test_sizes_are_multiples_of_8_pixels(engines):
    with pytest.raises(InvalidInput, match=r"multiple of 8 .* nearest: 64 or 72"):
        engines(PictureRequest(prompts=["a cat"], height=70, width=64))
    drawn = engines(PictureRequest(prompts=["a cat"], height=48, width=80, num_inference_steps=1))
    assert drawn.shape == (1, 3, 48, 80)


# -------------------------------------------------------------------------------------------------- the record


def test_a_resumed_run_is_read_as_one():
    log = """23:58:00 vae step 10 loss 0.50000 20.0 samples/s
23:59:00 vae step 20 loss 0.40000 20.0 samples/s
02:00:00 vae step 15 loss 0.45000 20.0 samples/s
02:01:00 vae step 25 loss 0.35000 20.0 samples/s
02:01:30 vae done at step 26: PSNR 30.00 dB on every tenth picture
a line of something else
02:02:00 denoiser step 100 loss 1.00000 50.0 samples/s
02:02:30 denoiser step 120 held-out prompts: the picture is first in 12%, in the first five in 34%
"""
    stages = read_log(log)
    assert stages["vae"].loss == {10: 0.5, 15: 0.45, 25: 0.35}
    assert stages["vae"].seconds == 60 + 60 + 30  # the two hours in which nothing ran are none of the training's
    assert stages["vae"].result.startswith("done at step 26")
    assert stages["denoiser"].held_out == {120: (12, 34)}


# -------------------------------------------------------------------------------------------------- the demo


def test_the_demo_shows_engines_and_eager_side_by_side(bundle, tmp_path, monkeypatch, capsys):
    """The bundle is the one above: exporting it anew is tried by the long test."""
    ran: list[str] = []

    def lehr(*words: str) -> dict[str, Any]:
        ran.append(words[0])
        if words[0] == "run":
            run.command([*words[1:], "--steps", str(STEPS), "--json"], standalone_mode=False)
            return json.loads(capsys.readouterr().out)
        return {}

    def exported(name: str, output: Path, options: Options, *, progress: object) -> None:
        assert (name, options.tier) == ("emoji", Tier.NONE)
        shutil.copytree(bundle, output)

    monkeypatch.setattr("lehr.export.package.export", exported)
    monkeypatch.setattr(
        "lehr.runtime.text_to_image.PictureRequest", functools.partial(PictureRequest, num_inference_steps=STEPS)
    )
    drawn = _demo_emoji.draw(tmp_path, ("a red heart", "a cat"), 2, lehr=lehr, progress=Progress())
    assert ran == ["build", "run"]
    assert drawn.passed
    assert drawn.psnr_db >= PARITY_DB
    with Image.open(drawn.image) as picture:
        half = 2 * (2 * 66 - 2)
        assert picture.size == (2 * half + 16, half)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels[:, :half] - pixels[:, half + 16 :]).max() <= 2, "both halves show the same pictures"
    top, bottom = pixels[: half // 2 - 2, :half], pixels[half // 2 + 2 :, :half]
    assert np.abs(top - bottom).mean() > 1, "a row a prompt"


@pytest.mark.long
def test_the_demo_draws_prompts_from_the_command_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "-o", str(tmp_path), "--prompt", "a red heart", "--num", "2", "--json"])
    out = json.loads(capfd.readouterr().out)
    assert exit_.value.code == 0
    assert out["passed"] is True
    assert out["prompts"] == ["a red heart"]
    assert out["bundles"] == [str(tmp_path / "emoji.lehr")]
    assert out["psnr_db"][out["bundles"][0]] >= PARITY_DB
    assert Path(out["image"]).is_file()
    assert "a red heart" in Path(out["report"]).read_text()


def test_the_demo_takes_a_number_of_pictures_only_with_prompts(tmp_path):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "-o", str(tmp_path / "demo"), "--num", "2"])
    assert exit_.value.code == 2
    assert not (tmp_path / "demo").exists()
