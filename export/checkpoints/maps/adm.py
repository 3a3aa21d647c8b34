"""ADM: our names are those of the authors' release; diffusers publishes no model of this family."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("input_blocks.0.0.weight", "middle_block.1.qkv.weight")
READS = ("guided-diffusion file",)  # beside our own layout
