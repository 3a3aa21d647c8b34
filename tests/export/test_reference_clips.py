"""What the small video and 3-D models learn from, and the loop that fits them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation
from torch import nn

from lehr.export.backbones import presets
from lehr.export.reference import fitting, splats, splats_solids, video, video_clips
from lehr.export.reference.fitting import Schedule
from lehr.runtime.spec import ModelSpec

MODELS = {**video.MODELS, splats.NAME: (splats.solids, splats.SCHEDULE)}


def middles(clip: np.ndarray) -> np.ndarray:
    """Where the shape is in each frame of (3, T, S, S): (T, 2), columns and rows."""
    bright = clip.max(axis=0) - clip.max(axis=0).min()
    at = np.arange(clip.shape[-1]) + 0.5
    total = bright.sum(axis=(1, 2))
    return np.stack([(bright.sum(axis=1) * at).sum(1) / total, (bright.sum(axis=2) * at).sum(1) / total], axis=1)


# ---------------------------------------------------------------------------------------------------- the clips


@pytest.mark.parametrize(
    ("kind", "axis", "sign"),
    [("disc to the right", 0, 1), ("disc to the left", 0, -1), ("square down", 1, 1), ("square up", 1, -1)],
)
def test_shapes_move_the_way_their_class_says(kind: str, axis: int, sign: int) -> None:
    labels = np.full(4, video_clips.CLASSES.index(kind))
    for clip in video_clips.clips(np.random.default_rng(0), labels, frames=8, size=16):
        steps = np.diff(middles(clip), axis=0)
        assert np.all(sign * steps[:, axis] > 0.4)
        assert np.abs(steps[:, 1 - axis]).max() < 0.05


def test_a_ball_bounces_a_ring_grows_and_a_disc_goes_round() -> None:
    labels = np.array(
        [video_clips.CLASSES.index(kind) for kind in ("bouncing ball", "growing ring", "disc in a circle")]
    )
    ball, ring, disc = video_clips.clips(np.random.default_rng(1), labels, frames=8, size=16)
    height = np.diff(middles(ball)[:, 1])
    assert height.max() > 0.5
    assert height.min() < -0.5
    assert np.all(np.diff((ring.max(axis=0) > 0).sum(axis=(1, 2))) > 0)
    from_middle = np.hypot(*(middles(disc) - 8).T)
    assert from_middle.std() < 0.1 * from_middle.mean()


def test_darts_fly_as_fast_as_motion_and_frame_rate_say() -> None:
    buckets, rates = np.array([16.0, 32.0, 32.0]), np.array([4.0, 4.0, 8.0])
    clips = np.concatenate(
        [
            video_clips.darts(np.random.default_rng(2), bucket, rate, frames=3, size=32)
            for bucket, rate in zip(buckets[:, None], rates[:, None], strict=True)
        ]
    )
    np.testing.assert_array_equal(clips[:, 0], clips[:1, 0].repeat(3, axis=0))
    found = [np.hypot(*np.diff(middles(clip.transpose(1, 0, 2, 3)), axis=0).T).mean() for clip in clips]
    np.testing.assert_allclose(found, buckets / video_clips.BUCKETS_A_PIXEL / rates, atol=0.03)


# --------------------------------------------------------------------------------------------------- the solids


@pytest.mark.parametrize("solid", splats_solids.SOLIDS)
def test_gaussians_lie_flat_on_the_surface(solid: str) -> None:
    found = splats_solids.splats(np.random.default_rng(0), "red", solid, count=200).astype(float)
    places, quaternions = found[:, :3], found[:, 6:10]
    normals = Rotation.from_quat(np.roll(quaternions, -1, axis=1)).apply([0.0, 0.0, 1.0])
    np.testing.assert_allclose(np.linalg.norm(quaternions, axis=1), 1, atol=1e-6)
    assert np.linalg.norm(places, axis=1).max() < 1
    # A step along the normal leaves the surface, so the nearest neighbour's distance along it stays small.
    apart = places[:, None] - places[None]
    near = np.argsort(np.linalg.norm(apart, axis=2), axis=1)[:, 1]
    along = np.abs((apart[np.arange(200), near] * normals).sum(1))
    assert np.median(along) < 0.25 * np.median(np.linalg.norm(apart[np.arange(200), near], axis=1))
    if solid == "sphere":
        np.testing.assert_allclose(np.abs((places * normals).sum(1)), 0.68, atol=1e-6)


def test_words_are_told_apart_and_have_unit_variance() -> None:
    found = splats_solids.words(*splats_solids.WORDS)
    assert len(np.unique(found, axis=0)) == len(splats_solids.WORDS)
    np.testing.assert_allclose((found**2).mean(axis=1), 1)


# ------------------------------------------------------------------------------------------------------ fitting


class Oracle(nn.Module):
    """Returns what the network should return for one known x_0."""

    def __init__(self, spec: ModelSpec, x_0: torch.Tensor) -> None:
        super().__init__()
        self.spec, self.x_0 = spec, x_0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.spec.path.alpha_sigma(timestep.double().numpy())
        on_x, on_f = self.spec.prediction.denoised_coefficients(alpha, sigma)
        c_in = np.asarray(self.spec.prediction.input_scale(alpha, sigma))
        shape = (-1, *(1,) * (x.ndim - 1))
        x_t = x / torch.from_numpy(c_in).reshape(shape)
        return (self.x_0 - torch.from_numpy(np.asarray(on_x)).reshape(shape) * x_t) / torch.from_numpy(
            np.asarray(on_f)
        ).reshape(shape)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_zero_for_the_right_answer_and_only_for_it(name: str) -> None:
    rng, spec = np.random.default_rng(0), presets()[name].spec
    x_0, given = MODELS[name][0](rng, 3)
    assert x_0.shape == spec.sample_shape(3)
    spec.check_feeds(
        {"timestep": np.ones(3, np.float32), spec.sample.name: x_0.numpy()}
        | {key: value.numpy() for key, value in given.items()}
    )
    ratio, eps = torch.tensor([0.1, 1.0, 5.0]).double(), torch.randn(x_0.shape)
    right = fitting.loss(Oracle(spec, x_0), spec, x_0, given, ratio, eps)
    wrong = fitting.loss(Oracle(spec, x_0 + 0.1), spec, x_0, given, ratio, eps)
    assert float(right) < 1e-4
    assert float(wrong) == pytest.approx(0.01 * float((1 + 1 / ratio**2).clamp(max=fitting.HEAVIEST).mean()), rel=0.05)


def test_a_run_that_was_stopped_ends_where_one_at_a_stretch_does(tmp_path: Path) -> None:
    name, schedule = "moving-shapes", Schedule(steps=4, batch=2, learning_rate=1e-3, warmup=2)
    whole = fitting.fit(name, video.shapes, schedule, tmp_path / "a", threads=1, minutes=9)
    half = fitting.fit(name, video.shapes, schedule, tmp_path / "b", threads=1, minutes=9, stop=2)
    rest = fitting.fit(name, video.shapes, schedule, tmp_path / "b", threads=1, minutes=9)
    assert (half["steps"], rest["steps"], whole["steps"]) == (2, 4, 4)
    assert rest["loss"][-1] == whole["loss"][-1]
    one, other = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {value.dtype for value in one.values()} == {torch.float16}
