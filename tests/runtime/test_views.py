"""Cameras of 3-D samples: where they stand, and what they see where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.errors import InvalidInput
from lehr.runtime.views import DISTANCE, STEEPEST, View, around, camera


def seen(view: View, point: list[float]) -> tuple[float, float, float]:
    """Column, row and depth of a point in a picture of 100 x 80 pixels."""
    told = camera(view, 80, 100)
    x, y, z, _ = told["world_to_camera"][0] @ [*point, 1.0]
    fx, fy, cx, cy = told["intrinsics"][0]
    return fx * x / z + cx, fy * y / z + cy, z


@given(azimuth=st.floats(-720, 720), elevation=st.floats(-STEEPEST, STEEPEST))
def test_every_camera_looks_at_the_origin_from_the_same_distance_upright(azimuth: float, elevation: float) -> None:
    view = View(azimuth=azimuth, elevation=elevation)
    np.testing.assert_allclose(seen(view, [0, 0, 0]), (50, 40, DISTANCE), atol=1e-3)
    column, row, _ = seen(view, [0, 0.5, 0])
    assert column == pytest.approx(50, abs=1e-2)
    assert row < 40  # up is up
    turn = camera(view, 80, 100)["world_to_camera"][0, :3, :3]
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-5)


def test_azimuth_turns_from_the_front_to_the_right_and_elevation_lifts() -> None:
    np.testing.assert_allclose(View(azimuth=0, elevation=0).eye, [0, 0, DISTANCE], atol=1e-9)
    np.testing.assert_allclose(View(azimuth=90, elevation=0).eye, [DISTANCE, 0, 0], atol=1e-9)
    assert View.parse("30,25").eye[1] > 0
    assert seen(View(azimuth=0, elevation=0), [0.5, 0, 0])[0] > 50
    assert [view.azimuth for view in around(4)] == [0, 90, 180, 270]


@pytest.mark.parametrize("text", ["", "30", "a,b", "0,90", "inf,0", "1,2,3"])
def test_what_is_no_view_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        View.parse(text)
