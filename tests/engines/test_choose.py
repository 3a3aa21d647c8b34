"""``--library auto``: several engines measured, one kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lehr import cli
from lehr.engines import choose, openvino_cpu
from lehr.engines.build import build
from lehr.engines.choose import MARGIN, Measured, fastest
from lehr.engines.settings import Settings
from lehr.engines.target import target
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BuildFailed
from lehr.runtime.recipe import recipe


@pytest.fixture
def bundle(dit_bundle, tmp_path, monkeypatch) -> Path:
    """A private copy, measured as briefly as it can be."""
    monkeypatch.setattr(choose, "ROUNDS", 3)
    return Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def row(library: str, step_ms: float | None, error: float | None = 1e-6) -> Measured:
    return Measured(library=library, step_ms=step_ms, max_rel_error=error, limit=None if error is None else 1e-4)


# ------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([row("a", 2.0), row("b", 1.0)], "b"),
        ([row("a", 1.0), row("b", 2.0)], "a"),
        ([row("a", MARGIN - 0.01), row("b", 1.0)], "a"),
        ([row("a", MARGIN + 0.01), row("b", 1.0)], "b"),
        ([row("a", 2.0), row("b", 1.0, 1e-3)], "a"),
        ([row("a", None), row("b", 9.0)], "b"),
        ([row("a", 2.0, None), row("b", 1.0, None)], "b"),
        ([row("a", None), row("b", 1.0, 1e-3)], None),
        ([], None),
    ],
    ids=["second", "first", "too-close", "clear", "no-parity", "cannot-run", "no-golden", "none-fits", "nothing"],
)
def test_the_fastest_that_meets_parity_is_kept_and_the_targets_order_breaks_ties(rows, kept):
    assert fastest(rows) == kept


# ---------------------------------------------------------------------------------------------------- in a bundle


def test_all_libraries_are_measured_and_one_engine_stays(bundle):
    record = build(bundle, target("cpu"), recipe("fp32"))
    opened = Bundle.open(bundle)
    assert engines.engines(opened) == [record]
    assert {Path(name).parent.name for name in opened.names("engines/")} == {Path(record.folder).name}
    assert [r["library"] for r in record.candidates] == list(target("cpu").libraries)
    assert all(r["passed"] and r["step_ms"] > 0 and r["max_rel_error"] <= r["limit"] for r in record.candidates)
    rows = [row(r["library"], r["step_ms"], r["max_rel_error"]) for r in record.candidates]
    assert record.library == fastest(rows)
    assert engines.load(opened, record, next(iter(record.plans)))


@pytest.mark.parametrize(
    ("name", "library"), [("fp32", "onnxruntime"), ("fp32", "openvino")], ids=["onnxruntime", "openvino"]
)
def test_a_library_that_is_asked_for_is_not_measured(bundle, monkeypatch, name, library):
    monkeypatch.setattr(choose, "interleaved", None)
    record = build(bundle, target("cpu"), recipe(name), library=library)
    assert (record.library, record.candidates) == (library, ())


def test_a_library_that_cannot_build_is_passed_over_with_its_reason(bundle, monkeypatch):
    def refuse(*_, **__):
        raise BuildFailed("no such kernel")

    monkeypatch.setattr(openvino_cpu, "build", refuse)
    record = build(bundle, target("cpu"), recipe("fp32"), settings=Settings(cached=False))
    assert record.library == "onnxruntime"
    assert [(r["library"], r["passed"], r["reason"]) for r in record.candidates] == [
        ("onnxruntime", True, ""),
        ("openvino", False, "no such kernel"),
    ]


def test_an_engine_that_does_not_meet_parity_is_not_kept_however_fast(bundle, monkeypatch):
    measured = choose.step_errors
    monkeypatch.setattr(
        choose,
        "step_errors",
        lambda denoiser, golden: [1.0] if "OpenVino" in repr(sessions(denoiser)) else measured(denoiser, golden),
    )
    monkeypatch.setattr(choose, "interleaved", lambda calls: {"onnxruntime": 9.0, "openvino": 1.0})
    record = build(bundle, target("cpu"), recipe("fp32"))
    assert record.library == "onnxruntime"
    assert [r["passed"] for r in record.candidates] == [True, False]


def sessions(denoiser) -> list[object]:
    run = denoiser._run
    return list(run._sessions.values()) if hasattr(run, "_sessions") else [run.__self__]


def test_where_nothing_meets_parity_the_build_fails_and_the_bundle_stays_as_it_was(bundle, monkeypatch):
    before = files(bundle)
    monkeypatch.setattr(choose, "rel_error_limit", lambda *_: 1e-12)
    with pytest.raises(BuildFailed, match=r"onnxruntime: score error .*openvino: score error"):
        build(bundle, target("cpu"), recipe("fp32"))
    assert files(bundle) == before


def test_without_golden_data_speed_alone_decides(bundle):
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        edit.remove("golden")
    record = build(bundle, target("cpu"), recipe("fp32"))
    assert [r["max_rel_error"] for r in record.candidates] == [None, None]
    assert all(r["passed"] and r["step_ms"] > 0 for r in record.candidates)


def test_the_command_line_shows_what_was_tried(bundle, capsys):
    for arguments in (["--json"], []):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["build", str(bundle), *arguments])
        assert not exit_.value.code
        out = capsys.readouterr().out
        if arguments:
            data = json.loads(out)
            assert {r["library"] for r in data["candidates"]} == set(target("cpu").libraries)
        else:
            assert "kept" in out
            assert all(library in out for library in target("cpu").libraries)
