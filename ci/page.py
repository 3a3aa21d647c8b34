"""The report: one HTML file that needs nothing else, for people who must decide."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.ci.chart import Series, chart
from lehr.ci.checks import DistributionSeries, LoopSeries, Outcome, Report
from lehr.ci.policy import LEVELS
from lehr.runtime.errors import InvalidInput
from lehr.runtime.picture import grid, to_bytes

FILE = "report.html"
MAX_PICTURES = 10  # of a loop
MAX_SIDE = 96  # pixels of one picture; larger ones are thinned out

_PNG = b"\x89PNG\r\n\x1a\n"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6670; --line: #d8dde2; --page: #fff; --card: #f5f7f9;
  --good: #116b3c; --bad: #b3261e; --warn: #8a5a00; --a: #1f6feb; --b: #8a3ffc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b0; --line: #343c44; --page: #14181c;
  --card: #1c2228; --good: #4cc38a; --bad: #ff8a80; --warn: #e0a83c; --a: #6cb0ff; --b: #be95ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 0 0 4px; }
p { margin: 4px 0; }
.soft { color: var(--soft); overflow-wrap: anywhere; }
.verdict { border-left: 6px solid var(--bad); background: var(--card); padding: 16px 18px; border-radius: 4px; }
.verdict.good { border-color: var(--good); }
.verdict b { color: var(--bad); } .verdict.good b { color: var(--good); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; font-weight: 600; }
td:first-child code { font-weight: 400; }
.facts td:first-child { width: 1%; padding-right: 28px; }
.verdict ul { margin: 8px 0; padding-left: 20px; } .verdict li { overflow-wrap: anywhere; }
.checks th, .checks td:nth-child(2) { white-space: nowrap; } .checks td:last-child { width: 100%; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
.o-pass { color: var(--good); } .o-FAIL { color: var(--bad); } .o-waived { color: var(--warn); }
.o-note, .o-none { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px; }
figure { margin: 0; background: var(--card); border-radius: 4px; padding: 12px; min-width: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--bad); stroke-dasharray: 2 3; }
polyline { fill: none; stroke-width: 2; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .limit { stroke: var(--soft); stroke-dasharray: 6 4; }
.legend { font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 16px; }
.legend i { display: inline-block; width: 22px; height: 0; margin: 0 6px 4px 0; border-top: 2px solid; }
.legend i.a { border-color: var(--a); } .legend i.b { border-color: var(--b); }
.legend i.limit { border-color: var(--soft); border-top-style: dashed; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px; }
.pictures img { width: 100%; image-rendering: pixelated; display: block; border-radius: 2px; }
.maps figure { overflow-x: auto; } .maps img { width: 100%; min-width: 720px; height: auto; display: block; }
.history td:first-child { white-space: normal; }
@media (max-width: 620px) {
  body { padding: 16px 14px 40px; }
  .checks thead { display: none; } .checks td:nth-child(2) { white-space: normal; }
  .checks tr { display: grid; grid-template-columns: 64px 1fr; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .checks td { border: 0; padding: 0; } .checks td:last-child { grid-column: 2; }
  .facts tr { display: block; padding: 6px 0; border-bottom: 1px solid var(--line); }
  .facts td, .facts td:first-child { display: block; border: 0; padding: 0; width: auto; white-space: normal; }
}
"""

# ------------------------------------------------------------------------------------------------------- the file


def make_folder(folder: Path) -> None:
    """Make the report's folder if it is missing; raises InvalidInput where that cannot be, before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InvalidInput(f"cannot make the folder {folder} for the report: {e.strerror}. Name another one.") from e
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"cannot write into {folder}. Name another folder for the report.")


def write_report(folder: Path, report: Report, data: Mapping[str, Any]) -> Path:
    """Write ``folder/report.html`` and, with ``data``, ``report.json``, which merges; returns the page."""
    path = folder / FILE
    path.write_text(page(report), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    return path


def page(report: Report) -> str:
    """The whole file."""
    title = f"{report.bundle} {report.verdict}"
    body = [_verdict(report), _checks(report)]
    if report.steps is not None:
        body.append(_curves(report))
    body += [_pictures(name, loop, report.value_range) for name, loop in report.loops.items()]
    if report.distribution is not None:
        body.append(_distribution(report, report.distribution))
    body += [_history(report.history)] if report.history else []
    body += [_maps(report.pictures)] if report.pictures else []
    body += [_facts("Environment", report.environment), _facts("SHA-256", report.hashes)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _verdict(report: Report) -> str:
    failed = report.count(Outcome.FAILED)
    counts = f"{report.count(Outcome.PASSED)} checks passed, {failed} failed, {report.count(Outcome.WAIVED)} waived."
    about = f"model {report.model}, engine {report.engine}, requires {', '.join(report.required)}"
    if report.baseline:
        about += f", baseline {report.baseline}"
    wrong = [
        f"{level} failed: {', '.join(names)}"
        for level in LEVELS
        if (names := [c.name for c in report.checks if c.level == level and c.outcome is Outcome.FAILED])
    ]
    wrong += [
        f"loop {name} {check.reason}"
        for name, loop in report.loops.items()
        for check in report.checks
        if loop.diverges_at is not None and check.name == f"L2.{name}.drift"
    ]
    if report.culprit is not None:
        wrong.append(f"look first at: {report.culprit.text}")
    items = "".join(f"<li>{html.escape(line)}</li>" for line in wrong)
    return (
        f'<div class="verdict{" good" if report.passed else ""}"><h1>{html.escape(report.bundle)} '
        f"<b>{html.escape(report.verdict)}</b></h1><p>{counts}</p>{f'<ul>{items}</ul>' if items else ''}"
        f'<p class="soft">{html.escape(about)}</p></div>'
    )


def _checks(report: Report) -> str:
    rows = []
    for check in report.checks:
        style = "none" if check.outcome is Outcome.NOT_RUN else check.outcome.value
        rows.append(
            f'<tr><td class="o-{style}">{check.outcome.value}</td><td><code>{html.escape(check.name)}</code></td>'
            f"<td>{html.escape(check.reason)}</td></tr>"
        )
    head = "<thead><tr><th>outcome</th><th>check</th><th>reason</th></tr></thead>"
    return f'<h2>Checks</h2><table class="checks">{head}<tbody>{"".join(rows)}</tbody></table>'


def _facts(title: str, facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in facts.items()
    )
    return f'<h2>{title}</h2><table class="facts"><tbody>{rows}</tbody></table>'


# -------------------------------------------------------------------------------------------------------- figures


def _curves(report: Report) -> str:
    figures = []
    if report.steps is not None:
        steps = report.steps
        drawn = chart(
            "score error by timestep",
            "timestep",
            steps.timesteps,
            [
                Series(name="score error", style="a", values=steps.rel_error),
                Series(name="allowed", style="limit", values=steps.limits),
            ],
        )
        figures.append(f"<figure><h3>Score error of single evaluations</h3>{drawn}</figure>")
    for name, loop in report.loops.items():
        drawn = chart(
            f"drift of loop {name}",
            "evaluations done",
            range(len(loop.drift)),
            [
                Series(name="drift from eager", style="b", values=loop.drift),
                Series(name="explained", style="limit", values=loop.explained),
            ],
            mark=loop.diverges_at,
        )
        figures.append(f"<figure><h3>Drift of loop {html.escape(name)}</h3>{drawn}</figure>")
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'


def _pictures(name: str, loop: LoopSeries, value_range: tuple[float, float]) -> str:
    return _side_by_side(f"Samples of loop {name}", ("eager PyTorch", loop.eager), loop.engine, value_range)


def _distribution(report: Report, series: DistributionSeries) -> str:
    """L3: what was drawn from the same seeds, and what the distances mean."""
    pictures = _side_by_side(
        f"{series.samples} samples of the same seeds, the first of them",
        ("portable graph, fp32", series.reference),
        series.engine,
        report.value_range,
    )
    rows = {check.name: check.reason for check in report.checks if check.level == "L3"}
    rows["network"] = f"{series.network}, SHA-256 {series.sha256}"
    return pictures + _facts("Distribution (L3)", rows)


def _history(history: Mapping[str, Mapping[str, float]]) -> str:
    """Recorded parity, the baseline's beside this bundle's."""
    names = list(dict.fromkeys(name for column in history.values() for name in column))
    head = "".join(f"<th>{html.escape(title)}</th>" for title in ("recorded parity", *history))
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td>"
        + "".join(f"<td>{column[name]:.4g}</td>" if name in column else "<td>-</td>" for column in history.values())
        + "</tr>"
        for name in names
    )
    return f'<h2>History</h2><table class="history"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _maps(pictures: Mapping[str, bytes]) -> str:
    figures = "".join(
        f'<figure><h3>{html.escape(name)}</h3><img class="map" alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode("ascii")}"></figure>'
        for name, data in pictures.items()
        if data.startswith(_PNG)
    )
    return f'<h2>Calibration</h2><div class="maps">{figures}</div>' if figures else ""


def _side_by_side(
    title: str, left: tuple[str, npt.NDArray[Any]], right: npt.NDArray[Any], value_range: tuple[float, float]
) -> str:
    heading = f"<h2>{html.escape(title)}</h2>"
    eager, engine = (_thinned(np.nan_to_num(samples[:MAX_PICTURES])) for samples in (left[1], right))
    width = value_range[1] - value_range[0]
    difference = np.abs(engine.astype(np.float64) - eager)
    largest = float(difference.max())
    factor = width / largest if largest > 0 else 1.0
    shown = value_range[0] + np.minimum(difference * factor, width)
    try:
        pictures = [to_bytes(samples, value_range) for samples in (eager, engine, shown)]
    except InvalidInput as e:
        return f'{heading}<p class="soft">{html.escape(str(e))}</p>'
    captions = (left[0], "this engine", f"difference × {factor:.3g}" if largest > 0 else "no difference")
    figures = "".join(
        f'<figure><h3>{caption}</h3><img alt="{caption}, {len(sheet)} samples" '
        f'src="{_data_uri(grid(sheet, columns=5))}"></figure>'
        for caption, sheet in zip(captions, pictures, strict=True)
    )
    return f'{heading}<div class="pictures">{figures}</div>'


def _thinned(samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Every n-th pixel of pictures that are larger than a report needs."""
    if samples.ndim != 4:
        return samples
    every = -(-max(samples.shape[2:]) // MAX_SIDE)
    return samples[:, :, ::every, ::every]


def _data_uri(picture: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
