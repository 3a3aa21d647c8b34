"""Engines on disk: what a build recorded, and the checks before one is loaded."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from lehr.runtime.backends import Session, backend, drives
from lehr.runtime.backends.base import DeviceSession
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.gpu_engine import gpu_difference, version_difference
from lehr.runtime.host import host
from lehr.runtime.lora import DENOISER, Applied
from lehr.runtime.lora_engine import with_loras
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.precision_schedule import Ends, graph_of, plan_of
from lehr.runtime.refit import FILES
from lehr.runtime.spec import GraphSpec
from lehr.runtime.stage import STAGES

RECORD_VERSION = 2
STEP = "step"  # the graph that runs at every step, and gives an engine its precision
# Of a record: engines without a precision schedule lack the first two, those of the denoiser the last.
_OPTIONAL = frozenset({"ends", "end_recipes", "stage"})

_T = TypeVar("_T")

# ------------------------------------------------------------------------------------------------ what is recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One compiled graph, and what the engine library says about it.

    Attributes:
        file: relative to the engine's folder.
        options: what it was built with and is to be loaded with.
        achieved_precision: element type ("float", "bfloat16", "int8", …) -> share of the operators, read from the
            engine itself; empty where only the machine it is for could read it.
        operators: operator -> how often it stands in the engine, fused ones included; empty likewise.
    """

    file: str
    options: Mapping[str, Any]
    achieved_precision: Mapping[str, float]
    operators: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """``build.json`` of one engine.

    Attributes:
        target, recipe, library, library_version: what was asked for and what built it.
        host: the machine it was built on; see :func:`lehr.runtime.host.host`.
        sources: SHA-256 of the portable graphs and weights it was built from, by file.
        plans: of every graph, by its name in the manifest; "step" is always there.
        seconds, peak_rss_mb: what the build took.
        candidates: the libraries that were measured against each other, a row each; empty if there was one.
        ends: of a precision schedule, whose plans are "step.first" and "step.last"; None without.
        end_recipes: their recipes by the end's name.
        stage: that it computes, whose only plan is "step"; None for the denoiser.
    """

    version: int = RECORD_VERSION
    target: str
    recipe: str
    recipe_version: int
    library: str
    library_version: str
    host: Mapping[str, Any]
    sources: Mapping[str, str]
    plans: Mapping[str, Plan]
    seconds: float
    peak_rss_mb: float
    candidates: tuple[Mapping[str, Any], ...] = ()
    ends: Ends | None = None
    end_recipes: Mapping[str, str] = field(default_factory=dict)
    stage: str | None = None

    @property
    def folder(self) -> str:
        """``engines/<target>--<recipe>--<library>-<version>``, of a stage in the stage's folder."""
        return engine_folder(self.target, self.recipe, self.library, self.library_version, self.stage)

    @property
    def achieved_precision(self) -> Mapping[str, float]:
        """Of the step graph: the others compute in fp32 whatever the recipe."""
        return self.plans[STEP].achieved_precision

    @property
    def operators(self) -> Mapping[str, int]:
        """Of the step graph."""
        return self.plans[STEP].operators

    @property
    def recipes(self) -> Mapping[str, str]:
        """Plan of the step graph -> its recipe."""
        return {STEP: self.recipe, **{plan_of(end): recipe for end, recipe in self.end_recipes.items()}}

    def at(self, timestep: float) -> EngineRecord:
        """The engine that computes an evaluation outside of a loop: its plan stands for the step graph's."""
        if self.ends is None:
            return self
        return replace(self, plans={**self.plans, STEP: self.plans[plan_of(self.ends.end_of(timestep))]})

    def to_json(self) -> dict[str, Any]:
        whole = {**asdict(self), "candidates": [dict(row) for row in self.candidates]}
        whole["ends"] = None if self.ends is None else self.ends.to_json()
        return {name: value for name, value in whole.items() if name not in _OPTIONAL or value}

    @classmethod
    def from_json(cls, data: Any) -> EngineRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: another version, or a field that is missing, unknown or of another type; the message names it.
        """
        whole = _typed(data, dict, "the record")
        if whole.get("version") != RECORD_VERSION:
            raise BundleError(
                f"an engine record has version {reprlib.repr(whole.get('version'))}, expected {RECORD_VERSION}. "
                "Build the engine again with lehr build."
            )
        _check_fields(whole, cls, "the record")
        plans = {name: _plan(plan, f"plans.{name}") for name, plan in _typed(whole["plans"], dict, "plans").items()}
        ends = None if whole.get("ends") is None else _ends(whole["ends"])
        end_recipes = _values(whole.get("end_recipes", {}), str, "end_recipes")
        if set(end_recipes) != set(ends.names if ends else ()):
            raise _damaged(f"end_recipes are of {reprlib.repr(sorted(end_recipes))}")
        for needed in (STEP, *map(plan_of, end_recipes)):
            if needed not in plans:
                raise _damaged(f"plans has no {needed!r}")
        return cls(
            ends=ends,
            end_recipes=end_recipes,
            stage=None if whole.get("stage") is None else _typed(whole["stage"], str, "stage"),
            target=_typed(whole["target"], str, "target"),
            recipe=_typed(whole["recipe"], str, "recipe"),
            recipe_version=_typed(whole["recipe_version"], int, "recipe_version"),
            library=_typed(whole["library"], str, "library"),
            library_version=_typed(whole["library_version"], str, "library_version"),
            host=_typed(whole["host"], dict, "host"),
            sources=_values(whole["sources"], str, "sources"),
            plans=plans,
            seconds=_number(whole["seconds"], "seconds"),
            peak_rss_mb=_number(whole["peak_rss_mb"], "peak_rss_mb"),
            candidates=tuple(
                _typed(row, dict, f"candidates[{k}]")
                for k, row in enumerate(_typed(whole["candidates"], list, "candidates"))
            ),
        )


def engines_of(stage: str | None) -> str:
    """The folder, with a final slash, that holds the engines of a stage, or of the denoiser."""
    return "engines/" if stage is None else f"{STAGES}/{stage}/engines/"


def engine_folder(target: str, recipe: str, library: str, version: str, stage: str | None = None) -> str:
    """Where an engine stands in its bundle."""
    return f"{engines_of(stage)}{target}--{recipe}--{library}-{version}"


def engine_folders(bundle: Bundle, target: str, recipe: str, stage: str | None = None) -> list[str]:
    """Folders of a bundle's engines for ``target`` and ``recipe``."""
    start = f"{engines_of(stage)}{target}--{recipe}--"
    return [name.rpartition("/")[0] for name in bundle.names(start) if name.endswith("/build.json")]


# ------------------------------------------------------------------------------------------------- reading fields


def _plan(data: Any, where: str) -> Plan:
    whole = _typed(data, dict, where)
    _check_fields(whole, Plan, where)
    return Plan(
        file=_typed(whole["file"], str, f"{where}.file"),
        options=_typed(whole["options"], dict, f"{where}.options"),
        achieved_precision={
            kind: _number(share, f"{where}.achieved_precision.{kind}")
            for kind, share in _typed(whole["achieved_precision"], dict, f"{where}.achieved_precision").items()
        },
        operators=_values(whole["operators"], int, f"{where}.operators"),
    )


def _ends(data: Any) -> Ends:
    try:
        return Ends.from_json(_typed(data, dict, "ends"))
    except (KeyError, TypeError, ValueError, InvalidInput) as e:
        raise _damaged(f"ends: {reprlib.repr(str(e))}") from e


def _check_fields(data: Mapping[str, Any], kind: type[EngineRecord | Plan], where: str) -> None:
    expected = {f.name for f in fields(kind)}
    if missing := sorted(expected - set(data) - _OPTIONAL):
        raise _damaged(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(set(data) - expected):
        raise _damaged(f"{where} has the unknown field {reprlib.repr(unknown[0])}")


def _typed(value: Any, kind: type[_T], where: str) -> _T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _damaged(f"{where[:200]} is {reprlib.repr(value)}, expected {kind.__name__}")
    return value


def _number(value: Any, where: str) -> float:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else _typed(value, float, where)


def _values(value: Any, kind: type[_T], where: str) -> dict[str, _T]:
    return {key: _typed(item, kind, f"{where}.{key}") for key, item in _typed(value, dict, where).items()}


def _damaged(problem: str) -> BundleError:
    return BundleError(f"an engine record is damaged: {problem}. Build the engine again with lehr build.")


# ---------------------------------------------------------------------------------------------------- find and load


def engines(bundle: Bundle, stage: str | None = None) -> list[EngineRecord]:
    """Every engine of the denoiser in the bundle, or of one of its stages."""
    folders = [name.rpartition("/")[0] for name in bundle.names(engines_of(stage)) if name.endswith("/build.json")]
    return [_read(bundle, folder, stage) for folder in folders]


def _read(bundle: Bundle, folder: str, stage: str | None) -> EngineRecord:
    record = EngineRecord.from_json(bundle.read_json(f"{folder}/build.json"))
    if record.stage != stage:
        raise _damaged(f"it stands in {folder} and is of {record.stage or 'the denoiser'}")
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
        raise _damaged("a plan without weights does not say where they are")
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
