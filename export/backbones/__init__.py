"""Backbones, one file a family. A new file with a ``PRESETS`` dictionary is found here by its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from lehr.export.backbones.preset import Preset
from lehr.runtime.errors import UnknownName

__all__ = ["Preset", "families", "preset", "presets"]

_NOT_A_FAMILY = {"preset"}


@cache
def families() -> tuple[str, ...]:
    """Names of the family modules, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_") and name not in _NOT_A_FAMILY))


@cache
def presets() -> dict[str, Preset]:
    """Every family's presets by name."""
    found: dict[str, Preset] = {}
    for family in families():
        found |= importlib.import_module(f"{__name__}.{family}").PRESETS
    return found


def preset(name: str) -> Preset:
    """The preset called ``name``; raises UnknownName with the closest match."""
    if name not in presets():
        raise UnknownName("preset", name, presets())
    return presets()[name]
