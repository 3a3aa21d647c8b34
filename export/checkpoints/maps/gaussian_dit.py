"""Gaussian DiT: nobody else stores one; its own layout alone."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("blocks.0.norm_cross.weight", "y_embedder.y_proj.fc1.weight")
READS: tuple[str, ...] = ()
