"""Ideogram 4: diffusers' ``Ideogram4Transformer2DModel``; queries, keys and values are one matrix here."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

_ATTENTION = "layers.{i}.attention"

DIFFUSERS = (
    Rule(_ATTENTION + ".qkv.{leaf}", tuple(f"{_ATTENTION}.to_{part}.{{leaf}}" for part in "qkv")),
    Rule(_ATTENTION + ".o.{leaf}", (_ATTENTION + ".to_out.0.{leaf}",)),
)
DIFFUSERS_IGNORED = ("llm_cond_norm.{leaf}", "llm_cond_proj.{leaf}")  # stored without use by the unconditional network

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = DIFFUSERS_IGNORED

MARKER = ("layers.0.attention.qkv.weight", "embed_image_indicator.weight")
READS = ("`Ideogram4Transformer2DModel` folder",)  # beside our own layout
