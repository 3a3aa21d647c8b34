"""Stable Video Diffusion: our names are those of diffusers' ``UNetSpatioTemporalConditionModel``."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

DIFFUSERS: tuple[Rule, ...] = ()
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("add_embedding.linear_1.weight", "mid_block.resnets.0.temporal_res_block.conv1.weight")
READS = ("`UNetSpatioTemporalConditionModel` folder",)  # beside our own layout
