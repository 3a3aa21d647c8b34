"""Families of pipelines, one file each: what their text encoders feed, how their latents are packed.

A new file with a ``FAMILY`` is found by its name, which is :attr:`lehr.runtime.pipeline_spec.PipelineSpec.family`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from lehr.runtime.errors import UnknownName
from lehr.runtime.pipeline_spec import PipelineSpec
from lehr.runtime.spec import ModelSpec

if TYPE_CHECKING:
    from lehr.runtime.pipelines.family import Family

__all__ = ["families", "family_of"]

_SHARED = {"caption", "family", "flow_schedule", "text"}


def families() -> tuple[str, ...]:
    """The families that can be drawn with, by name."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED))


def family_of(spec: PipelineSpec, model: ModelSpec) -> Family:
    """The conventions of a pipeline; raises UnknownName with the closest match."""
    if spec.family not in families():
        raise UnknownName("pipeline family", spec.family, families())
    kind: type[Family] = importlib.import_module(f"{__name__}.{spec.family}").FAMILY
    return kind(spec, model)
