"""A preset: one published or shipped configuration of a backbone, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lehr.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """``build(params)`` makes the module that ``spec`` describes."""

    params: Any
    build: Callable[[Any], nn.Module]
    spec: ModelSpec

    def module(self) -> nn.Module:
        """The module with freshly initialised weights (or none, under ``torch.device("meta")``)."""
        return self.build(self.params)
