"""``build.json`` of an engine: what a build recorded, and how it is read back without trusting it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.precision_schedule import Ends, plan_of
from lehr.runtime.stage import STAGES

RECORD_VERSION = 2
STEP = "step"  # the graph that runs at every step, and gives an engine its precision
# Of a record: engines without a precision schedule lack the first two, those of the denoiser the last.
_OPTIONAL = frozenset({"ends", "end_recipes", "stage"})

_T = TypeVar("_T")


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
        candidates: the libraries, and ways to run them, that were measured in turn, a row each; empty if there was one.
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
            raise damaged(f"end_recipes are of {reprlib.repr(sorted(end_recipes))}")
        for needed in (STEP, *map(plan_of, end_recipes)):
            if needed not in plans:
                raise damaged(f"plans has no {needed!r}")
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
        raise damaged(f"ends: {reprlib.repr(str(e))}") from e


def _check_fields(data: Mapping[str, Any], kind: type[EngineRecord | Plan], where: str) -> None:
    expected = {f.name for f in fields(kind)}
    if missing := sorted(expected - set(data) - _OPTIONAL):
        raise damaged(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(set(data) - expected):
        raise damaged(f"{where} has the unknown field {reprlib.repr(unknown[0])}")


def _typed(value: Any, kind: type[_T], where: str) -> _T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise damaged(f"{where[:200]} is {reprlib.repr(value)}, expected {kind.__name__}")
    return value


def _number(value: Any, where: str) -> float:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else _typed(value, float, where)


def _values(value: Any, kind: type[_T], where: str) -> dict[str, _T]:
    return {key: _typed(item, kind, f"{where}.{key}") for key, item in _typed(value, dict, where).items()}


def damaged(problem: str) -> BundleError:
    """The error of a record that says something impossible."""
    return BundleError(f"an engine record is damaged: {problem}. Build the engine again with lehr build.")
