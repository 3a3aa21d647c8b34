"""SiT: the architecture is DiT's, so are the names, in the authors' files and in diffusers' DiT module."""

from __future__ import annotations

from lehr.export.checkpoints.maps.dit import DIFFUSERS, DIFFUSERS_IGNORED, ORIGINAL, ORIGINAL_IGNORED

__all__ = ["DIFFUSERS", "DIFFUSERS_IGNORED", "ORIGINAL", "ORIGINAL_IGNORED"]
