"""The script with which the project gates its own models: red unless both pass, with the reason on view."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands in for Python with Lehr: says what it was asked, and fails where it is told to.
PYTHON = """#!/bin/sh
shift 2
echo "lehr $*"
case "$*" in *"$FAILS"*) echo "the reason" >&2; exit "$CODE";; esac
"""


def run(folder: Path, fails: str = "nothing", code: int = 0, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "ci").mkdir()
    shutil.copy(ROOT / "ci" / "gate_reference_models.sh", folder / "ci")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return subprocess.run(
        ["bash", str(folder / "ci" / "gate_reference_models.sh"), *arguments],
        env={**os.environ, "FAILS": fails, "CODE": str(code), "LEHR_GATE_REPORTS": str(folder / "reports")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("policy", ["release", "smoke"])
def test_both_models_are_gated_by_the_policy_that_is_asked_for(tmp_path, policy):
    done = run(tmp_path, "nothing", 0, *([] if policy == "release" else [policy]))
    assert done.returncode == 0, done.stderr
    for model in ("digits-dit", "digits-adm"):
        line = next(line for line in done.stdout.splitlines() if line.startswith("lehr gate") and model in line)
        assert f"--policy {policy}" in line
        assert f"--junit {tmp_path}/reports/{model}.xml" in line


@pytest.mark.parametrize(
    ("fails", "code"),
    [("export digits-dit", 3), ("build", 4), ("digits-dit.lehr --policy", 1), ("digits-adm.lehr --policy", 1)],
)
def test_what_fails_makes_it_red_and_both_models_are_reported(tmp_path, fails, code):
    done = run(tmp_path, fails, code)
    assert done.returncode == code
    assert "the reason" in done.stdout
    assert "-- digits-dit" in done.stdout
    assert "-- digits-adm" in done.stdout


def test_the_check_runs_it():
    assert "step gate bash ci/gate_reference_models.sh" in (ROOT / "ci" / "check.sh").read_text()
