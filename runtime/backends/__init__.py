"""Engine libraries, one file each, imported when an engine of theirs is loaded."""

from __future__ import annotations

import importlib
import pkgutil

from lehr.runtime.backends.base import Backend, Session
from lehr.runtime.errors import UnknownName

__all__ = ["Backend", "Session", "backend", "backends"]


def backends() -> tuple[str, ...]:
    """Names of the engine libraries the runtime can drive, installed or not."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))


def backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        UnknownName: there is none of that name.
        MissingExtra: its library is not installed.
    """
    if name not in backends():
        raise UnknownName("engine library", name, backends())
    loaded: Backend = importlib.import_module(f"{__name__}.{name}").BACKEND
    return loaded
