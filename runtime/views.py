"""Pictures of a 3-D sample from viewpoints, drawn by the renderer that stands in its bundle as the decoder.

The object stands about the origin and fills about the unit ball; y is up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.stage import StageSpec
from lehr.runtime.stages import StageFunction

Array = npt.NDArray[Any]

RENDERER = "splat_renderer"  # family of the stage
CAMERA = ("world_to_camera", "intrinsics")  # its inputs behind the sample
DISTANCE = 3.0  # of the camera from the origin
FOCAL = 1.3  # focal length in sides of the picture: the unit ball fills nine tenths of it
STEEPEST = 89.0  # degrees; straight from above nothing says which way the picture is turned


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where the camera stands, in degrees: ``azimuth`` from the z axis towards x, ``elevation`` above the ground."""

    azimuth: float
    elevation: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.azimuth) or not -STEEPEST <= self.elevation <= STEEPEST:
            raise InvalidInput(
                f"a view needs a finite azimuth and an elevation from {-STEEPEST:g} to {STEEPEST:g} degrees, got "
                f"{self.azimuth:g},{self.elevation:g}."
            )

    @classmethod
    def parse(cls, text: str) -> View:
        """Read ``AZIMUTH,ELEVATION``; raises InvalidInput."""
        azimuth, _, elevation = text.partition(",")
        try:
            numbers = float(azimuth), float(elevation)
        except ValueError as e:
            raise InvalidInput(f"view {text!r} cannot be read, expected AZIMUTH,ELEVATION, such as 30,25.") from e
        return cls(azimuth=numbers[0], elevation=numbers[1])

    @property
    def eye(self) -> npt.NDArray[np.float64]:
        """The camera's place, (3,)."""
        around, up = math.radians(self.azimuth), math.radians(self.elevation)
        way = [math.sin(around) * math.cos(up), math.sin(up), math.cos(around) * math.cos(up)]
        return DISTANCE * np.array(way)


def around(count: int, *, elevation: float = 25.0) -> tuple[View, ...]:
    """``count`` views evenly around the object."""
    return tuple(View(azimuth=360.0 * k / count, elevation=elevation) for k in range(count))


def look_at(eye: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The pose (4, 4) of a camera at ``eye`` that looks at ``target``, upright: world y is up."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right = right / np.linalg.norm(right)
    turn = np.stack([right, np.cross(forward, right), forward])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, -turn @ eye
    return pose.astype(np.float32)


def camera(view: View, height: int, width: int) -> dict[str, npt.NDArray[np.float32]]:
    """What a renderer of pictures of ``height`` x ``width`` pixels is told of one view, one row."""
    focal = FOCAL * max(height, width)
    pose, inner = CAMERA
    return {
        pose: look_at(view.eye, np.zeros(3))[None],
        inner: np.array([[focal, focal, width / 2, height / 2]], np.float32),
    }


def renders(stage: StageSpec) -> bool:
    """Whether a stage draws samples from viewpoints."""
    return stage.family == RENDERER and tuple(tensor.name for tensor in stage.inputs[1:]) == CAMERA


def draw_views(renderer: StageFunction, samples: Array, views: Sequence[View]) -> npt.NDArray[np.float32]:
    """Every sample from every view: (N, …) -> (N, views, 3, H, W) in [-1, 1].

    One picture at a time: the renderer compares all Gaussians with all pixels, so a batch would take much memory.

    Raises:
        InvalidInput: samples of another shape than the renderer takes.
        RunFailed: the renderer failed, or drew values that are not finite.
    """
    first, drawn = renderer.spec.inputs[0], renderer.spec.outputs[0]
    height, width = drawn.sizes(renderer.spec.default_sizes())[-2:]
    pictures = [
        renderer({first.name: samples[k : k + 1], **camera(view, height, width)})[drawn.name]
        for k in range(len(samples))
        for view in views
    ]
    found = np.concatenate(pictures).reshape(len(samples), len(views), *pictures[0].shape[1:])
    if not np.all(np.isfinite(found)):
        raise RunFailed(
            f"stage {renderer.spec.name!r} drew values that are not finite; its recipe overflows on these samples. "
            f"Use fp32 for it (--stage-recipe {renderer.spec.name}=fp32)."
        )
    return found.astype(np.float32)
