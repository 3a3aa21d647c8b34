"""The range audit as a picture: layers down, timesteps across, the largest magnitude as colour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lehr.calibration.keep_high import FP8_LARGEST, Finding, Kind
from lehr.calibration.ranges import Ranges
from lehr.engines.graph.passes.half import MOVES

Array = npt.NDArray[Any]

MAX_ROWS = 64  # deeper modules are joined until so many are left
CELL_W, CELL_H, FONT, MARGIN = 58, 17, 12, 14  # pixels
_STOPS = (  # log2 of the magnitude -> colour; the last three begin at 256, fp8's end and fp16's end
    (-8.0, (24, 28, 66)),
    (0.0, (42, 92, 140)),
    (4.0, (46, 150, 132)),
    (8.0, (160, 204, 90)),
    (math.log2(FP8_LARGEST), (246, 206, 70)),
    (math.log2(65504.0), (214, 66, 40)),
    (24.0, (120, 0, 60)),
)
_INK, _PAPER, _FAINT = (34, 34, 38), (255, 255, 255), (120, 120, 126)


def draw(ranges: Ranges, found: Iterable[Finding], title: str) -> Image.Image:
    """The picture; a cell says the magnitude, a frame round it what does not fit a format there.

    Args:
        ranges: what was measured.
        found: the findings to mark.
        title: first line.
    """
    names, peaks = _rows(ranges)
    marks = _marks(found, names, ranges)
    font = ImageFont.load_default(FONT)
    measuring = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label = max(int(measuring.textlength(name, font=font)) for name in (*names, "layer")) + MARGIN
    columns = peaks.shape[1]
    top = MARGIN * 2 + FONT * 3
    width = label + columns * CELL_W + 2 * MARGIN
    width = max(width, int(measuring.textlength(title, font=font)) + 2 * MARGIN, 620)
    height = top + len(names) * CELL_H + FONT * 6 + 3 * MARGIN
    image = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN // 2), title, fill=_INK, font=font)
    pen.text((MARGIN, top - 2 * FONT - 6), "timesteps", fill=_FAINT, font=font)
    for k, (first, last) in enumerate(ranges.timesteps.tolist()):
        for line, value in enumerate((first, last) if first != last else (first,)):
            text = f"{value:.4g}"
            x = label + MARGIN + k * CELL_W + (CELL_W - pen.textlength(text, font=font)) / 2
            pen.text((x, top - (2 - line) * (FONT + 1) - 6), text, fill=_FAINT, font=font)
    for row, name in enumerate(names):
        y = top + row * CELL_H
        pen.text((MARGIN, y + 1), name, fill=_INK, font=font)
        for k in range(columns):
            x = label + MARGIN + k * CELL_W
            colour = _colour(float(peaks[row, k]))
            pen.rectangle((x, y, x + CELL_W - 2, y + CELL_H - 2), fill=colour)
            text = _short(float(peaks[row, k]))
            ink = _PAPER if sum(colour) < 380 else _INK
            pen.text((x + (CELL_W - 2 - pen.textlength(text, font=font)) / 2, y + 1), text, fill=ink, font=font)
            for number, mark in enumerate(marks.get((row, k), ())):
                inset = 2 * number
                frame = (x + inset, y + inset, x + CELL_W - 2 - inset, y + CELL_H - 2 - inset)
                pen.rectangle(frame, outline=_FRAMES[mark], width=2)
    _legend(pen, font, top + len(names) * CELL_H + MARGIN)
    return image


_FRAMES = {
    "fp16: overflows or loses digits": (200, 20, 20),
    "bf16: loses digits, or a branch vanishes beside its skip": (90, 40, 180),
}


def _marks(found: Iterable[Finding], names: Sequence[str], ranges: Ranges) -> dict[tuple[int, int], list[str]]:
    """Cell -> what is wrong there, at the timestep where it is worst."""
    fp16, bf16 = _FRAMES
    marks: dict[tuple[int, int], list[str]] = {}
    starts = ranges.timesteps[:, 0].tolist()
    for finding in found:
        if finding.kind is Kind.SATURATES:
            continue  # the colour says it
        row = next((k for k, name in enumerate(names) if _within(finding.layer, name)), None)
        if row is None:
            continue
        cell = marks.setdefault((row, starts.index(finding.timestep)), [])
        what = fp16 if finding.format == "fp16" else bf16
        if what not in cell:
            cell.append(what)
    return marks


def _rows(ranges: Ranges) -> tuple[list[str], Array]:
    """Layer names in the order of the graph, and each one's largest magnitude by bucket."""
    shown = [k for k, probe in enumerate(ranges.probes) if "/" in probe.node or probe.operator not in MOVES]
    layers = [ranges.probes[k].layer for k in shown]
    depth = max(layer.count(".") for layer in layers) + 1
    while depth > 1 and len({_cut(layer, depth) for layer in layers}) > MAX_ROWS:
        depth -= 1
    names = list(dict.fromkeys(_cut(layer, depth) for layer in layers))
    names = _few(names)
    peaks = np.zeros((len(names), ranges.peak.shape[1]), np.float32)
    for layer, peak in zip(layers, ranges.peak[shown], strict=True):
        row = names.index(_cut(layer, depth)) if _cut(layer, depth) in names else len(names) - 1
        peaks[row] = np.maximum(peaks[row], peak)
    return names, peaks


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= MAX_ROWS else [*names[: MAX_ROWS - 1], "(the rest)"]


def _cut(layer: str, depth: int) -> str:
    return ".".join(layer.split(".")[:depth])


def _within(layer: str, row: str) -> bool:
    return layer == row or layer.startswith(f"{row}.")


def _colour(peak: float) -> tuple[int, int, int]:
    value = math.log2(peak) if peak > 0 else _STOPS[0][0]
    value = min(max(value, _STOPS[0][0]), _STOPS[-1][0])
    for (low, one), (high, other) in itertools.pairwise(_STOPS):
        if value <= high:
            share = (value - low) / (high - low)
            red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
            return red, green, blue
    return _STOPS[-1][1]


def _short(value: float) -> str:
    if 1000 <= value < 1e5:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _legend(pen: ImageDraw.ImageDraw, font: Any, y: int) -> None:
    pen.text((MARGIN, y), "largest magnitude", fill=_FAINT, font=font)
    x = MARGIN + 120
    for value in (0.01, 0.1, 1, 10, 100, FP8_LARGEST, 4096, 65504, 1e6):
        pen.rectangle((x, y, x + CELL_W - 8, y + CELL_H - 2), fill=_colour(float(value)))
        ink = _PAPER if sum(_colour(float(value))) < 380 else _INK
        text = _short(float(value))
        pen.text((x + (CELL_W - 8 - pen.textlength(text, font=font)) / 2, y + 1), text, fill=ink, font=font)
        x += CELL_W - 8
    for number, (text, colour) in enumerate(_FRAMES.items()):
        line = y + (number + 1) * (FONT + 8)
        pen.rectangle((MARGIN, line, MARGIN + 22, line + FONT), outline=colour, width=2)
        pen.text((MARGIN + 30, line - 1), text, fill=_INK, font=font)
    line = y + (len(_FRAMES) + 1) * (FONT + 8)
    pen.text((MARGIN, line), f"fp8 E4M3 ends at {FP8_LARGEST:g}, fp16 at 65504", fill=_FAINT, font=font)
