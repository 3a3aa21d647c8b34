"""ADM: our names are those of the authors' release; diffusers publishes no model of this family."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()
