"""``lehr run`` on a whole pipeline: export, build, then pictures from words without any framework."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lehr import cli
from lehr.runtime.errors import BundleError
from lehr.runtime.text_to_image import TextToImage

PROMPT = "a photo of the cat"


def lehr(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Callable[[str], Path]) -> Path:
    return tiny_pipeline("PixArtAlphaPipeline")


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, exported and built by the command line; read-only for tests."""
    made = tmp_path_factory.mktemp("pictures") / "p.lehr"
    assert lehr("export", folder, "-o", made, "--steps", "3", "--golden", "none") == 0
    assert lehr("build", made, "--library", "onnxruntime") == 0
    return made


def test_words_become_pictures_and_no_framework_is_loaded(
    bundle: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    arguments = ["run", str(bundle), "--prompt", PROMPT, "--num", "2", "-o", str(tmp_path / "o.npz"), "--json"]
    printed = run_python(
        f"""
import json, sys
from lehr import cli
try:
    cli.main({arguments!r})
except SystemExit as e:
    heavy = ("torch", "transformers", "diffusers", "onnx", "onnx_ir", "safetensors")
    print(json.dumps([e.code or 0, [name for name in heavy if name in sys.modules]]))
"""
    )
    told, checked = (json.loads(line) for line in printed.splitlines())
    assert checked == [0, []]
    assert told["shape"] == [2, 3, 32, 32]
    assert (told["sampler"], told["evaluations"], told["warnings"]) == ("DPMSolverMultistepScheduler", 3, [])
    with np.load(tmp_path / "o.npz") as file:
        assert file["samples"].dtype == np.float32
        assert 0 <= file["samples"].min() < file["samples"].max() <= 1


# of diffusers' schedulers, which hand tensors to numpy
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_bundle_draws_what_the_folders_own_pipeline_draws(bundle: Path, folder: Path, tmp_path: Path) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from lehr.runtime.noise import batch_normal

    assert lehr("run", bundle, "--prompt", PROMPT, "--num", "2", "--seed", "8", "-o", tmp_path / "o.npz") == 0
    pipe = diffusers.PixArtAlphaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=[PROMPT] * 2,
        latents=torch.from_numpy(batch_normal(8, range(2), (4, 8, 8))),
        num_inference_steps=3,
        height=32,
        width=32,
        use_resolution_binning=False,
        output_type="np",
    ).images.transpose(0, 3, 1, 2)
    with np.load(tmp_path / "o.npz") as file:
        assert 10 * np.log10(1 / np.mean((file["samples"] - theirs) ** 2)) >= 50


def test_several_prompts_make_a_sheet_or_an_animation(bundle: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", "a red house", "--prompt", "the sea", "--prompt", ""]
    for name in ("sheet.png", "moving.gif", "moving.webp"):
        assert lehr("run", bundle, *prompts, "-o", tmp_path / name) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 32 + 2 * 2, 32)
        first = np.asarray(sheet)[:, :32]
    for name in ("moving.gif", "moving.webp"):
        with Image.open(tmp_path / name) as moving:
            assert moving.n_frames == 3
    with Image.open(tmp_path / "moving.webp") as moving:
        assert np.array_equal(np.asarray(moving.convert("RGB")), first)


def test_a_picture_is_the_same_with_little_memory_and_alone(bundle: Path, tmp_path: Path) -> None:
    asked = ["--prompt", PROMPT, "--seed", "4"]
    drawn = {}
    for name, options in {"many": ["--num", 3], "one": [], "sparing": ["--low-memory"]}.items():
        assert lehr("run", bundle, *asked, *options, "-o", tmp_path / f"{name}.npz") == 0
        with np.load(tmp_path / f"{name}.npz") as file:
            drawn[name] = file["samples"][0]
    assert np.allclose(drawn["one"], drawn["many"], atol=1e-5)
    assert np.allclose(drawn["one"], drawn["sparing"], atol=1e-5)


def test_sizes_and_a_picture_to_start_from_are_taken(bundle: Path, tmp_path: Path) -> None:
    assert lehr("run", bundle, "--prompt", PROMPT, "--height", 24, "--width", 48, "-o", tmp_path / "a.png") == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (48, 24)
    options = ["--init", tmp_path / "a.png", "--strength", 0.7]
    assert lehr("run", bundle, "--prompt", PROMPT, *options, "-o", tmp_path / "b.png") == 0
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size == (48, 24)
    resized = [*options, "--height", 32, "--width", 32]
    assert lehr("run", bundle, "--prompt", PROMPT, *resized, "-o", tmp_path / "c.png") == 0
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size == (32, 32)


def test_a_prompt_that_is_cut_is_warned_about(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert lehr("run", bundle, "--prompt", "cat " * 130, "-o", tmp_path / "a.png", "--json") == 0
    out, err = capsys.readouterr()
    warnings = json.loads(out)["warnings"]
    assert len(warnings) == 1
    assert "longer than 120 tokens" in warnings[0]
    assert f"warning: {warnings[0]}" in err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 2, "needs a prompt"),
        (["--prompt", "a", "--height", 30], 2, "nearest: 24 or 32"),
        (["--prompt", "a", "--class-label", 1], 2, "in words"),
        (["--prompt", "a", "--stage-recipe", "vae_decoder"], 2, "NAME=RECIPE"),
        (["--prompt", "a", "--stage-recipe", "vae=fp32"], 2, "vae_decoder"),
        (["--prompt", "a", "--stage-recipe", "vae_decoder=fp16"], 5, "lehr build"),
        (["--prompt", "a", "--whole-loop"], 2, "a denoiser alone"),
        (["--prompt", "a", "--true-guidance-scale", 2], 2, "not told its guidance scale"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], code: int, said: str
) -> None:
    assert lehr("run", bundle, *options, "-o", tmp_path / "a.png") == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_options_of_pipelines_are_refused_for_a_denoiser_alone(
    dit_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--prompt", "three"], ["--height", 28], ["--low-memory"], ["--tile", 0]):
        assert lehr("run", dit_bundle, *options, "-o", tmp_path / "a.png") == 2
        assert f"{options[0]} needs a bundle of a whole pipeline" in " ".join(capsys.readouterr().err.split())
    assert lehr("run", dit_bundle, "--class-label", "three", "-o", tmp_path / "a.png") == 2
    with pytest.raises(BundleError, match="a denoiser and no pipeline around it"):
        TextToImage.open(dit_bundle)
