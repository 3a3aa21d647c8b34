"""Pictures and sample files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lehr.runtime import picture
from lehr.runtime.errors import InvalidInput


def test_values_map_to_bytes_and_are_clipped_to_the_range():
    samples = np.array([-3.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    assert picture.to_bytes(samples, (-1.0, 1.0)).ravel().tolist() == [0, 0, 128, 255]


def test_a_grid_holds_every_picture_in_reading_order(tmp_path):
    pictures = np.stack([np.full((4, 4, 1), k * 10, np.uint8) for k in range(5)])
    sheet = picture.grid(pictures, columns=3, zoom=2)
    assert sheet.shape == (2 * 10, 2 * 16, 1)
    assert [int(sheet[0, 12 * k, 0]) for k in range(3)] == [0, 10, 20]
    assert int(sheet[12, 0, 0]) == 30
    picture.save_png(tmp_path / "a.png", sheet)
    with Image.open(tmp_path / "a.png") as saved:
        assert np.array_equal(np.asarray(saved), sheet[..., 0])


def test_sample_files_hold_float32_under_samples(tmp_path):
    picture.save_npz(tmp_path / "a.npz", np.ones((2, 3, 4, 4), np.float32))
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["samples"].dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_latents_are_no_picture():
    with pytest.raises(InvalidInput, match="npz"):
        picture.to_bytes(np.zeros((1, 4, 8, 8)), (-1.0, 1.0))


@pytest.mark.parametrize(("name", "says"), [("a.jpg", "must end in"), ("no/a.png", "does not exist")])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, says):
    with pytest.raises(InvalidInput, match=says):
        picture.check_output(tmp_path / name, (".png", ".npz"))


@pytest.mark.parametrize("suffix", ["gif", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_shows_every_picture_in_turn(tmp_path, suffix, channels):
    pictures = np.stack([np.full((8, 6, channels), 60 * k, np.uint8) for k in range(4)])
    path = tmp_path / f"a.{suffix}"
    picture.save_animation(path, pictures, milliseconds=200)
    with Image.open(path) as saved:
        assert (saved.n_frames, saved.size) == (4, (6, 8))
        for k in range(4):
            saved.seek(k)
            assert np.array_equal(np.asarray(saved.convert("RGB"))[0, 0], [60 * k] * 3)
            assert saved.info["duration"] == 200
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_picture_is_resized_where_a_size_is_named(tmp_path):
    picture.save_png(tmp_path / "a.png", np.full((8, 8, 3), 255, np.uint8))
    assert picture.load(tmp_path / "a.png", 3, (0.0, 1.0), height=4).shape == (3, 4, 8)
    assert picture.load(tmp_path / "a.png", 1, (0.0, 1.0), height=16, width=12).min() == 1.0
