"""SiT: the architecture is DiT's, so are the names, in the authors' files and in diffusers' DiT module."""

from __future__ import annotations

from lehr.export.checkpoints.maps.dit import DIFFUSERS, DIFFUSERS_IGNORED, MARKER, ORIGINAL, ORIGINAL_IGNORED

__all__ = ["DIFFUSERS", "DIFFUSERS_IGNORED", "MARKER", "ORIGINAL", "ORIGINAL_IGNORED", "READS"]

READS = ("SiT file", "`DiTTransformer2DModel` folder with `--preset`")  # beside our own layout
