"""Build kits: what a device needs to finish an engine of its own, lowered on a machine that has ONNX's tools.

A kit lies in a bundle under ``kits/<target>--<recipe>/``: graphs in the operator sets that the target's engine library
reads, their weights, and ``kit.json``. The device needs neither the portable graphs nor anything that reads them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError
from lehr.runtime.stage import STAGES

KIT_VERSION = 1
RECORD = "kit.json"
_PREFIX = "kits/"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class KitRecord:
    """``kit.json``.

    Attributes:
        target, recipe, library: what the engine will be.
        library_versions: that the target allows, such as ">=10.3,<12"; empty if any.
        sources: SHA-256 of the portable graphs and weights it was made from, and of the audit, by file.
        graphs: by name; for each its files, relative to the kit, by the operators that are in pieces in them, joined
            by "+" ("" for none).
        profiles: for each graph the sizes of its inputs that the engine will take.
        command: what to run on the device.
        stage: that the engine will compute, whose only graph is "step"; None for the denoiser.
    """

    version: int = KIT_VERSION
    target: str
    recipe: str
    recipe_version: int
    library: str
    library_versions: str
    sources: Mapping[str, str]
    graphs: Mapping[str, Mapping[str, str]]
    profiles: Mapping[str, Any]
    command: tuple[str, ...]
    stage: str | None = None

    @property
    def folder(self) -> str:
        return kit_folder(self.target, self.recipe, self.stage)

    def to_json(self) -> dict[str, Any]:
        whole = {**asdict(self), "command": list(self.command)}
        return {name: value for name, value in whole.items() if name != "stage" or value is not None}

    @classmethod
    def from_json(cls, data: Any) -> KitRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: another version, or a field that is missing, unknown or of another type; the message names it.
        """
        whole = _typed(data, dict, "the record")
        if whole.get("version") != KIT_VERSION:
            raise _damaged(f"its version is {reprlib.repr(whole.get('version'))}, expected {KIT_VERSION}")
        if odd := sorted({f.name for f in fields(cls)} ^ {"stage", *whole}):
            raise _damaged(f"the field {odd[0]!r} is missing or unknown")
        graphs = {
            name: _texts(files, f"graphs.{name}") for name, files in _typed(whole["graphs"], dict, "graphs").items()
        }
        return cls(
            target=_typed(whole["target"], str, "target"),
            recipe=_typed(whole["recipe"], str, "recipe"),
            library=_typed(whole["library"], str, "library"),
            library_versions=_typed(whole["library_versions"], str, "library_versions"),
            recipe_version=_typed(whole["recipe_version"], int, "recipe_version"),
            sources=_texts(whole["sources"], "sources"),
            graphs=graphs,
            profiles=_typed(whole["profiles"], dict, "profiles"),
            command=tuple(_typed(word, str, "command") for word in _typed(whole["command"], list, "command")),
            stage=None if whole.get("stage") is None else _typed(whole["stage"], str, "stage"),
        )


def _kits_of(stage: str | None) -> str:
    return _PREFIX if stage is None else f"{STAGES}/{stage}/{_PREFIX}"


def kit_folder(target: str, recipe: str, stage: str | None = None) -> str:
    """Where a kit stands in its bundle."""
    return f"{_kits_of(stage)}{target}--{recipe}"


def kits(bundle: Bundle, stage: str | None = None) -> list[KitRecord]:
    """Every kit of the denoiser in the bundle, or of one of its stages."""
    names = [name for name in bundle.names(_kits_of(stage)) if name.endswith("/" + RECORD)]
    return [_read(bundle, name, stage) for name in names]


def _read(bundle: Bundle, name: str, stage: str | None) -> KitRecord:
    record = KitRecord.from_json(bundle.read_json(name))
    if record.stage != stage:
        raise _damaged(f"{name} is of {record.stage or 'the denoiser'}")
    return record


def find_kit(bundle: Bundle, target: str, recipe: str, stage: str | None = None) -> KitRecord | None:
    """The kit for ``target`` and ``recipe``, if there is one.

    Raises:
        BundleError: a damaged one, or one of graphs or weights that have changed since.
    """
    name = f"{kit_folder(target, recipe, stage)}/{RECORD}"
    if name not in bundle.manifest.files:
        return None
    record = _read(bundle, name, stage)
    known = bundle.manifest.known_files
    for source, digest in record.sources.items():
        if source not in known or known[source].sha256 != digest:
            raise BundleError(
                f"{source} has changed since the build kit in {record.folder} was made. Make it again where it was "
                f"made: {' '.join(record.command)}"
            )
    return record


def _typed(value: Any, kind: type[_T], where: str) -> _T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _damaged(f"{where[:200]} is {reprlib.repr(value)}, expected {kind.__name__}")
    return value


def _texts(value: Any, where: str) -> dict[str, str]:
    return {key: _typed(item, str, f"{where}.{key}") for key, item in _typed(value, dict, where).items()}


def _damaged(problem: str) -> BundleError:
    return BundleError(f"a build kit is damaged: {problem}. Make it again with lehr build on the machine it came from.")
