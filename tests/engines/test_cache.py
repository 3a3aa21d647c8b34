"""Engines that were built before: what an entry's name depends on, and what happens to entries that are damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lehr.engines import cache
from lehr.engines.build import build
from lehr.engines.cache import ENTRY, EngineCache, contents, engine_cache, key, root
from lehr.engines.settings import Mode, Settings
from lehr.engines.target import target
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import Plan
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import recipe

PLAN = Plan(file="step.blob", options={"a": 1}, achieved_precision={"float": 1.0}, operators={"Add": 2})


@pytest.fixture
def kept(tmp_path):
    """A cache with one entry, "e", of two files."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "step.blob").write_bytes(b"the plan")
    (source / "step.weights").write_bytes(b"weights")
    made = EngineCache(folder=tmp_path / "cache", limit=10_000)
    made.store("e", source, ["step.blob", "step.weights"], PLAN)
    return made


def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir(exist_ok=True)
    return folder


def test_what_was_stored_is_fetched_with_all_its_files(kept, tmp_path):
    assert kept.fetch("e", into(tmp_path)) == PLAN
    assert (tmp_path / "into" / "step.blob").read_bytes() == b"the plan"
    assert (tmp_path / "into" / "step.weights").read_bytes() == b"weights"
    assert kept.fetch("other", into(tmp_path)) is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda entry: (entry / "step.blob").write_bytes(b"the pl4n"),
        lambda entry: (entry / "step.weights").unlink(),
        lambda entry: (entry / ENTRY).write_text("{"),
        lambda entry: (entry / ENTRY).write_text("[]"),
        lambda entry: (entry / ENTRY).write_text(
            (entry / ENTRY).read_text().replace('"step.weights"', '"../step.weights"')
        ),
        lambda entry: (entry / ENTRY).write_text(json.dumps({**json.loads((entry / ENTRY).read_text()), "files": {}})),
    ],
    ids=["altered", "missing", "no JSON", "another JSON", "a path that leaves", "no files"],
)
def test_a_damaged_entry_counts_as_absent_leaves_nothing_and_goes(kept, tmp_path, harm):
    harm(kept.folder / "e")
    assert kept.fetch("e", into(tmp_path)) is None
    assert list(into(tmp_path).iterdir()) == []
    assert not (kept.folder / "e").exists()


def test_an_entry_that_is_there_stays_and_nothing_unfinished_is_left(kept, tmp_path):
    (tmp_path / "source" / "step.blob").write_bytes(b"another")
    kept.store("e", tmp_path / "source", ["step.blob"], PLAN)
    kept.fetch("e", into(tmp_path))
    assert (tmp_path / "into" / "step.blob").read_bytes() == b"the plan"
    assert [path.name for path in kept.folder.iterdir()] == ["e"]


def test_beyond_the_limit_the_entry_that_was_not_used_for_longest_goes(kept, tmp_path):
    source = tmp_path / "source"
    kept.store("f", source, ["step.blob", "step.weights"], PLAN)
    for age, name in ((100, "f"), (200, "e")):
        os.utime(kept.folder / name, (1e9 - age, 1e9 - age))
    assert kept.fetch("e", into(tmp_path)) == PLAN  # used just now
    size = sum(file.stat().st_size for file in (kept.folder / "e").iterdir())
    EngineCache(folder=kept.folder, limit=2 * size + 10).store("g", source, ["step.blob", "step.weights"], PLAN)
    assert sorted(path.name for path in kept.folder.iterdir()) == ["e", "g"]
    EngineCache(folder=kept.folder, limit=5).store("h", source, ["step.blob"], PLAN)
    assert not (kept.folder / "h").exists()


def test_what_a_killed_process_left_goes_after_a_day(kept, tmp_path):
    for name, age in ((".new-old", 2 * 24 * 3600), (".new-now", 0)):
        left = kept.folder / name
        left.mkdir()
        os.utime(left, (left.stat().st_mtime - age,) * 2)
    kept.store("f", tmp_path / "source", ["step.blob"], PLAN)
    assert sorted(path.name for path in kept.folder.iterdir()) == [".new-now", "e", "f"]


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "step.blob").write_bytes(b"x")
    EngineCache(folder=tmp_path / "file" / "cache").store("e", tmp_path, ["step.blob"], PLAN)


def test_names_change_with_whatever_the_engine_is_made_of(tmp_path, monkeypatch):
    for name, data in (("step.onnx", b"graph"), ("w.bin", b"weights"), ("prompt.onnx", b"another graph")):
        (tmp_path / name).write_bytes(data)
    first = contents(tmp_path / "step.onnx", {})
    assert set(first) == {"step.onnx", "w.bin"}
    assert contents(tmp_path / "step.onnx", {str(tmp_path / "w.bin"): "known"})["w.bin"] == "known"
    (tmp_path / "w.bin").write_bytes(b"Weights")
    second = contents(tmp_path / "step.onnx", {})
    assert key({"graph": first}) == key({"graph": dict(reversed(first.items()))}) != key({"graph": second})
    before = key({})
    monkeypatch.setattr(cache, "_code", lambda: "another builder")
    assert key({}) != before


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LEHR_CACHE", "/x/y")
    monkeypatch.setenv("LEHR_CACHE_MB", "7")
    assert root() == Path("/x/y")
    assert engine_cache() == EngineCache(folder=Path("/x/y/engines"), limit=7_000_000)
    monkeypatch.delenv("LEHR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert root() == tmp_path / "lehr"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert root() == Path("/home/someone/.cache/lehr")


def test_openvino_engines_are_taken_from_the_cache_unless_asked_otherwise(dit_bundle, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("LEHR_CACHE", str(tmp_path / "cache"))
    bundle = Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))

    def made(settings: Settings) -> tuple[list[str], dict[str, str]]:
        said: list[str] = []
        record = build(
            bundle,
            target("cpu"),
            recipe("fp32"),
            library="openvino",
            threads=1,
            progress=said.append,
            settings=settings,
        )
        opened = Bundle.open(bundle)
        files = opened.names(record.folder + "/")
        return said, {n: opened.manifest.files[n].sha256 for n in files if not n.endswith("build.json")}

    said, files = made(Settings())
    assert said == []
    again, same = made(Settings())
    assert len(again) == 3
    assert all("built before" in line for line in again)
    assert same == files
    assert made(Settings(cached=False))[0] == []
    said, _ = made(Settings(mode=Mode.THROUGHPUT))
    assert said == []  # another setting, another engine


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batches": (0,)}, "must be 1 or more"),
        ({"batches": (2, 2)}, "name each once"),
        ({"batches": tuple(range(1, 6)), "sizes": ((8, 8), (16, 16), (32, 32), (64, 64))}, "are 20 profiles"),
        ({"workspace_mb": -1}, "expected 0 or more"),
        ({"effort": 6}, "expected 0 to 5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, says):
    with pytest.raises(InvalidInput, match=says):
        Settings(**given)
