"""Stages that a denoiser brings itself, because nothing in them is trained: the renderer of 3-D Gaussians."""

from __future__ import annotations

from lehr.export.backbones import _splat_renderer
from lehr.export.backbones._splat_renderer import CHANNELS, RenderParams, SplatRenderer
from lehr.export.source import Source
from lehr.export.stages import StageSource
from lehr.export.weights import TorchModuleSource

PICTURE = RenderParams(height=64, width=64)
GOLDEN_GAUSSIANS = 1024  # at most: each meets every pixel, at eight bytes and some copies


def own_stages(denoiser: Source) -> tuple[StageSource, ...]:
    """What decodes the denoiser's samples without weights; nothing for families whose samples are decoded otherwise.

    The renderer comes with every model of family ``gaussian_dit`` whose samples are (batch, gaussians, 14): presets,
    weights files and a user's own.
    """
    spec = denoiser.spec
    shape = spec.sample.shape
    if spec.family != "gaussian_dit" or shape[1:] != ("gaussians", CHANNELS):
        return ()
    usual = spec.dim("gaussians").default
    module = SplatRenderer(PICTURE)
    return (
        StageSource(
            spec=_splat_renderer.stage_spec(PICTURE, gaussians=usual),
            module=module,
            weights=None if denoiser.weights is None else TorchModuleSource(module),
            origin="no weights",
            feeds=_splat_renderer.example_feeds(PICTURE, gaussians=min(usual, GOLDEN_GAUSSIANS)),
        ),
    )
