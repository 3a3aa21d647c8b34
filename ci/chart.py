"""Line charts as inline SVG: a few series over one axis, the vertical one logarithmic."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 240  # of the viewBox; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 14, 42
_LEAST = 1e-9  # where 0 is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line.

    Attributes:
        name: for the legend.
        style: CSS class of the line: "a", "b" for what was measured, "limit" for what was allowed.
        values: one a position.
    """

    name: str
    style: str
    values: Sequence[float]


def chart(
    title: str, axis: str, positions: Sequence[float], series: Sequence[Series], *, mark: int | None = None
) -> str:
    """An SVG element.

    Args:
        title: what screen readers say.
        axis: what the horizontal axis counts.
        positions: where the values stand, in rising or falling order; drawn from left to right as they come.
        series: lines of as many values.
        mark: index of a position to point out.
    """
    floor = [max(v, _LEAST) for one in series for v in one.values if math.isfinite(v)]
    low, high = math.floor(math.log10(min(floor))), math.ceil(math.log10(max(floor)))
    high = max(high, low + 1)
    first, last = positions[0], positions[-1]

    def x(position: float) -> float:
        return _LEFT + (position - first) / ((last - first) or 1) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        exponent = math.log10(max(value, _LEAST)) if math.isfinite(value) else high
        return _TOP + (high - min(exponent, high)) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for exponent in range(low, high + 1, max(1, (high - low) // 5)):
        at = y(10.0**exponent)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{WIDTH - _RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    base = HEIGHT - _BOTTOM
    for k in sorted({round(i * (len(positions) - 1) / 4) for i in range(5)}):
        at = x(positions[k])
        parts.append(f'<text x="{at:.1f}" y="{base + 20}" text-anchor="middle">{positions[k]:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(axis)}</text>'
    )
    if mark is not None:
        at = x(positions[mark])
        parts.append(f'<line class="mark" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{base}"/>')
    for one in series:
        points = [(x(p), y(v)) for p, v in zip(positions, one.values, strict=True)]
        drawn = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(
            f'<polyline class="{one.style}" points="{drawn}"><title>{html.escape(one.name)}</title></polyline>'
        )
    legend = "".join(f'<span><i class="{one.style}"></i>{html.escape(one.name)}</span>' for one in series)
    return "".join([*parts, "</svg>"]) + f'<p class="legend">{legend}</p>'
