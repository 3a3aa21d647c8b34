"""Draws 3-D Gaussians as a camera sees them (Kerbl et al. 2023, arXiv:2308.04079): what decodes ``gaussian_dit``.

Each Gaussian is projected to an ellipse on the picture (EWA splatting, Zwicker et al. 2001), the ellipses are sorted
by depth, and each pixel blends them front to back. All Gaussians meet all pixels, without the tiles of a GPU
rasteriser, so it is for small pictures; it is made of plain tensor operations and hence differentiable, exportable,
and the same on every engine.

Channels of a Gaussian: position (3); logarithm of the standard deviations along its axes (3), over ``LOG_SCALE``;
quaternion of its orientation, real part first (4); logit of its opacity (1); colour, -1 … 1 (3). All are of order one
for objects of about unit size.

Shape legend: B batch, N Gaussians, P = H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.runtime.spec import BATCH, Dim, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec
from lehr.runtime.views import CAMERA, RENDERER, look_at

CHANNELS = 14
SPLITS = (3, 3, 4, 1, 3)  # position, log scale, quaternion, opacity, colour
LOG_SCALE = -4.0  # of a channel at 0: standard deviations of 1.8 % of the unit
BLUR = 0.3  # pixels² added to every ellipse, so that none falls between pixels, as in the release
MAX_ALPHA = 0.99
NEAR = 0.05  # what is closer to the camera's plane is not drawn
NAME = "vae_decoder"  # the stage's name is that of any decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderParams:
    """Size of the picture, in pixels, and the grey level behind everything, -1 … 1."""

    height: int = 64
    width: int = 64
    background: float = 1.0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a picture needs height and width of at least 1, got {self.height} x {self.width}")
        if not -1 <= self.background <= 1:
            raise ValueError(f"background {self.background} must be between -1 and 1")


# ------------------------------------------------------------------------------------------------- geometry


def rotation(quaternion: Tensor) -> Tensor:
    """Rotation matrices (…, 3, 3) of quaternions (…, 4) of any length, real part first."""
    w, x, y, z = F.normalize(quaternion, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def project(splats: Tensor, world_to_camera: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre (B, N, 2), covariance (B, N, 3) as xx, xy, yy, both in pixels, and depth (B, N) of each Gaussian.

    The projection is linearised at the centre: covariance = J W S Wᵀ Jᵀ (equation 5 of the paper).
    """
    position, log_scale, quaternion, _, _ = splats.split(SPLITS, dim=-1)
    turn, shift = world_to_camera[:, None, :3, :3], world_to_camera[:, None, :3, 3]  # (B, 1, 3, 3), (B, 1, 3)
    camera = (turn * position.unsqueeze(-2)).sum(-1) + shift  # (B, N, 3)
    x, y, depth = camera.unbind(-1)
    z = torch.where(depth > NEAR, depth, torch.full_like(depth, NEAR))
    fx, fy, cx, cy = (value.unsqueeze(1) for value in intrinsics.unbind(-1))  # each (B, 1)
    centre = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * x / (z * z), zero, fy / z, -fy * y / (z * z)], dim=-1)
    axes = rotation(quaternion) * torch.exp(log_scale + LOG_SCALE).unsqueeze(-2)  # columns: the ellipsoid's axes
    flat = jacobian.unflatten(-1, (2, 3)) @ (turn @ axes)  # (B, N, 2, 3): the ellipse is the shadow of three axes
    first, second = flat.unbind(-2)
    covariance = torch.stack(
        [(first * first).sum(-1) + BLUR, (first * second).sum(-1), (second * second).sum(-1) + BLUR], dim=-1
    )
    return centre, covariance, depth


# ------------------------------------------------------------------------------------------------- renderer


class SplatRenderer(nn.Module):
    """The picture of Gaussians from a viewpoint; it has no weights."""

    def __init__(self, params: RenderParams) -> None:
        super().__init__()
        self.params = params

    def forward(self, latent_sample: Tensor, world_to_camera: Tensor, intrinsics: Tensor) -> Tensor:
        """Draw.

        Args:
            latent_sample: (B, N, 14), one Gaussian a row.
            world_to_camera: (B, 4, 4), the camera's pose; it looks along its z, with x to the right and y down.
            intrinsics: (B, 4), focal lengths fx, fy and centre cx, cy, in pixels.

        Returns:
            (B, 3, H, W), -1 … 1.
        """
        p = self.params
        centre, covariance, depth = project(latent_sample, world_to_camera, intrinsics)
        _, _, _, logit, colour = latent_sample.split(SPLITS, dim=-1)
        opacity = torch.sigmoid(logit) * (depth > NEAR).to(logit.dtype).unsqueeze(-1)
        nearest = torch.argsort(depth, dim=1)
        rows = torch.cat([centre, covariance, opacity, colour.clamp(-1, 1)], dim=-1)  # (B, N, 9)
        rows = rows.gather(1, nearest.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        centre, covariance, opacity, colour = rows.split((2, 3, 1, 3), dim=-1)
        dtype, device = latent_sample.dtype, latent_sample.device
        v, u = torch.arange(p.height, dtype=dtype, device=device), torch.arange(p.width, dtype=dtype, device=device)
        u, v = u + 0.5, v + 0.5  # pixels are known by their middles
        dx = u[None, None, None, :] - centre[:, :, None, 0:1]  # (B, N, 1, W)
        dy = v[None, None, :, None] - centre[:, :, 1:2, None]  # (B, N, H, 1)
        xx, xy, yy = (value[:, :, None, None] for value in covariance.unbind(-1))
        squared = (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / (xx * yy - xy * xy)  # Mahalanobis'
        alpha = (opacity.unsqueeze(-1) * torch.exp(-0.5 * squared)).clamp(max=MAX_ALPHA).flatten(2)  # (B, N, P)
        passed = torch.log1p(-alpha)
        weight = alpha * torch.exp(passed.cumsum(1) - passed)  # what is left of the light that reaches this one
        drawn = colour.mT @ weight  # (B, 3, P)
        rest = torch.exp(passed.sum(1, keepdim=True))
        return (drawn + p.background * rest).unflatten(2, (p.height, p.width))


# ---------------------------------------------------------------------------------------------------- stage


def stage_spec(p: RenderParams, *, gaussians: int) -> StageSpec:
    """The renderer as the stage that decodes a sample."""
    return StageSpec(
        name=NAME,
        kind=StageKind.LATENT_DECODER,
        family=RENDERER,
        inputs=(
            TensorSpec(name="latent_sample", shape=("batch", "gaussians", CHANNELS), varies=Varies.SAMPLE),
            TensorSpec(name=CAMERA[0], shape=("batch", 4, 4), varies=Varies.PROMPT),
            TensorSpec(name=CAMERA[1], shape=("batch", 4), varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="sample", shape=("batch", 3, p.height, p.width), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="gaussians", default=gaussians, max=8 * gaussians)),
    )


def example_feeds(p: RenderParams, *, gaussians: int) -> Callable[[int], dict[str, npt.NDArray[Any]]]:
    """Random Gaussians and viewpoints around them, by seed: golden inputs of the stage."""

    def feeds(seed: int) -> dict[str, npt.NDArray[Any]]:
        rng = np.random.default_rng(seed)
        splats = rng.standard_normal((2, gaussians, CHANNELS)).astype(np.float32)
        splats[..., :3] *= 0.4
        angles = rng.uniform(0, 2 * np.pi, 2)
        eyes = [np.array([3 * np.sin(angle), 1.0, 3 * np.cos(angle)]) for angle in angles]
        focal = 1.2 * max(p.height, p.width)
        return {
            "latent_sample": splats,
            "world_to_camera": np.stack([look_at(eye, np.zeros(3)) for eye in eyes]),
            "intrinsics": np.array([[focal, focal, p.width / 2, p.height / 2]] * 2, np.float32),
        }

    return feeds
