"""The builders: one an engine library, found by the library's name.

A builder is a module or an object that offers what :class:`Library` says, and ``build`` (:class:`Builder`) if its
engines are for this machine, or ``build_for`` (:class:`TargetBuilder`) if they are for a target that may be elsewhere.
It imports its library when it builds, so what a library can execute is known where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy.typing as npt

from lehr.engines.ranges import InputRange
from lehr.engines.target import Target
from lehr.runtime.backends import backends
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, InvalidInput, MissingExtra, UnknownName
from lehr.runtime.recipe import Format, Recipe

# Library -> module, and the object in it unless the module is the builder itself.
_BUILDERS = {
    "onnxruntime": ("lehr.engines.onnxruntime_cpu", ""),
    "openvino": ("lehr.engines.openvino_cpu", ""),
    "tensorrt": ("lehr.engines.tensorrt_family", "TENSORRT"),
    "tensorrt_rtx": ("lehr.engines.tensorrt_family", "TENSORRT_RTX"),
}


class Library(Protocol):
    """What every builder offers.

    Attributes:
        FORMATS: arithmetic that the library executes.
        LOWERED: those of them that it executes only where the graph says so: the graph is converted beforehand.
        REFUSES: why it does not execute another format, where there is more to say than that.
    """

    FORMATS: frozenset[Format]
    LOWERED: frozenset[Format]
    REFUSES: Mapping[Format, str]

    def version(self) -> str:
        """The installed library's version; raises MissingExtra or BuildFailed, which say what is missing."""


class Builder(Library, Protocol):
    """Builds for the machine it runs on."""

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


@runtime_checkable
class TargetBuilder(Library, Protocol):
    """Builds for a target, whose engines need not run on this machine."""

    def build_for(
        self,
        graph: Path,
        folder: Path,
        *,
        name: str,
        recipe: Recipe,
        target: Target,
        ranges: Mapping[str, InputRange],
        threads: int,
        progress: Callable[[str], None],
    ) -> Plan:
        """Compile ``graph`` for ``target`` into ``folder``.

        Args:
            graph: in the recipe's format, its external weights beside it.
            folder: holds the engine's plans; files are named after ``name``.
            name: of the graph, such as "step".
            recipe: one whose arithmetic is in ``FORMATS``.
            target: decides the compute capabilities and the operator set.
            ranges: sizes of every input that the engine must take.
            threads: of the build; 0 is the library's choice.
            progress: takes a line of text now and then.

        Raises:
            MissingExtra: the library is not installed.
            IncompatibleEngine: it builds only on the target itself, and this machine is none.
            BuildFailed: the library refuses the graph, crashes, or is killed; with the node, the operator and a hint
                where it names them.
        """


def builder(library: str) -> Builder | TargetBuilder:
    """The builder for an engine library; raises UnknownName if there is none."""
    if library not in _BUILDERS:
        raise UnknownName("builder for engine library", library, _BUILDERS)
    module, name = _BUILDERS[library]
    found = importlib.import_module(module)
    return cast("Builder | TargetBuilder", getattr(found, name) if name else found)


def fitting(target: Target, recipe: Recipe) -> tuple[str, ...]:
    """The engine libraries of a target that execute the recipe's arithmetic, installed or not, best first."""
    if recipe.arithmetic not in target.formats:
        return ()
    return tuple(name for name in target.libraries if recipe.arithmetic in builder(name).FORMATS)


def installed(library: str) -> bool:
    """Whether a builder's library is installed here and loads."""
    try:
        builder(library).version()
    except (MissingExtra, BuildFailed):
        return False
    return True


def buildable(target: Target, system: str, machine: str) -> tuple[str, ...]:
    """The libraries with which an engine for ``target`` can be built on this machine, best first.

    ``system`` and ``machine`` are this one's, as ``sys.platform`` and ``platform.machine()`` say it.
    """
    if system not in target.os or machine not in target.arch:
        return ()
    return tuple(name for name in target.libraries if _found(name))


def _found(library: str) -> bool:
    """Whether a library's module is there, without loading it."""
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:  # in sys.modules without a specification
        return False


def candidates(target: Target, recipe: Recipe, library: str = "auto") -> tuple[str, ...]:
    """The engine libraries that can build ``recipe`` for ``target``, best first: one, if ``library`` names it.

    "auto" leaves out libraries that are not installed, unless none is: the first is returned then, and building
    with it raises MissingExtra with the pip line.

    Raises:
        UnknownName: the target has no such library.
        InvalidInput: Lehr has no builder for the target; or the library, or every one of the target, lacks the format;
            the message has the nearest choice.
    """
    if not target.libraries:
        raise InvalidInput(
            f"Lehr has no builder for target {target.name!r} yet. lehr list targets says which targets it builds for."
        )
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
    found = tuple(name for name in able if installed(name)) or able[:1]
    # Engines are measured against each other by running them: one that cannot run here cannot be chosen that way.
    return found if set(found) <= set(backends()) else found[:1]


def _formats(target: Target) -> str:
    can = frozenset[Format]().union(*(builder(name).FORMATS for name in target.libraries)) & set(target.formats)
    return ", ".join(sorted(form.value for form in can))
