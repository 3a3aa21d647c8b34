"""Engine libraries, one file each, imported when an engine of theirs is loaded.

Libraries that bring more with them than the runtime may import, PyTorch for one, are plugged in by other packages
through entry points of the group ``lehr.backends``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from lehr.runtime.backends.base import Backend, Session
from lehr.runtime.errors import MissingExtra, UnknownName

__all__ = ["GROUP", "Backend", "Session", "backend", "backends", "drives", "plugged_in"]

GROUP = "lehr.backends"
_MODULES = {"onnxruntime-tensorrt": "onnxruntime_tensorrt"}  # libraries whose name is no module's


@cache
def plugged_in(group: str) -> Mapping[str, EntryPoint]:
    """Entry points of a group by name; looking for them reads every installed package's metadata."""
    return {point.name: point for point in entry_points(group=group)}


def _own() -> frozenset[str]:
    names = {module: name for name, module in _MODULES.items()}
    return frozenset(names.get(module.name, module.name) for module in pkgutil.iter_modules(__path__)) - {"base"}


def backends() -> tuple[str, ...]:
    """Names of the engine libraries the runtime can drive, installed or not."""
    return tuple(sorted(_own() | set(plugged_in(GROUP))))


def drives(name: str) -> bool:
    """Whether the runtime has a backend of that name."""
    return name in _own() or name in plugged_in(GROUP)


def backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        UnknownName: there is none of that name.
        MissingExtra: its library is not installed.
    """
    if name in _own():
        loaded: Backend = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}").BACKEND
        return loaded
    if name not in plugged_in(GROUP):
        raise UnknownName("engine library", name, backends())
    try:
        plugged: Backend = plugged_in(GROUP)[name].load()
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or name, "export") from e
    return plugged
