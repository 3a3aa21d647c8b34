"""The table as Markdown, for the summary that a build server shows beside a run."""

from __future__ import annotations

from pathlib import Path

from lehr.ci.checks import Outcome, Report

_MARKS = {Outcome.PASSED: "✅", Outcome.FAILED: "❌", Outcome.WAIVED: "⚠️"}


def markdown(report: Report) -> str:
    """A heading with the verdict, and a row for each check."""
    lines = [
        f"### `{_cell(report.bundle)}` {report.verdict}",
        "",
        f"Engine `{_cell(report.engine)}`, model `{_cell(report.model)}`"
        + (f", baseline `{_cell(report.baseline)}`." if report.baseline else "."),
        "",
        "| | check | reason |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {_MARKS.get(check.outcome, check.outcome.value)} | `{_cell(check.name)}` | {_cell(check.reason)} |"
        for check in report.checks
    ]
    return "\n".join(lines) + "\n\n"


def append_summary(path: Path, report: Report) -> None:
    """Append the table to a file that other steps may have written to."""
    with path.open("a", encoding="utf-8") as file:
        file.write(markdown(report))


def _cell(text: str) -> str:
    """Text that ends no cell, row or code span, and starts no tag."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;").split())
