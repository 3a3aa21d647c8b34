"""NCSN++: our names are diffusers'."""

from __future__ import annotations

from lehr.export.checkpoints.maps import unet
from lehr.export.checkpoints.rules import Rule

DIFFUSERS: tuple[Rule, ...] = ()
DIFFUSERS_IGNORED: tuple[str, ...] = ()
DIFFUSERS_OLD = unet.DIFFUSERS_OLD

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("time_proj.weight", "conv_in.weight")
READS = ("`UNet2DModel` folder with skip blocks",)  # beside our own layout
