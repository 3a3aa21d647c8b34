"""DDPM U-Nets: our names are diffusers'."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

DIFFUSERS: tuple[Rule, ...] = ()
DIFFUSERS_IGNORED: tuple[str, ...] = ()

DIFFUSERS_OLD = tuple(  # folders written before diffusers renamed its attention layers, google/ddpm-* among them
    Rule(f"{blocks}attentions.{{j}}.{ours}.{{leaf}}", (f"{blocks}attentions.{{j}}.{theirs}.{{leaf}}",))
    for blocks in ("down_blocks.{i}.", "mid_block.", "up_blocks.{i}.")
    for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
)

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("time_embedding.linear_1.weight", "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight")
READS = ("`UNet2DModel` folder",)  # beside our own layout
