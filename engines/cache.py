"""Engines that were built before, by the content of everything they were made from.

An entry's name is a hash of the lowered graph, its weights, the target, the recipe, the settings, the library's
version, the machine where that matters, and of Lehr's own code that builds: nobody need be told when one of them
changes. An entry is a folder that is renamed into place when it is complete. What is damaged or half gone counts as
absent and is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lehr.runtime.engine import Plan

ENTRY = "entry.json"
ENTRY_VERSION = 1
LIMIT_MB = 20_000  # of all entries; beyond it those unused for longest go. LEHR_CACHE_MB says otherwise
_CHUNK = 1 << 20
_ABANDONED = 24 * 3600.0  # seconds; no copy takes so long

# ------------------------------------------------------------------------------------------------------ its name


def root() -> Path:
    """The user's cache: ``$LEHR_CACHE``, else ``lehr`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get("LEHR_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "lehr"


def key(made_from: Mapping[str, Any]) -> str:
    """The name of an entry; ``made_from`` holds plain values."""
    whole = {"entry": ENTRY_VERSION, "code": _code(), **made_from}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def contents(graph: Path, known: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of a graph and of the weights beside it, by file name.

    Args:
        graph: every file of its folder that is no other graph counts as weights.
        known: hashes by path, which are not worked out again.
    """
    files = [graph, *(f for f in sorted(graph.parent.iterdir()) if f.is_file() and f.suffix != ".onnx")]
    return {file.name: known.get(str(file)) or _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@cache
def _code() -> str:
    """A digest of the code that builds: a changed builder makes another engine of the same graph."""
    stages = Path(__file__).parent
    beside = (stages.parent / "runtime" / "backends", stages.parent / "export")  # a plugged-in builder is among these
    files = [*stages.rglob("*.py"), *(file for folder in beside for file in folder.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


# ----------------------------------------------------------------------------------------------------- its entries


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCache:
    """Entries under one folder; it need not exist.

    Attributes:
        folder: of the entries.
        limit: bytes of all of them.
    """

    folder: Path
    limit: int = LIMIT_MB * 1_000_000

    def fetch(self, name: str, into: Path) -> Plan | None:
        """Copy an entry's files into a folder; None if there is no entry that is whole."""
        entry = self.folder / name
        copied: list[Path] = []
        try:
            data = json.loads((entry / ENTRY).read_text(encoding="utf-8"))
            plan = Plan(**{key: data["plan"][key] for key in ("file", "options", "achieved_precision", "operators")})
            for file, digest in data["files"].items():
                if Path(file).name != file:
                    raise ValueError(file)
                copied.append(into / file)
                shutil.copyfile(entry / file, copied[-1])
                if _sha256(copied[-1]) != digest:
                    raise ValueError(file)
            if plan.file not in data["files"]:
                raise ValueError(plan.file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            for file in copied:
                file.unlink(missing_ok=True)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)
        return plan

    def store(self, name: str, folder: Path, files: Sequence[str], plan: Plan) -> None:
        """Keep a plan and its files. A full or read-only disk means that nothing is kept."""
        size = sum((folder / file).stat().st_size for file in files)
        if size > self.limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".new-", ignore_cleanup_errors=True) as scratch:
                made = Path(scratch) / "entry"
                made.mkdir()
                for file in files:
                    shutil.copyfile(folder / file, made / file)
                fields = {
                    "file": plan.file,
                    "options": dict(plan.options),
                    "achieved_precision": dict(plan.achieved_precision),
                    "operators": dict(plan.operators),
                }
                entry = {"plan": fields, "files": {file: _sha256(made / file) for file in files}}
                (made / ENTRY).write_text(json.dumps(entry), encoding="utf-8")
                made.rename(self.folder / name)  # fails if another process was first, which is as good
            self._shrink()
        except OSError:
            return

    def _shrink(self) -> None:
        """Remove what a killed process left, and entries, longest unused first, until the rest is within the limit."""
        for left in self.folder.glob(".new-*"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        entries = [entry for entry in self.folder.iterdir() if (entry / ENTRY).is_file()]
        sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
        total = sum(sizes.values())
        for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
            if total <= self.limit:
                return
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def engine_cache() -> EngineCache:
    """The user's; ``LEHR_CACHE_MB`` limits its size."""
    given = os.environ.get("LEHR_CACHE_MB", "")
    return EngineCache(folder=root() / "engines", limit=(int(given) if given.isdigit() else LIMIT_MB) * 1_000_000)


def timing_file(library: str, version: str, gpu: str) -> Path:
    """Where the kernel timings of a library on a GPU are kept between builds."""
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in f"{library}-{version}-{gpu}")
    return root() / "timing" / f"{name}.cache"
