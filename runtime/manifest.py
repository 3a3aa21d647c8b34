"""The manifest: the one file that says what a bundle is, which files belong to it and how they were made.

It holds no time stamp and no machine path, so two equal exports give equal bytes. Everything read from disk is
checked field by field; what :meth:`Manifest.from_json` returns can be trusted to have the declared types.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lehr.runtime.errors import BundleError, InvalidInput, UnknownName
from lehr.runtime.names import MANIFEST_NAME, name_problem, nested_name
from lehr.runtime.pipeline_spec import PipelineSpec
from lehr.runtime.spec import GraphSpec, ModelSpec
from lehr.runtime.stage import StageSpec

SCHEMA_VERSION = 3
WITHOUT_STAGES = 2  # what a bundle of a denoiser alone declares: older releases read it as well
GOLDEN_TIERS = ("none", "steps", "full")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")

# ------------------------------------------------------------------------------------------------- entries


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A listed file: lower-case hexadecimal SHA-256 of its content, and its size."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise InvalidInput(f"sha256 {reprlib.repr(self.sha256)} must be 64 lower-case hexadecimal digits")
        if not 0 <= self.bytes < 2**63:
            raise InvalidInput(f"bytes is {reprlib.repr(self.bytes)}, expected a size from 0 to 2^63 - 1")

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphEntry:
    """A portable graph.

    Attributes:
        file: name of the ONNX file, such as "model/step.onnx".
        weights: name of the safetensors file it refers to, or None for a structure-only export.
        opset: ONNX operator set version.
        parameters: elements in its initialisers.
        weight_bytes: what they take in the element types that they are stored in.
        nodes: operators in the graph.
        flops: floating-point operations of one evaluation of one sample, at the model's default sizes.
        signature: what the graph takes and returns.
    """

    file: str
    weights: str | None
    opset: int
    parameters: int
    weight_bytes: int
    nodes: int
    flops: int
    signature: GraphSpec

    def __post_init__(self) -> None:
        for name in (self.file, self.weights):
            if name is not None and (problem := name_problem(name)):
                raise InvalidInput(f"{reprlib.repr(name)} cannot be a file in a bundle: {problem}")
        if self.opset < 1 or min(self.parameters, self.weight_bytes, self.nodes, self.flops) < 0:
            raise InvalidInput(
                f"a graph needs opset >= 1 and parameters, weight_bytes, nodes and flops >= 0, got {self.opset}, "
                f"{self.parameters}, {self.weight_bytes}, {self.nodes} and {self.flops}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "weights": self.weights,
            "opset": self.opset,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "nodes": self.nodes,
            "flops": self.flops,
            "signature": self.signature.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEntry:
    """A stage beside the denoiser: its contract, its portable graph, and the recorded eager results, if any."""

    spec: StageSpec
    graph: GraphEntry
    golden: str | None

    def to_json(self) -> dict[str, Any]:
        return {"spec": self.spec.to_json(), "graph": self.graph.to_json(), "golden": self.golden}


# ------------------------------------------------------------------------------------------------ manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        model: the denoiser's contract, with its path and prediction.
        graphs: portable graphs by role, in the order in which they run: "prompt", "schedule", "step".
        files: every file of the bundle but the manifest; what is not here is not part of the bundle.
        source: preset, folder or FILE.py:FACTORY, as the user gave it.
        versions: versions of the packages that made the graphs.
        command: the command line of the export.
        golden_tier: how much eager data was recorded: "none", "steps" or "full".
        parity: what ``lehr verify`` measured, by engine folder name.
        left_out: files that the bundle had and this copy of it does not hold (:mod:`lehr.runtime.pack`).
        stages: what else the bundle runs, by name.
        pipeline: how denoiser and stages make a picture; None where the denoiser stands alone.
    """

    model: ModelSpec
    graphs: Mapping[str, GraphEntry]
    files: Mapping[str, FileEntry]
    source: str
    versions: Mapping[str, str]
    command: tuple[str, ...]
    golden_tier: str
    parity: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, FileEntry] = field(default_factory=dict)
    stages: Mapping[str, StageEntry] = field(default_factory=dict)
    pipeline: PipelineSpec | None = None

    @property
    def schema_version(self) -> int:
        """The oldest one that says all of this."""
        return SCHEMA_VERSION if self.stages or self.pipeline is not None else WITHOUT_STAGES

    @property
    def known_files(self) -> Mapping[str, FileEntry]:
        """Every file of the bundle, those that were left out included."""
        return {**self.left_out, **self.files}

    def stage(self, name: str) -> StageEntry:
        """The stage called ``name``; raises UnknownName with the closest match."""
        if name not in self.stages:
            raise UnknownName("stage", name, self.stages)
        return self.stages[name]

    def __post_init__(self) -> None:
        if both := set(self.files) & set(self.left_out):
            raise InvalidInput(f"{min(both)!r} is listed in files and in left_out")
        for name in self.known_files:
            if problem := name_problem(name):
                raise InvalidInput(f"files: {reprlib.repr(name)} cannot be a file in a bundle: {problem}")
        if nested := nested_name(self.known_files):
            raise InvalidInput(f"files: {nested[0]!r} is a file and, because of {nested[1]!r}, a folder too")
        for role, graph in self.graphs.items():
            for part in (graph.file, graph.weights):
                if part is not None and part not in self.known_files:
                    raise InvalidInput(f"graphs.{role} refers to {part!r}, which is not listed in files")
        for name, stage in self.stages.items():
            if name != stage.spec.name:
                raise InvalidInput(f"stages.{name} holds the stage {stage.spec.name!r}")
            for part in (stage.graph.file, stage.graph.weights, stage.golden):
                if part is not None and part not in self.known_files:
                    raise InvalidInput(f"stages.{name} refers to {part!r}, which is not listed in files")
        if self.pipeline is not None:
            for name, tokenizer in self.pipeline.tokenizers.items():
                if name not in self.stages or tokenizer.file not in self.known_files:
                    raise InvalidInput(f"pipeline.tokenizers.{name} has no such stage, or no file {tokenizer.file!r}")
        if self.golden_tier not in GOLDEN_TIERS:
            raise InvalidInput(
                f"golden_tier is {reprlib.repr(self.golden_tier)}, expected one of {', '.join(GOLDEN_TIERS)}"
            )

    # ------------------------------------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        stages: dict[str, Any] = {}
        if self.schema_version == SCHEMA_VERSION:
            stages["stages"] = {name: stage.to_json() for name, stage in self.stages.items()}
            stages["pipeline"] = None if self.pipeline is None else self.pipeline.to_json()
        return {
            "schema_version": self.schema_version,
            "model": self.model.to_json(),
            "graphs": {role: graph.to_json() for role, graph in self.graphs.items()},
            "files": {name: entry.to_json() for name, entry in self.files.items()},
            "source": self.source,
            "versions": dict(self.versions),
            "command": list(self.command),
            "golden_tier": self.golden_tier,
            "parity": dict(self.parity),
            "left_out": {name: entry.to_json() for name, entry in self.left_out.items()},
            **stages,
        }

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: another schema version, a field that is missing or unknown, or one of another type or
                value than it may have; the message names it.
        """
        whole = _typed(data, dict, "the manifest")
        _check_schema(whole)
        beside = {"stages", "pipeline"}
        expected = {"schema_version", *cls.__dataclass_fields__}
        _check_fields(
            whole, expected if whole["schema_version"] == SCHEMA_VERSION else expected - beside, "the manifest"
        )
        whole = {"stages": {}, "pipeline": None, **whole}
        graphs = _typed(whole["graphs"], dict, "graphs")
        files = _typed(whole["files"], dict, "files")
        left_out = _typed(whole["left_out"], dict, "left_out")
        versions = _typed(whole["versions"], dict, "versions")
        command = _typed(whole["command"], list, "command")
        stages = _typed(whole["stages"], dict, "stages")
        try:
            return cls(
                model=_model(whole["model"]),
                graphs={role: _graph(item, f"graphs.{role}") for role, item in graphs.items()},
                files={name: _file(item, f"files.{name}") for name, item in files.items()},
                source=_typed(whole["source"], str, "source"),
                versions={name: _typed(item, str, f"versions.{name}") for name, item in versions.items()},
                command=tuple(_typed(word, str, f"command[{i}]") for i, word in enumerate(command)),
                golden_tier=_typed(whole["golden_tier"], str, "golden_tier"),
                parity=_typed(whole["parity"], dict, "parity"),
                left_out={name: _file(item, f"left_out.{name}") for name, item in left_out.items()},
                stages={name: _stage(item, f"stages.{name}") for name, item in stages.items()},
                pipeline=None if whole["pipeline"] is None else _pipeline(whole["pipeline"]),
            )
        except InvalidInput as e:
            raise _damaged(str(e)) from e


# ------------------------------------------------------------------------------------------- reading fields


def _damaged(problem: str) -> BundleError:
    return BundleError(f"{MANIFEST_NAME}: {problem}. The bundle is damaged: copy or export it again.")


def _typed(value: Any, kind: type[_T], where: str) -> _T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        name = "null" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"
        raise _damaged(f"{_short(where)} is {name}, expected {kind.__name__}")
    return value


def _short(where: str) -> str:
    return where if len(where) <= 200 else where[:200] + "…"


def _check_fields(data: Mapping[str, Any], expected: set[str], where: str) -> None:
    if missing := sorted(expected - set(data)):
        raise _damaged(f"{_short(where)} lacks {', '.join(missing)}")
    if unknown := sorted(set(data) - expected):
        raise _damaged(f"{_short(where)} has the unknown field {reprlib.repr(unknown[0])}")


def _check_schema(data: Mapping[str, Any]) -> None:
    if "schema_version" not in data:
        raise _damaged("schema_version is missing")
    version = _typed(data["schema_version"], int, "schema_version")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema version {version}, this Lehr reads {SCHEMA_VERSION}. It was made by a newer Lehr: "
            "upgrade with pip install --upgrade lehr, or export it again with this one."
        )
    if version < WITHOUT_STAGES:
        raise BundleError(
            f"the bundle has schema version {version}, this Lehr reads {SCHEMA_VERSION}. It was made by an older Lehr: "
            "export it again with lehr export."
        )


def _file(data: Any, where: str) -> FileEntry:
    entry = _typed(data, dict, where)
    _check_fields(entry, {"sha256", "bytes"}, where)
    sha256, size = _typed(entry["sha256"], str, f"{where}.sha256"), _typed(entry["bytes"], int, f"{where}.bytes")
    try:
        return FileEntry(sha256=sha256, bytes=size)
    except InvalidInput as e:
        raise _damaged(f"{_short(where)}: {e}") from e


def _graph(data: Any, where: str) -> GraphEntry:
    entry = _typed(data, dict, where)
    _check_fields(entry, set(GraphEntry.__dataclass_fields__), where)
    try:
        return GraphEntry(
            file=_typed(entry["file"], str, f"{where}.file"),
            weights=None if entry["weights"] is None else _typed(entry["weights"], str, f"{where}.weights"),
            opset=_typed(entry["opset"], int, f"{where}.opset"),
            parameters=_typed(entry["parameters"], int, f"{where}.parameters"),
            weight_bytes=_typed(entry["weight_bytes"], int, f"{where}.weight_bytes"),
            nodes=_typed(entry["nodes"], int, f"{where}.nodes"),
            flops=_typed(entry["flops"], int, f"{where}.flops"),
            signature=GraphSpec.from_json(_typed(entry["signature"], dict, f"{where}.signature")),
        )
    except KeyError as e:
        raise _damaged(f"{_short(where)}.signature lacks {e}") from e
    except (InvalidInput, TypeError, ValueError, AttributeError) as e:
        raise _damaged(f"{_short(where)}: {_short(str(e))}") from e


def _model(data: Any) -> ModelSpec:
    fields = _typed(data, dict, "model")
    try:
        return ModelSpec.from_json(fields)
    except KeyError as e:
        raise _damaged(f"model lacks {e}") from e
    except (InvalidInput, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise _damaged(_short(f"model: {e}")) from e


def _stage(data: Any, where: str) -> StageEntry:
    entry = _typed(data, dict, where)
    _check_fields(entry, set(StageEntry.__dataclass_fields__), where)
    golden = None if entry["golden"] is None else _typed(entry["golden"], str, f"{where}.golden")
    graph, fields = _graph(entry["graph"], f"{where}.graph"), _typed(entry["spec"], dict, f"{where}.spec")
    try:
        return StageEntry(spec=StageSpec.from_json(fields), graph=graph, golden=golden)
    except KeyError as e:
        raise _damaged(f"{_short(where)}.spec lacks {e}") from e
    except (InvalidInput, TypeError, ValueError, AttributeError) as e:
        raise _damaged(_short(f"{where}.spec: {e}")) from e


def _pipeline(data: Any) -> PipelineSpec:
    fields = _typed(data, dict, "pipeline")
    try:
        return PipelineSpec.from_json(fields)
    except KeyError as e:
        raise _damaged(f"pipeline lacks {e}") from e
    except (InvalidInput, TypeError, ValueError, AttributeError) as e:
        raise _damaged(_short(f"pipeline: {e}")) from e
