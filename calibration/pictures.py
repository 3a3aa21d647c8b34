"""Searches as pictures: what every layer does to the result at every timestep, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lehr.calibration.cost_model import Costs
from lehr.calibration.heat_map import CELL_H, CELL_W, FONT, MARGIN, MAX_ROWS
from lehr.calibration.problem import Found, Point
from lehr.calibration.sensitivity import Sensitivity

Array = npt.NDArray[Any]

_INK, _PAPER, _FAINT, _GRID = (34, 34, 38), (255, 255, 255), (120, 120, 126), (226, 226, 230)
_ENDS = ((24, 28, 66), (42, 92, 140), (46, 150, 132), (160, 204, 90), (246, 206, 70), (214, 66, 40))
_SPAN = 5.0  # decades of the mean squared error from the darkest colour to the lightest
_FRONT, _OTHER, _UNIFORM, _CHOSEN = (31, 97, 141), (176, 182, 190), (192, 57, 43), (30, 132, 73)
WIDTH, HEIGHT = 760, 460  # pixels of the front


def draw_sensitivity(found: Sensitivity, title: str) -> Image.Image:
    """Layers down, timesteps across, a block of columns an option; the number is the PSNR-like loss of that cell.

    A cell is 10 log10 of the mean squared error that quantising the layer adds to the final sample there, relative to
    the largest cell: 0 dB is where it hurts most. Deeper modules are joined until they fit.
    """
    names, values = _rows(found)
    top_value = max(float(np.nanmax(block)) for block in values)
    font = ImageFont.load_default(FONT)
    measuring = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label = max(int(measuring.textlength(name, font=font)) for name in names) + MARGIN
    columns = len(found.points)
    block_width = columns * CELL_W + MARGIN
    width = label + len(found.options) * block_width + 2 * MARGIN
    top = MARGIN + FONT * 5
    image = Image.new("RGB", (max(width, 700), top + len(names) * CELL_H + FONT * 3 + MARGIN), _PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN // 2), f"{title}: what quantising a layer adds to the final error", fill=_INK, font=font)
    for k, option in enumerate(found.options):
        left = label + MARGIN + k * block_width
        pen.text((left, MARGIN + FONT + 4), option, fill=_INK, font=font)
        for column, timestep in enumerate(found.timesteps):
            text = f"{timestep:.4g}"
            x = left + column * CELL_W + (CELL_W - pen.textlength(text, font=font)) / 2
            pen.text((x, top - FONT - 8), text, fill=_FAINT, font=font)
        for row in range(len(names)):
            y = top + row * CELL_H
            for column in range(columns):
                _cell(pen, font, left + column * CELL_W, y, float(values[k][row, column]), top_value)
    for row, name in enumerate(names):
        pen.text((MARGIN, top + row * CELL_H + 1), name, fill=_INK, font=font)
    y = top + len(names) * CELL_H + MARGIN // 2
    pen.text((MARGIN, y), "dB below the largest; columns are timesteps", fill=_FAINT, font=font)
    return image


def _cell(pen: ImageDraw.ImageDraw, font: Any, x: float, y: float, value: float, largest: float) -> None:
    if not math.isfinite(value) or value <= 0:
        pen.rectangle((x, y, x + CELL_W - 2, y + CELL_H - 2), fill=_GRID)
        return
    below = math.log10(value / largest)
    colour = _colour(1 + below / _SPAN)
    pen.rectangle((x, y, x + CELL_W - 2, y + CELL_H - 2), fill=colour)
    text = f"{10 * below:.0f}"
    ink = _PAPER if sum(colour) < 380 else _INK
    pen.text((x + (CELL_W - 2 - pen.textlength(text, font=font)) / 2, y + 1), text, fill=ink, font=font)


def _colour(share: float) -> tuple[int, int, int]:
    position = min(max(share, 0.0), 1.0) * (len(_ENDS) - 1)
    k = min(int(position), len(_ENDS) - 2)
    red, green, blue = (round(a + (position - k) * (b - a)) for a, b in zip(_ENDS[k], _ENDS[k + 1], strict=True))
    return red, green, blue


def _rows(found: Sensitivity) -> tuple[list[str], list[Array]]:
    """Names of rows, and for each option their mean squared errors (rows, P); layers of one row add up."""
    modules = [layer.rpartition("/")[0] or layer for layer in found.layers]
    depth = max(module.count(".") for module in modules) + 1
    while depth > 1 and len({_cut(module, depth) for module in modules}) > MAX_ROWS:
        depth -= 1
    rows = [_cut(module, depth) for module in modules]
    names = list(dict.fromkeys(rows))[:MAX_ROWS]
    values = []
    for option in found.options:
        squares = found.by_timestep(option) ** 2
        block = np.full((len(names), squares.shape[1]), np.nan)
        for row, name in enumerate(names):
            members = squares[[k for k, other in enumerate(rows) if other == name]]
            known = members[~np.isnan(members).any(axis=1)]
            if len(known):
                block[row] = known.sum(axis=0)
        values.append(block)
    return names, values


def _cut(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


# ---------------------------------------------------------------------------------------------------- the front


def draw_front(found: Found, costs: Costs, title: str) -> Image.Image:
    """Cost across, loss up: every plan that was measured, the front among them, the budget as a line."""
    font = ImageFont.load_default(FONT)
    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    pen = ImageDraw.Draw(image)
    measure = found.budget.measure
    points = [(p, p.cost / found.full_cost, p.losses.mean(measure)) for p in found.points]
    points = [row for row in points if math.isfinite(row[2])]
    xs, ys = [x for _, x, _ in points], [y for *_, y in points] + [found.budget.limit]
    left, right, top, bottom = 70, WIDTH - 30, 50, HEIGHT - 60
    x_low, x_high = _padded(xs)
    y_low, y_high = _padded(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (right - left)
        return across, bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    pen.text((MARGIN, MARGIN // 2), f"{title}: {found.budget}, costs {costs.source.value} ({costs.where})", _INK, font)
    for value in _ticks(x_low, x_high):
        x, _ = place(value, y_low)
        pen.line((x, top, x, bottom), fill=_GRID)
        pen.text((x - 12, bottom + 6), f"{value:.3g}", fill=_FAINT, font=font)
    for value in _ticks(y_low, y_high):
        _, y = place(x_low, value)
        pen.line((left, y, right, y), fill=_GRID)
        pen.text((MARGIN, y - FONT / 2), f"{value:.4g}", fill=_FAINT, font=font)
    _, y = place(x_low, found.budget.limit)
    pen.line((left, y, right, y), fill=_UNIFORM)
    front = sorted(found.front(), key=lambda p: p.cost)
    pen.line([place(p.cost / found.full_cost, p.losses.mean(measure)) for p in front], fill=_FRONT, width=2)
    for point, x, value in points:
        _mark(pen, font, place(x, value), point, found, front)
    pen.text((left, HEIGHT - 24), "cost, of the graph with nothing quantised = 1", fill=_FAINT, font=font)
    pen.text(
        (left, top - 18), f"{measure.value}, mean of {found.points[0].losses.samples} held-out samples", _FAINT, font
    )
    return image


def _mark(
    pen: ImageDraw.ImageDraw, font: Any, at: tuple[float, float], point: Point, found: Found, front: Sequence[Point]
) -> None:
    x, y = at
    colour = _FRONT if point in front else _OTHER
    size = 3
    name = ""
    if point.name in {"fp8", "nvfp4"} or point.name.startswith("int"):
        colour, size, name = _UNIFORM, 5, point.name
    if found.chosen is not None and point.plan == found.chosen.plan:
        colour, size, name = _CHOSEN, 6, "chosen" if not name else f"{name}, chosen"
    pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    if name:
        before = x + 10 + pen.textlength(name, font=font) > WIDTH - MARGIN
        pen.text(
            (x - 10 - pen.textlength(name, font=font) if before else x + 9, y - FONT), name, fill=colour, font=font
        )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 6
    size = 10 ** math.floor(math.log10(raw))
    step = min((m * size for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
