"""The README's support matrix: what is built in CI, what has run on hardware, and what has not.

    python benchmarks/support_matrix.py            writes the table between the marks of README.md
    python benchmarks/support_matrix.py --print    prints it

Targets come from engines/targets, runs from the reports in benchmarks/evidence, which ``lehr evidence`` writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lehr.ci.reports import Reported, read_report
from lehr.engines.target import Target, targets
from lehr.runtime.recipe import Format

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "benchmarks" / "evidence"
README = ROOT / "README.md"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"

_TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
}
_AHEAD = "tensorrt_rtx"  # builds for GPUs that are not there; tests/engines/test_tensorrt_rtx_families.py does it
_ON_DEVICE = "tensorrt"  # builds on its own GPU; tests/engines/test_kit.py makes the kits


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One report: an engine that ran, on what, when, and whether it passed."""

    report: Reported
    date: str
    passed: bool
    where: str

    @property
    def arch(self) -> str:
        return self.report.environment.get("system", "").split(" ")[-1]


def runs(folder: Path = EVIDENCE) -> list[Run]:
    """Every report in ``folder``, by date and name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data, report = json.loads(path.read_text(encoding="utf-8")), read_report(path)
        machine = data["measured"]["machine"]
        where = machine.get("gpu") or machine.get("board") or report.environment["processor"]
        found.append(Run(report=report, date=data["date"], passed=data["gate"]["passed"], where=where))
    return sorted(found, key=lambda run: (run.date, run.report.file))


def built(target: Target) -> str:
    """What CI, which is x86-64 without a GPU, makes for a target."""
    if not target.libraries:
        return "no builder yet"
    if _AHEAD in target.libraries:
        return "yes" if Format.FP32 in target.formats else "yes, fp16 only"
    if _ON_DEVICE in target.libraries:
        return "build kit"
    return "no" if target.sm or any(target.devices.values()) else "yes (x86-64)"


def ran(target: Target, known: Sequence[Run]) -> str:
    """Engines that ran, on which machine, and when last."""
    cells = {}
    for run in known:
        if run.report.target == target.name:
            verdict = "" if run.passed else ", **does not pass**"
            key = (run.report.model, run.report.recipe, run.where)
            cells[key] = f"{run.report.model} {run.report.recipe} on {run.where} ({run.arch}), {run.date}{verdict}"
    return "; ".join(cells.values()) or "no"


def lacking(target: Target, known: Sequence[Run]) -> str:
    """What nobody has run yet."""
    mine = [run for run in known if run.report.target == target.name]
    if not mine:
        return "no engine has been run there"
    arch = sorted(set(target.arch) - {run.arch for run in mine})
    libraries = {run.report.engine.rpartition("--")[2].rpartition("-")[0] for run in mine}
    titles = [_TITLES.get(name, name) for name in target.libraries if name not in libraries]
    return ", ".join([*arch, *titles]) or "-"


def table(known: Sequence[Run]) -> str:
    """One row a target; those of one kind of machine that share all cells but the first two share a row."""
    lines = [
        "| target | compute capability | engine library | built in CI | run on hardware (which, when) | not yet run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[tuple[str, ...], list[Target]] = {}
    for target in sorted(targets().values(), key=lambda t: (bool(t.sm), t.name)):
        libraries = ", ".join(_TITLES.get(name, name) for name in target.libraries) or "none"
        shared = (libraries, built(target), ran(target, known), lacking(target, known))
        alone = target.name if shared[2] != "no" else ""
        rows.setdefault((f"{alone} {' '.join(target.arch)}", *shared), []).append(target)
    for (_, *cells), members in rows.items():
        sm = sorted({one for target in members for one in target.sm}, key=float)
        names = ", ".join(f"`{target.name}`" for target in members)
        lines.append(f"| {' | '.join([names, ', '.join(sm) or 'any', *cells])} |")
    return "\n".join(lines) + "\n"


def placed(document: str, rows: str) -> str:
    """The document with the rows between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    made, count = pattern.subn(lambda _: f"{BEGIN}\n{rows}{END}", document)
    if count != 1:
        raise SystemExit(f"README.md must hold {BEGIN} and {END} once; found {count} pairs.")
    return made


def main(arguments: Sequence[str]) -> None:
    """Write or print."""
    rows = table(runs())
    if "--print" in arguments:
        sys.stdout.write(rows)
        return
    README.write_text(placed(README.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
