"""The README's support matrix is what targets and evidence say, and claims nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lehr.engines.target import targets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "benchmarks" / "support_matrix.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_matrix"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["support_matrix"]


def cells(table: str, target: str) -> list[str]:
    row = next(line for line in table.splitlines() if f"`{target}`" in line)
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_readme_holds_the_table_that_targets_and_evidence_give(matrix):
    """If this fails: python benchmarks/support_matrix.py."""
    readme = (ROOT / "README.md").read_text()
    assert matrix.placed(readme, matrix.table(matrix.runs())) == readme


def test_every_target_has_a_row_and_without_evidence_none_has_run(matrix):
    table = matrix.table([])
    for name in targets():
        assert cells(table, name)[4:] == ["no", "no engine has been run there"]
    assert cells(table, "cpu")[3] == "yes (x86-64)"
    assert cells(table, "rtx-20")[3] == "yes, fp16 only"
    assert cells(table, "orin-agx")[3] == "build kit"
    assert cells(table, "cuda")[3] == "no"


def test_a_run_says_which_where_and_when_and_what_is_still_missing(matrix, tmp_path):
    for path in matrix.EVIDENCE.glob("*.json"):
        data = json.loads(path.read_text())
        data["gate"]["passed"] = False
        (tmp_path / path.name).write_text(json.dumps(data))
    known = matrix.runs(tmp_path)
    assert known, "benchmarks/evidence holds no report"
    *_, run, missing = cells(matrix.table(known), "cpu")
    assert "digits-dit fp32 on" in run
    assert f"{known[0].date}, **does not pass**" in run
    assert missing.startswith("aarch64")


def test_evidence_bears_no_path_of_the_machine_that_made_it(matrix):
    for path in matrix.EVIDENCE.glob("*.json"):
        text = path.read_text()
        assert not [mark for mark in ("/tmp", "/home", "/root", "/work") if mark in text], path.name


def test_a_document_without_its_marks_is_refused(matrix):
    with pytest.raises(SystemExit, match="must hold"):
        matrix.placed("no marks", "")
