"""``--library auto``: several engines measured, one kept."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lehr import cli
from lehr.engines import choose, openvino_cpu
from lehr.engines.build import build
from lehr.engines.choose import MARGIN, Candidate, Measured, fastest, with_spinning
from lehr.engines.settings import Settings, Spinning
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


ASLEEP = Settings(spinning=Spinning.OFF)


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
    best = fastest(rows)
    assert (best and best.library) == kept


# ---------------------------------------------------------------------------------------------------- in a bundle


def test_all_libraries_are_measured_and_one_engine_stays(bundle):
    record = build(bundle, target("cpu"), recipe("fp32"), settings=ASLEEP)
    opened = Bundle.open(bundle)
    assert engines.engines(opened) == [record]
    assert {Path(name).parent.name for name in opened.names("engines/")} == {Path(record.folder).name}
    assert [r["library"] for r in record.candidates] == list(target("cpu").libraries)
    assert all(r["passed"] and r["step_ms"] > 0 and r["max_rel_error"] <= r["limit"] for r in record.candidates)
    rows = [row(r["library"], r["step_ms"], r["max_rel_error"]) for r in record.candidates]
    assert record.library == fastest(rows).library
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
    record = build(bundle, target("cpu"), recipe("fp32"), settings=replace(ASLEEP, cached=False))
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
    record = build(bundle, target("cpu"), recipe("fp32"), settings=ASLEEP)
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
    record = build(bundle, target("cpu"), recipe("fp32"), settings=ASLEEP)
    assert [r["max_rel_error"] for r in record.candidates] == [None, None]
    assert all(r["passed"] and r["step_ms"] > 0 for r in record.candidates)


# ------------------------------------------------------------------------------------------------------- spinning


@pytest.fixture
def two_cores(monkeypatch) -> None:
    monkeypatch.setattr(choose, "cores", lambda: 2)


@pytest.mark.parametrize(
    ("spins", "kept"), [(1.0, True), (2.0 / MARGIN + 0.01, False), (None, False)], ids=["faster", "too-close", "fails"]
)
def test_threads_spin_where_that_was_measured_to_be_faster(bundle, monkeypatch, two_cores, spins, kept):
    times = {"onnxruntime": 2.0, "onnxruntime, spinning": spins, "openvino": 9.0}
    monkeypatch.setattr(choose, "interleaved", lambda calls: {name: times[name] for name in calls})
    record = build(bundle, target("cpu"), recipe("fp32"))
    assert [(r["library"], r["spinning"], r["step_ms"]) for r in record.candidates] == [
        ("onnxruntime", False, 2.0),
        ("onnxruntime", True, spins),
        ("openvino", False, 9.0),
    ]
    assert {name: plan.options["spinning"] for name, plan in record.plans.items()} == {
        name: kept and name == "step" for name in record.plans
    }
    opened = Bundle.open(bundle)
    assert engines.find(opened, "cpu", "fp32") == record
    assert engines.load(opened, record)


def test_both_ways_are_run_and_compute_the_same(bundle, two_cores):
    record = build(bundle, target("cpu"), recipe("fp32"))
    errors = {r["spinning"]: r["max_rel_error"] for r in record.candidates if r["library"] == "onnxruntime"}
    assert errors[True] == pytest.approx(errors[False], rel=1e-3)
    assert all(r["step_ms"] > 0 for r in record.candidates)


@pytest.mark.parametrize(("way", "spins"), [(Spinning.ON, True), (Spinning.OFF, False), (Spinning.AUTO, False)])
def test_a_setting_decides_where_the_library_is_named(bundle, way, spins):
    record = build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime", settings=Settings(spinning=way))
    assert (record.plans["step"].options["spinning"], record.candidates) == (spins, ())


def test_a_session_spins_during_a_call_and_not_beyond(bundle):
    from lehr.runtime.backends.onnxruntime import session_options

    for spins in (True, False):
        made = session_options({"intra_op_threads": 2, "spinning": spins})
        for key in ("session.intra_op.allow_spinning", "session.force_spinning_stop"):
            assert made.get_session_config_entry(key) == str(int(spins))


def test_what_cannot_gain_is_not_tried_with_spinning_threads(bundle, two_cores, monkeypatch):
    record = engines.engines(Bundle.open(bundle))[0]
    candidate = Candidate(library="onnxruntime", folder=bundle / record.folder, plans=record.plans)
    assert [(one.name, one.spinning) for one in with_spinning(candidate)] == [("onnxruntime, spinning", True)]
    step = record.plans["step"]

    def changed(**options) -> Candidate:
        plan = replace(step, options={**step.options, **options})
        return replace(candidate, plans={**record.plans, "step": plan})

    assert with_spinning(changed(intra_op_threads=1)) == []
    assert with_spinning(changed(spinning=True)) == []
    assert with_spinning(changed(provider="CUDAExecutionProvider")) == []
    monkeypatch.setattr(choose, "SPIN_BELOW", 1000)
    assert with_spinning(candidate) == []


def test_spinning_leaves_out_libraries_that_have_no_such_setting_and_sleeping_none(bundle, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["build", str(bundle), "--library", "openvino", "--spinning", "on"])
    assert exit_.value.code == 2
    assert "openvino has no use for --spinning" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["build", str(bundle), "--spinning", "on", "--json"])
    assert json.loads(capsys.readouterr().out)["library"] == "onnxruntime"


# ------------------------------------------------------------------------------------------------- the command line


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


def test_short_calls_run_as_often_as_in_a_loop_and_long_ones_once_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "ROUNDS", 3)
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    took = choose.interleaved({"short": lambda: call("short", 0.001), "long": lambda: call("long", 0.04)})
    assert took["short"] < took["long"]
    assert order.count("long") == choose.WARM_UP + 3 * (1 + 1)
    assert order.count("short") > choose.WARM_UP + 3 * (1 + 3)
    turns = "".join(name[0] for name in order[2 * choose.WARM_UP :])
    assert re.fullmatch("(s{4,}ll){3}", turns), "one after the other, not mixed"
