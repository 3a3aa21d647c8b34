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
from typing import Protocol, cast, runtime_checkable

from lehr.engines.job import Job
from lehr.engines.settings import DEFAULT, Settings
from lehr.engines.target import Target
from lehr.runtime.backends import backends, plugged_in
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, InvalidInput, MissingExtra, UnknownName
from lehr.runtime.host import gpu_compute_capability
from lehr.runtime.recipe import Format, Recipe

GROUP = "lehr.builders"  # entry points of builders that bring more with them than engines may import
# Library, and its device unless that is the processor -> module, and the object in it unless the module is the builder.
_BUILDERS = {
    "onnxruntime": ("lehr.engines.onnxruntime_cpu", ""),
    "onnxruntime@cuda": ("lehr.engines.onnxruntime_cuda", ""),
    "onnxruntime-tensorrt": ("lehr.engines.onnxruntime_tensorrt", "BUILDER"),
    "openvino": ("lehr.engines.openvino_cpu", ""),
    "openvino@GPU": ("lehr.engines.openvino_devices", "GPU"),
    "openvino@NPU": ("lehr.engines.openvino_devices", "NPU"),
    "tensorrt": ("lehr.engines.tensorrt_family", "TENSORRT"),
    "tensorrt_rtx": ("lehr.engines.tensorrt_family", "TENSORRT_RTX"),
}
_PLUGGED = {"aotinductor": "export"}  # library -> the extra that it comes with

Progress = Callable[[str], None]


class Library(Protocol):
    """What every builder offers.

    Attributes:
        FORMATS: arithmetic that the library executes.
        LOWERED: those of them that it executes only where the graph says so: the graph is converted beforehand.
        REFUSES: why it does not execute another format, where there is more to say than that.
        HEEDS: names of the fields of :class:`lehr.engines.settings.Settings` that it has a use for.
        CACHED: a build takes so much longer than copying its result that results are worth keeping.
    """

    FORMATS: frozenset[Format]
    LOWERED: frozenset[Format]
    REFUSES: Mapping[Format, str]
    HEEDS: frozenset[str]
    CACHED: bool

    def version(self) -> str:
        """The installed library's version; raises MissingExtra or BuildFailed, which say what is missing."""


class Builder(Library, Protocol):
    """Builds for the machine it runs on."""

    def build(self, job: Job, folder: Path) -> Plan:
        """Compile a graph for this machine into ``folder``, which holds the engine's plans.

        Raises:
            MissingExtra: the library is not installed.
            BuildFailed: the library refuses the graph, or falls back to another format without saying so.
        """


@runtime_checkable
class TargetBuilder(Library, Protocol):
    """Builds for a target, whose engines need not run on this machine."""

    def build_for(self, job: Job, folder: Path, progress: Progress) -> Plan:
        """Compile a graph for its target into ``folder``, which holds the engine's plans.

        Args:
            job: what is built.
            folder: gets files named after the job.
            progress: takes a line of text now and then.

        Raises:
            MissingExtra: the library is not installed.
            IncompatibleEngine: it builds only on the target itself, and this machine is none.
            BuildFailed: the library refuses the graph, crashes, or is killed; with the node, the operator and a hint
                where it names them.
        """


def builder(library: str, device: str = "") -> Builder | TargetBuilder:
    """The builder for an engine library and its device; raises UnknownName if there is none."""
    key = f"{library}@{device}" if device else library
    if key in _BUILDERS:
        module, name = _BUILDERS[key]
        found = importlib.import_module(module)
        return cast("Builder | TargetBuilder", getattr(found, name) if name else found)
    plugged = plugged_in(GROUP)
    if key not in plugged:
        if library in _PLUGGED:
            raise MissingExtra(library, _PLUGGED[library])
        raise UnknownName("builder for engine library", key, [*_BUILDERS, *plugged])
    try:
        return cast("Builder | TargetBuilder", plugged[key].load())
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or library, _PLUGGED.get(library, library)) from e


def builder_for(target: Target, library: str) -> Builder | TargetBuilder:
    """The builder with which ``library`` serves a target."""
    return builder(library, target.devices.get(library, ""))


def fitting(target: Target, recipe: Recipe) -> tuple[str, ...]:
    """The engine libraries of a target that execute the recipe's arithmetic, installed or not, best first.

    Those that are tried on request only are left out.
    """
    if target.missing(recipe):
        return ()
    return tuple(name for name in target.libraries if recipe.formats <= builder_for(target, name).FORMATS)


def installed(library: str, device: str = "") -> bool:
    """Whether a builder's library is installed here, with what it needs for the device, and loads."""
    try:
        builder(library, device).version()
    except (MissingExtra, BuildFailed):
        return False
    return True


def buildable(target: Target, system: str, machine: str) -> tuple[str, ...]:
    """The libraries with which an engine for ``target`` can be built on this machine, best first.

    ``system`` and ``machine`` are this one's, as ``sys.platform`` and ``platform.machine()`` say it.
    """
    if system not in target.os or machine not in target.arch:
        return ()
    devices = target.devices
    return tuple(n for n in target.libraries if _found(n) and (n not in devices or installed(n, devices[n])))


def _found(library: str) -> bool:
    """Whether a library's module is there, without loading it; a plugged-in builder knows itself."""
    if library in plugged_in(GROUP) or library == "onnxruntime-tensorrt":  # the second is a part of a module
        return installed(library)
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:  # in sys.modules without a specification
        return False


def candidates(target: Target, recipe: Recipe, library: str = "auto", settings: Settings = DEFAULT) -> tuple[str, ...]:
    """The engine libraries that can build ``recipe`` for ``target``, best first: one, if ``library`` names it.

    "auto" leaves out libraries that are not installed, unless none is: the first is returned then, and building
    with it raises MissingExtra with the pip line. It leaves out, too, what has no use for a setting.

    Raises:
        UnknownName: the target has no such library.
        InvalidInput: Lehr has no builder for the target; or the library, or every one of the target, lacks the format;
            the message has the nearest choice. Or a setting that the library, or every one, has no use for.
    """
    if not target.libraries:
        raise InvalidInput(
            f"Lehr has no builder for target {target.name!r} yet. lehr list targets says which targets it builds for."
        )
    able = fitting(target, recipe)
    if library != "auto":
        known = (*target.libraries, *target.on_request)
        if library not in known:
            raise UnknownName(f"engine library for target {target.name!r}", library, known)
        if not target.missing(recipe) and recipe.formats <= builder_for(target, library).FORMATS:
            return _heeding(target, (library,), settings)
    if not able or library != "auto":
        asked = target.libraries if library == "auto" else (library,)
        why = "; ".join(
            builder_for(target, n).REFUSES.get(recipe.arithmetic, f"{n} has no {_lacking(target, n, recipe)}")
            for n in asked
        )
        able = able or tuple(name for name in _requestable(target, recipe) if name != library)
        way = f"use --library {able[0]}" if able else f"choose a recipe in {_formats(target)}"
        raise InvalidInput(f"recipe {recipe.name!r} cannot be built: {why}; {way}.")
    able = _heeding(target, able, settings)
    found = tuple(name for name in able if installed(name, target.devices.get(name, ""))) or able[:1]
    # Engines are measured against each other by running them: one that cannot run here cannot be chosen that way.
    here = not target.sm or gpu_compute_capability() in target.sm
    return found if here and set(found) <= set(backends()) else found[:1]


def _requestable(target: Target, recipe: Recipe) -> list[str]:
    """The libraries that build the recipe for a target where they are named, of those that are installed."""

    def able(library: str) -> bool:
        try:
            return recipe.arithmetic in builder_for(target, library).FORMATS
        except MissingExtra:
            return False

    return [name for name in target.on_request if recipe.arithmetic in target.formats and able(name)]


def _heeding(target: Target, libraries: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    """Of these libraries those that have a use for every setting; raises InvalidInput if there is none."""
    refused = {name: settings.refused(builder_for(target, name).HEEDS) for name in libraries}
    found = tuple(name for name in libraries if not refused[name])
    if not found:
        why = "; ".join(f"{name} has no use for {', '.join(options)}" for name, options in refused.items())
        raise InvalidInput(f"these settings do not go with target {target.name!r}: {why}. Leave them out.")
    return found


def _lacking(target: Target, library: str, recipe: Recipe) -> str:
    found = recipe.formats - builder_for(target, library).FORMATS or {recipe.arithmetic}
    return ", ".join(sorted(form.value for form in found))


def _formats(target: Target) -> str:
    builders = [builder_for(target, name) for name in target.libraries]
    can = frozenset[Format]().union(*(made.FORMATS for made in builders)) & set(target.formats)
    return ", ".join(sorted(form.value for form in can))
