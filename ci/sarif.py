"""SARIF 2.1.0 (OASIS, 2020): failures as results, for servers that show findings beside a change.

Only what failed, or would have without a waiver, becomes a result: a server lists every result as an alert. There are
no time stamps: the same engine and policy give the same file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lehr import __version__
from lehr.ci.checks import Check, Outcome, Report
from lehr.runtime.errors import LehrError

VERSION = "2.1.0"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_LEVELS = {
    "L0": "The engine's structure is not what the bundle says.",
    "L1": "A single evaluation differs from eager PyTorch's by more than the policy allows.",
    "L2": "A whole loop differs from eager PyTorch's by more than the policy allows.",
    "L3": "The distribution of samples differs by more than the policy allows.",
    "L4": "The engine costs more beside the baseline than the policy allows.",
}


def write(path: Path, report: Report) -> None:
    """A result for each failure and each waived one, the latter suppressed with the waiver's reason."""
    found = [check for check in report.checks if check.outcome in (Outcome.FAILED, Outcome.WAIVED)]
    rules = sorted({check.level for check in found})
    run = _run(
        [{"id": rule, "shortDescription": {"text": _LEVELS.get(rule, f"Checks of {rule}.")}} for rule in rules],
        {"executionSuccessful": True},
    )
    run["results"] = [_result(check, rules.index(check.level), report.bundle) for check in found]
    _write(path, run)


def write_error(path: Path, error: LehrError) -> None:
    """A run without results, with the error that kept the gate from judging."""
    notification = {"level": "error", "message": {"text": str(error)}, "descriptor": {"id": type(error).__name__}}
    invocation = {
        "executionSuccessful": False,
        "exitCode": error.exit_code,
        "toolExecutionNotifications": [notification],
    }
    _write(path, {**_run([], invocation), "results": []})


def _run(rules: list[dict[str, Any]], invocation: dict[str, Any]) -> dict[str, Any]:
    return {
        "tool": {"driver": {"name": "lehr gate", "version": __version__, "rules": rules}},
        "invocations": [invocation],
    }


def _result(check: Check, rule: int, bundle: str) -> dict[str, Any]:
    """A result at the bundle's manifest: servers want a file, and this is the one that says what was judged."""
    made: dict[str, Any] = {
        "ruleId": check.level,
        "ruleIndex": rule,
        "level": "error" if check.outcome is Outcome.FAILED else "warning",
        "message": {"text": f"{check.name}: {check.reason}"},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": f"{quote(bundle)}/manifest.json"},
                    "region": {"startLine": 1},
                }
            }
        ],
        "partialFingerprints": {"check/v1": check.name},
    }
    if check.outcome is Outcome.WAIVED:
        made["suppressions"] = [{"kind": "external", "justification": check.reason}]
    return made


def _write(path: Path, run: dict[str, Any]) -> None:
    log = {"$schema": SCHEMA, "version": VERSION, "runs": [run]}
    path.write_text(json.dumps(log, indent=1, allow_nan=False) + "\n", encoding="utf-8")
