"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378), after ``LatentConsistencyModelPipeline``.

Stable Diffusion's conditions; the guidance scale is an input of the network, and one evaluation is a guided one.
"""

from __future__ import annotations

from lehr.runtime.pipelines.stable_diffusion import StableDiffusion


class LatentConsistency(StableDiffusion):
    """Told its guidance scale."""

    guidance_scale = 8.5


FAMILY = LatentConsistency
