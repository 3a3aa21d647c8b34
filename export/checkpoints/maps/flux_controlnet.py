"""ControlNets of FLUX.1: diffusers' ``FluxControlNetModel``."""

from __future__ import annotations

from lehr.export.checkpoints.maps import flux
from lehr.export.checkpoints.rules import Rule

DIFFUSERS = tuple(Rule(f"flux.{rule.ours}", rule.theirs, rule.transform) for rule in flux.DIFFUSERS)
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("controlnet_x_embedder.weight",)
READS = ("`FluxControlNetModel` folder",)  # beside our own layout
