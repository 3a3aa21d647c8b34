"""``lehr run`` with guidance settings and starting samples: pictures in, pictures out, and exit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lehr import cli


def run(bundle: Path, *arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["run", str(bundle), *[str(argument) for argument in arguments]])
    return int(exit_.value.code or 0)


@pytest.fixture
def digit(dit_bundle, tmp_path) -> Path:
    """One drawn digit, as a picture of the model's size."""
    out = tmp_path / "digit.png"
    assert run(dit_bundle, "--class-label", 3, "--steps", 8, "-o", out) == 0
    return out


def test_guidance_settings_change_the_samples(dit_bundle, tmp_path):
    settings = {
        "plain": [],
        "interval": ["--guidance-interval", 0.3, 5],
        "rescale": ["--guidance-rescale", 0.7],
        "apg": ["--guidance-projection", "apg", "--apg-momentum", -0.5, "--apg-norm", 5],
    }
    drawn = {}
    for name, options in settings.items():
        out = tmp_path / f"{name}.npz"
        assert run(dit_bundle, "--class-label", 8, "--steps", 6, "--guidance-scale", 4, *options, "-o", out) == 0
        drawn[name] = np.load(out)["samples"]
    for name in ("interval", "rescale", "apg"):
        assert np.abs(drawn[name] - drawn["plain"]).max() > 0.01


def test_a_masked_picture_keeps_its_known_half(dit_bundle, digit, tmp_path):
    mask = np.zeros((28, 28), np.uint8)
    mask[14:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    options = ["--init", digit, "--mask", tmp_path / "mask.png", "--class-label", 8, "--steps", 8]
    assert run(dit_bundle, *options, "-o", out) == 0
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (digit, out))
    assert np.abs(before[:14] - after[:14]).max() <= 1
    assert np.abs(before[14:] - after[14:]).max() > 30


@pytest.mark.parametrize(
    "options",
    [
        ["--init", "digit.png", "--strength", 0],
        ["--init", "digit.png", "--strength", 1.5],
        ["--strength", 0.5],
        ["--mask", "digit.png"],
        ["--init", "absent.png"],
        ["--init", "small.npz"],
        ["--init", "digit.png", "--mask", "small.npz"],
        ["--guidance-scale", 2, "--guidance-interval", 5, 1],
        ["--guidance-scale", 2, "--guidance-rescale", 2],
        ["--guidance-scale", 1, "--guidance-rescale", 0.5],
        ["--apg-norm", 2],
        ["--guidance-scale", 2, "--guidance-projection", "apg", "--apg-momentum", 2],
        ["--classifier-scale", 2],
        ["--steps", 0],
        ["--steps", -3],
        ["--sampler", "scheduler"],
        ["--sampler", "heun"],  # not of a flow
        ["--sampler", "euler", "--eta", 0.5],
    ],
)
def test_what_cannot_be_done_exits_with_2(dit_bundle, digit, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "small.npz", samples=np.zeros((1, 1, 7, 7), np.float32))
    steps = [] if "--steps" in options else ["--steps", 4]
    assert run(dit_bundle, *options, *steps, "-o", "out.png") == 2
    assert not (tmp_path / "out.png").exists()
