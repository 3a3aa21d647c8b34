"""From PyTorch to a verified bundle of portable graphs: torch lives here, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lehr.export.drop_in import as_diffusers

__all__ = ["as_diffusers"]


def __getattr__(name: str) -> Any:
    """``as_diffusers``, imported when it is asked for: it brings PyTorch and diffusers.

    Raises:
        AttributeError: another name.
        MissingExtra: diffusers is not installed.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lehr.export import drop_in
    except ModuleNotFoundError as e:
        from lehr.runtime.errors import MissingExtra

        raise MissingExtra(e.name or "diffusers", "diffusers") from e
    return getattr(drop_in, name)
