"""``lehr run`` with samples that are more than a picture: frames of videos, views of 3-D objects, given conditions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lehr import cli
from lehr.export.backbones._splat_renderer import SplatRenderer
from lehr.export.own_stages import PICTURE
from lehr.runtime import picture
from lehr.runtime.bundle import Bundle
from lehr.runtime.views import View, camera

FACTORIES = """
import torch
from lehr.export.backbones import dit, gaussian_dit, spacetime_dit

def _random(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return module

def video():
    p = spacetime_dit.ClassParams(
        picture=dit.Params(in_channels=3, hidden_size=24, depth=1, num_heads=2, num_classes=5, learn_sigma=False),
        patch_frames=2,
    )
    return _random(spacetime_dit.SpaceTimeDiT(p)), spacetime_dit.class_spec("film", p, size=8, frames=4)

def solids():
    p = gaussian_dit.Params(hidden_size=24, depth=1, num_heads=2, context_dim=6)
    return _random(gaussian_dit.GaussianDiT(p)), gaussian_dit.spec("solids", p, gaussians=12, tokens=2)
"""


def lehr(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def built(factory: str, folder: Path) -> Path:
    file, bundle = folder / "factories.py", folder / f"{factory}.lehr"
    file.write_text(FACTORIES)
    assert lehr("export", f"{file}:{factory}", "-o", bundle, "--golden", "steps") == 0
    assert lehr("build", bundle, "--library", "onnxruntime") == 0
    return bundle


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("video", tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module")
def solids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("solids", tmp_path_factory.mktemp("solids"))


@pytest.fixture
def words(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    context = rng.standard_normal((2, 2, 6)).astype(np.float32)
    np.savez(tmp_path / "words.npz", encoder_hidden_states=context, encoder_attention_mask=np.ones((1, 2), np.int32))
    return tmp_path / "words.npz"


# ---------------------------------------------------------------------------------------------------- videos


def test_a_picture_of_videos_has_a_row_of_frames_each(video: Path, tmp_path: Path) -> None:
    drawn = ("--steps", 3, "--class-label", 1, "--class-label", 4)
    assert lehr("run", video, *drawn, "-o", tmp_path / "a.npz") == 0
    assert lehr("run", video, *drawn, "-o", tmp_path / "a.png") == 0
    samples = np.load(tmp_path / "a.npz")["samples"]  # (N, C, T, H, W)
    assert samples.shape == (2, 3, 4, 8, 8)
    with Image.open(tmp_path / "a.png") as saved:
        sheet = np.asarray(saved)
    assert sheet.shape == (2 * 10 - 2, 4 * 10 - 2, 3)
    frames = picture.to_bytes(samples.transpose(0, 2, 1, 3, 4).reshape(8, 3, 8, 8), (-1, 1)).reshape(2, 4, 8, 8, 3)
    for row, column in np.ndindex(2, 4):
        np.testing.assert_array_equal(sheet[10 * row :, 10 * column :][:8, :8], frames[row, column])


def test_a_film_shows_all_videos_side_by_side_at_the_rate_asked_for(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.webp"
    assert lehr("run", video, "--steps", 2, "--num", 2, "--fps", 20, "-o", out) == 0
    with Image.open(out) as saved:
        assert (saved.n_frames, saved.size) == (4, (18, 8))
        saved.seek(1)
        saved.load()
        assert saved.info["duration"] == 50


def test_a_video_has_no_views(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lehr("run", video, "--view", "0,0", "-o", tmp_path / "a.png") == 2
    assert "draws none" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- 3-D samples


def test_an_export_of_gaussians_brings_their_renderer_which_is_built_verified_and_gated(
    solids: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Bundle.open(solids).manifest.stage("vae_decoder")
    assert (entry.spec.family, entry.graph.parameters, entry.golden is not None) == ("splat_renderer", 0, True)
    capsys.readouterr()
    assert lehr("verify", solids, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passed"]
    assert told["stages"]["vae_decoder"]["levels"]["L1"]["passed"]
    capsys.readouterr()
    lehr("gate", solids, "--policy", "smoke", "--json")
    judged = json.loads(capsys.readouterr().out)["checks"]
    of_stage = {check["name"]: check["outcome"] for check in judged if ".vae_decoder" in check["name"]}
    assert of_stage == {"L0.vae_decoder": "pass", "L1.vae_decoder.rel_error": "pass"}


def test_pictures_are_the_eager_renderers_from_the_views_asked_for(solids: Path, words: Path, tmp_path: Path) -> None:
    asked = ("--conditions", words, "--steps", 3)
    views = ("30,25", "-120,-40")
    assert lehr("run", solids, *asked, "-o", tmp_path / "a.npz") == 0
    assert lehr("run", solids, *asked, *(part for v in views for part in ("--view", v)), "-o", tmp_path / "a.png") == 0
    samples = torch.from_numpy(np.load(tmp_path / "a.npz")["samples"])
    assert samples.shape == (2, 12, 14)
    with Image.open(tmp_path / "a.png") as saved:
        sheet = np.asarray(saved)
    side = PICTURE.width
    assert sheet.shape == (2 * side + 2, 2 * side + 2, 3)
    for row, (column, view) in ((r, c) for r in range(2) for c in enumerate(views)):
        inputs = {name: torch.from_numpy(v) for name, v in camera(View.parse(view), side, side).items()}
        expected = SplatRenderer(PICTURE)(samples[row : row + 1], **inputs).numpy()
        got = sheet[row * (side + 2) :, column * (side + 2) :][:side, :side].astype(int)
        assert np.abs(got - picture.to_bytes(expected, (-1, 1))[0].astype(int)).max() <= 1
        assert got.std() > 1


def test_a_film_of_objects_turns_them_around(solids: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gif"
    assert lehr("run", solids, "--conditions", words, "--num", 1, "--steps", 2, "-o", out) == 2  # two rows, one sample
    assert lehr("run", solids, "--conditions", words, "--steps", 2, "-o", out) == 0
    with Image.open(out) as saved:
        assert (saved.n_frames, saved.size) == (24, (2 * PICTURE.width + 2, PICTURE.height))


@pytest.mark.parametrize(
    ("view", "says"), [("30", "AZIMUTH,ELEVATION"), ("0,90", "from -89 to 89"), ("nan,0", "finite azimuth")]
)
def test_views_that_mean_nothing_are_refused(
    view: str, says: str, solids: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lehr("run", solids, "--conditions", words, "--view", view, "-o", tmp_path / "a.png") == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"encoder_hidden_state": np.zeros((1, 2, 6))}, "encoder_hidden_states"),
        ({"encoder_hidden_states": np.zeros((2, 6))}, "expected"),
        ({"encoder_hidden_states": np.zeros((2, 2, 6)), "encoder_attention_mask": np.ones((3, 2))}, "2 rows"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(
    arrays: dict[str, np.ndarray], says: str, solids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "c.npz", **arrays)
    assert lehr("run", solids, "--conditions", tmp_path / "c.npz", "-o", tmp_path / "a.png") == 2
    assert says in capsys.readouterr().err
