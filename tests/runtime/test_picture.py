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
