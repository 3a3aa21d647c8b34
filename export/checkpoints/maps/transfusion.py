"""Transfusion: nobody else stores one; its own layout alone."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("layers.0.self_attn.q_proj.weight", "patch_head.weight")
READS: tuple[str, ...] = ()
