"""Engines on disk: what a build recorded, and the checks before one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lehr.runtime.backends import Session, backend
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, IncompatibleEngine
from lehr.runtime.host import host

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """``build.json`` of one engine.

    Attributes:
        target, recipe, library, library_version: what was asked for and what built it.
        host: the machine it was built on; see :func:`lehr.runtime.host.host`.
        sources: SHA-256 of the portable graph and weights it was built from, by file.
        plans: graph name ("step") -> plan file, relative to the engine's folder.
        options: the session options to load it with.
        achieved_precision: element type -> share of the operators, read from the engine itself.
        operators: operator -> how often it stands in the engine, fused ones included.
        seconds, peak_rss_mb: what the build took.
    """

    version: int = RECORD_VERSION
    target: str
    recipe: str
    recipe_version: int
    library: str
    library_version: str
    host: Mapping[str, Any]
    sources: Mapping[str, str]
    plans: Mapping[str, str]
    options: Mapping[str, Any]
    achieved_precision: Mapping[str, float]
    operators: Mapping[str, int]
    seconds: float
    peak_rss_mb: float

    @property
    def folder(self) -> str:
        """``engines/<target>--<recipe>--<library>-<version>``."""
        return f"engines/{self.target}--{self.recipe}--{self.library}-{self.library_version}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Rebuild a record; raises BundleError for another version or missing fields."""
        if data.get("version") != RECORD_VERSION:
            raise BundleError(
                f"an engine record has version {data.get('version')}, expected {RECORD_VERSION}. "
                "Build the engine again with lehr build."
            )
        try:
            return cls(**data)
        except TypeError as e:
            raise BundleError(f"an engine record is damaged ({e}). Build the engine again with lehr build.") from e


def engines(bundle: Bundle) -> list[EngineRecord]:
    """Every engine in the bundle."""
    names = [name for name in bundle.names("engines/") if name.endswith("/build.json")]
    return [EngineRecord.from_json(bundle.read_json(name)) for name in names]


def find(bundle: Bundle, target: str, recipe: str) -> EngineRecord:
    """The engine for ``target`` and ``recipe``; of several libraries or versions, one that fits this machine.

    Raises:
        BundleError: there is none; the message has the command that builds it.
    """
    found = [record for record in engines(bundle) if (record.target, record.recipe) == (target, recipe)]
    if not found:
        have = ", ".join(f"{r.target} {r.recipe}" for r in engines(bundle)) or "none"
        raise BundleError(
            f"{bundle.root.name} has no {recipe} engine for target {target!r} (engines: {have}). "
            f"Build it: {rebuild_command(bundle, target, recipe)}"
        )
    fitting = [record for record in found if not differences(bundle, record)]
    return (fitting or found)[-1]


def load(bundle: Bundle, record: EngineRecord, graph: str = "step") -> Session:
    """Load one graph of an engine.

    Raises:
        IncompatibleEngine: it was built on another kind of machine, by another library version, or from other
            graphs or weights than the bundle now holds.
        BundleError: its files are damaged.
        MissingExtra: the engine library is not installed.
    """
    wrong = differences(bundle, record)
    if wrong:
        command = rebuild_command(bundle, record.target, record.recipe)
        raise IncompatibleEngine(f"{record.folder} does not fit: {'; '.join(wrong)}. Rebuild it here: {command}")
    for name in bundle.names(record.folder + "/"):
        bundle.path(name)  # external weights of the plan are read by the library, so their hashes are checked here
    return backend(record.library).load(bundle.path(f"{record.folder}/{record.plans[graph]}"), record.options)


def differences(bundle: Bundle, record: EngineRecord) -> list[str]:
    """Why the engine must not be loaded here; empty if it may."""
    here = host()
    wrong = [
        f"{key} is {here.get(key)} here and {value} where it was built"
        for key, value in record.host.items()
        if here.get(key) != value
    ]
    version = backend(record.library).version()
    if version != record.library_version:
        wrong.append(f"{record.library} is {version} here and {record.library_version} where it was built")
    for name, digest in record.sources.items():
        entry = bundle.manifest.files.get(name)
        if entry is None or entry.sha256 != digest:
            wrong.append(f"{name} has changed since it was built")
    return wrong


def rebuild_command(bundle: Bundle, target: str, recipe: str) -> str:
    """The command line that makes this engine again."""
    return f"lehr build {bundle.root.name} --target {target} --recipe {recipe}"
