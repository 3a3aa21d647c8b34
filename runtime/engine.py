"""Engines on disk: finding one, and the checks before it is loaded. What a build recorded is in ``engine_record``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lehr.runtime.backends import Session, backend, drives
from lehr.runtime.backends.base import DeviceSession
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine_record import (
    STEP,
    EngineRecord,
    Plan,
    damaged,
    engine_folder,
    engine_folders,
    engines_of,
)
from lehr.runtime.errors import BundleError, IncompatibleEngine, MissingExtra
from lehr.runtime.gpu_engine import gpu_difference, version_difference
from lehr.runtime.host import host
from lehr.runtime.lora import DENOISER, Applied
from lehr.runtime.lora_engine import with_loras
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.precision_schedule import graph_of
from lehr.runtime.refit import FILES
from lehr.runtime.spec import GraphSpec

__all__ = [
    "STEP",
    "EngineRecord",
    "Plan",
    "check",
    "differences",
    "engine_folder",
    "engine_folders",
    "engines",
    "find",
    "load",
    "rebuild_command",
    "rebuild_words",
]


def engines(bundle: Bundle, stage: str | None = None) -> list[EngineRecord]:
    """Every engine of the denoiser in the bundle, or of one of its stages."""
    folders = [name.rpartition("/")[0] for name in bundle.names(engines_of(stage)) if name.endswith("/build.json")]
    return [_read(bundle, folder, stage) for folder in folders]


def _read(bundle: Bundle, folder: str, stage: str | None) -> EngineRecord:
    record = EngineRecord.from_json(bundle.read_json(f"{folder}/build.json"))
    if record.stage != stage:
        raise damaged(f"it stands in {folder} and is of {record.stage or 'the denoiser'}")
    return record


def find(bundle: Bundle, target: str, recipe: str, stage: str | None = None) -> EngineRecord:
    """The engine for ``target`` and ``recipe``; of several libraries or versions, one that fits this machine.

    Raises:
        BundleError: there is none; the message has the command that builds it.
    """
    folders = engine_folders(bundle, target, recipe, stage)
    if not folders:
        have = ", ".join(f"{r.target} {r.recipe}" for r in engines(bundle, stage)) or "none"
        whose = bundle.root.name if stage is None else f"stage {stage!r} of {bundle.root.name}"
        raise BundleError(
            f"{whose} has no {recipe} engine for target {target!r} (engines: {have}). "
            f"Build it: {rebuild_command(bundle, target, recipe, stage)}"
        )
    found = [_read(bundle, folder, stage) for folder in folders]
    return next((record for record in reversed(found) if _fits(bundle, record)), found[-1])


def load(bundle: Bundle, record: EngineRecord, graph: str = STEP, *, loras: Sequence[Applied] = ()) -> Session:
    """Load one graph of an engine, with LoRAs in its weights; raises what :func:`check` does.

    Raises:
        IncompatibleEngine: an engine that cannot take LoRAs once it is built.
        InvalidInput: LoRAs of another model.
    """
    check(bundle, record, graph)
    plan = record.plans[graph]
    options, path = _located(bundle, record, plan.options), bundle.path(f"{record.folder}/{plan.file}")
    if loras:
        options = _adapted(bundle, record, graph, options, path, loras)
    session = backend(record.library).load(path, options)
    if isinstance(session, DeviceSession):
        session.check_signature(_signature(bundle, record, graph))
    return session


def _signature(bundle: Bundle, record: EngineRecord, graph: str) -> GraphSpec:
    return _entry(bundle, record, graph).signature


def _entry(bundle: Bundle, record: EngineRecord, graph: str) -> GraphEntry:
    """The portable graph of a plan."""
    if record.stage is not None:
        return bundle.manifest.stage(record.stage).graph
    return bundle.manifest.graphs[graph_of(graph)]


def _adapted(
    bundle: Bundle,
    record: EngineRecord,
    graph: str,
    options: Mapping[str, Any],
    plan: Path,
    loras: Sequence[Applied],
) -> Mapping[str, Any]:
    """Options of a plan that computes with LoRAs."""
    entry = _entry(bundle, record, graph)
    if entry.weights is None:
        raise IncompatibleEngine(f"{bundle.root.name} holds a structure without weights, which LoRAs would change.")
    return with_loras(
        options,
        loras,
        record.stage or DENOISER,
        library=record.library,
        graph=bundle.path(entry.file),
        plan=plan,
        weights=bundle.path(entry.weights),
        rebuild=rebuild_command(bundle, record.target, record.recipe),
    )


def _located(bundle: Bundle, record: EngineRecord, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options of a plan without weights with the paths of the files that hold them."""
    sources = options.get("refit")
    if sources is None:
        return options
    if not isinstance(sources, dict) or not isinstance(sources.get("weights"), str):
        raise damaged("a plan without weights does not say where they are")
    files = {"stored": bundle.path(sources["weights"])}
    if beside := sources.get("beside"):
        files["beside"] = bundle.path(f"{record.folder}/{beside}")
    return {**options, "refit": {**sources, FILES: files}}


def check(bundle: Bundle, record: EngineRecord, graph: str = STEP) -> None:
    """Refuse an engine that must not be loaded here.

    Raises:
        IncompatibleEngine: it was built on another kind of machine, by another library version, or from other
            graphs or weights than the bundle now holds.
        BundleError: its files are damaged, or it has no such graph.
        MissingExtra: the engine library is not installed.
    """
    if not drives(record.library):
        raise IncompatibleEngine(
            f"{record.folder} is an engine of {record.library}, which Lehr builds but has no runtime backend for yet. "
            f"Build and run one that it has: lehr build {bundle.root.name} --target cpu"
        )
    wrong = differences(bundle, record)
    command = rebuild_command(bundle, record.target, record.recipe, record.stage)
    if wrong:
        raise IncompatibleEngine(f"{record.folder} does not fit: {'; '.join(wrong)}. Rebuild it here: {command}")
    if graph not in record.plans:
        raise BundleError(
            f"{record.folder} has no graph {graph!r} (it has {', '.join(record.plans)}). Build it again: {command}"
        )
    for name in bundle.names(record.folder + "/"):
        bundle.path(name)  # external weights of the plan are read by the library, so their hashes are checked here


def differences(bundle: Bundle, record: EngineRecord) -> list[str]:
    """Why the engine must not be loaded here; empty if it may."""
    here = host()
    wrong = [
        f"{key} is {here.get(key)} here and {value} where it was built"
        for key, value in record.host.items()
        if here.get(key) != value
    ]
    if not drives(record.library):
        wrong.append(f"Lehr has no runtime backend for {record.library} yet")
    else:
        options, version = record.plans[STEP].options, backend(record.library).version()
        found = (
            version_difference(record.library, record.library_version, version, options),
            gpu_difference(record.library, options),
        )
        wrong += [reason for reason in found if reason]
    for name, digest in record.sources.items():
        entry = bundle.manifest.known_files.get(name)
        if entry is None or entry.sha256 != digest:
            wrong.append(f"{name} has changed since it was built")
    return wrong


def _fits(bundle: Bundle, record: EngineRecord) -> bool:
    try:
        return not differences(bundle, record)
    except MissingExtra:
        return False


def rebuild_command(bundle: Bundle, target: str, recipe: str, stage: str | None = None) -> str:
    """The command line that makes this engine again."""
    return " ".join(rebuild_words(bundle, target, recipe, stage))


def rebuild_words(bundle: Bundle, target: str, recipe: str, stage: str | None = None) -> tuple[str, ...]:
    """:func:`rebuild_command` as a list of words."""
    which = ("--recipe", recipe) if stage is None else ("--stage", stage, "--stage-recipe", f"{stage}={recipe}")
    return ("lehr", "build", bundle.root.name, "--target", target, *which)
