"""The builders: one module an engine library, found by the library's name.

A builder module offers ``FORMATS``, ``REFUSES`` and ``build`` (:class:`Builder`). It imports its library when it
builds, so what a library can execute is known where it is not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy.typing as npt

from lehr.engines.target import Target
from lehr.runtime.backends import backend
from lehr.runtime.engine import Plan
from lehr.runtime.errors import InvalidInput, MissingExtra, UnknownName
from lehr.runtime.recipe import Format, Recipe

_MODULES = {
    "onnxruntime": "lehr.engines.onnxruntime_cpu",
    "openvino": "lehr.engines.openvino_cpu",
}


class Builder(Protocol):
    """What a builder module offers.

    Attributes:
        FORMATS: arithmetic that the library executes.
        REFUSES: why it does not execute another format, where there is more to say than that.
    """

    FORMATS: frozenset[Format]
    REFUSES: Mapping[Format, str]

    def build(
        self,
        graph: Path,
        feeds: Mapping[str, npt.NDArray[Any]],
        folder: Path,
        *,
        name: str,
        recipe: Recipe,
        threads: int,
    ) -> Plan:
        """Compile ``graph`` for this machine into ``folder``.

        Args:
            graph: the portable graph, its external weights beside it.
            feeds: an example of every input, for looking at what the engine executes; sizes may differ later.
            folder: holds the engine's plans; files are named after ``name``.
            name: of the graph, such as "step".
            recipe: one whose arithmetic is in ``FORMATS``.
            threads: worker threads of the engine; 0 is one a core.

        Raises:
            MissingExtra: the library is not installed.
            BuildFailed: the library refuses the graph, or falls back to another format without saying so.
        """


def builder(library: str) -> Builder:
    """The builder for an engine library; raises UnknownName if there is none."""
    if library not in _MODULES:
        raise UnknownName("builder for engine library", library, _MODULES)
    return cast("Builder", importlib.import_module(_MODULES[library]))


def fitting(target: Target, recipe: Recipe) -> tuple[str, ...]:
    """The engine libraries of a target that execute the recipe's arithmetic, installed or not, best first."""
    return tuple(name for name in target.libraries if recipe.arithmetic in builder(name).FORMATS)


def candidates(target: Target, recipe: Recipe, library: str = "auto") -> tuple[str, ...]:
    """The engine libraries that can build ``recipe`` for ``target``, best first: one, if ``library`` names it.

    "auto" leaves out libraries that are not installed, unless none is: the first is returned then, and building
    with it raises MissingExtra with the pip line.

    Raises:
        UnknownName: the target has no such library.
        InvalidInput: the library, or every one of the target, lacks the format; the message has the nearest choice.
    """
    able = fitting(target, recipe)
    if library != "auto":
        if library not in target.libraries:
            raise UnknownName(f"engine library for target {target.name!r}", library, target.libraries)
        if library in able:
            return (library,)
    if not able or library != "auto":
        asked = target.libraries if library == "auto" else (library,)
        why = "; ".join(
            builder(n).REFUSES.get(recipe.arithmetic, f"{n} has no {recipe.arithmetic.value}") for n in asked
        )
        way = f"use --library {able[0]}" if able else f"choose a recipe in {_formats(target)}"
        raise InvalidInput(f"recipe {recipe.name!r} cannot be built: {why}; {way}.")
    return tuple(name for name in able if _installed(name)) or able[:1]


def _formats(target: Target) -> str:
    can = frozenset[Format]().union(*(builder(name).FORMATS for name in target.libraries))
    return ", ".join(sorted(form.value for form in can))


def _installed(library: str) -> bool:
    try:
        backend(library)
    except MissingExtra:
        return False
    return True
