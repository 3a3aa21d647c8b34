"""Every failure a user can meet, one root class, subclasses by who must act.

A message has three parts: what happened, what was expected, how to fix it. ``exit_code`` is the command
line's (see ``docs/cli.md``); code that is not a command line catches :class:`LehrError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LehrError(Exception):
    """Root of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 7


class InvalidInput(LehrError):
    """The caller must change an argument, an input file or a weights file."""

    exit_code = 2


class UnknownName(InvalidInput):
    """A name is in no registry; the message lists the known ones and the closest match."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(names) or 'none'}.{hint}")


class UnsupportedScheduler(InvalidInput):
    """A diffusers scheduler, or an option of one, that no solver table can hold; the message names it."""


class ExportFailed(LehrError):
    """PyTorch could not turn the module into a graph, or the graph does not compute what the module does."""

    exit_code = 3


class BuildFailed(LehrError):
    """The engine library could not compile the graph for the target."""

    exit_code = 4


class BundleError(LehrError):
    """The bundle on disk is damaged, incomplete or of another schema."""

    exit_code = 5


class IncompatibleEngine(BundleError):
    """The engine was built for another machine or library version; the message has the rebuild command."""


class MissingExtra(LehrError):
    """An optional dependency is not installed; the message has the pip line."""

    exit_code = 6

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module!r} is not installed and this needs it. Install it with: pip install 'lehr[{extra}]'")


class RunFailed(LehrError):
    """An engine failed, or returned what cannot be right, while running."""
