"""U-ViT: its own layout alone; the release's checkpoints are not read."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("in_blocks.0.attn.qkv.weight", "label_emb.weight")
READS: tuple[str, ...] = ()
