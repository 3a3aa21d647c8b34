"""Clips of moving shapes, made from random numbers: what the small video models are trained on.

A shape is drawn by its signed distance in pixels, so edges are smooth and motion may be slower than a pixel a frame.

Shape legend: B clips, T frames, S pixels a side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CLASSES = (
    "disc to the right",
    "disc to the left",
    "square down",
    "square up",
    "bouncing ball",
    "turning hand",
    "growing ring",
    "disc in a circle",
)
COLOURS = np.array([[1, 0.25, 0.2], [0.3, 0.9, 0.35], [0.35, 0.55, 1], [1, 0.85, 0.2], [0.95, 0.4, 0.95]])
GROUND = np.array([0.05, 0.06, 0.12])
BUCKETS_A_PIXEL = 8.0  # motion buckets for a speed of one pixel a second


def clips(
    rng: np.random.Generator, labels: npt.NDArray[np.int64], *, frames: int, size: int
) -> npt.NDArray[np.float32]:
    """(B, 3, T, S, S) in [-1, 1], a clip of each class in ``labels`` (B,); place, size, speed and colour are random."""
    t = np.arange(frames) / (frames - 1)
    drawn = np.stack([_cover(str(CLASSES[label]), rng, t, size) for label in labels])  # (B, T, S, S)
    return _coloured(rng, drawn).transpose(0, 2, 1, 3, 4)


def darts(rng: np.random.Generator, buckets: Array, rates: Array, *, frames: int, size: int) -> npt.NDArray[np.float32]:
    """(B, T, 3, S, S) in [-1, 1]: darts that fly the way they point.

    Args:
        rng: of places, directions and colours.
        buckets: (B,) amount of motion; ``BUCKETS_A_PIXEL`` of them are a pixel a second.
        rates: (B,) frames a second.
        frames: of a clip.
        size: pixels a side.
    """
    speed = buckets / BUCKETS_A_PIXEL / rates  # pixels a frame
    drawn = []
    for pixels in speed:
        angle = rng.integers(8) * np.pi / 4
        way = np.array([np.cos(angle), np.sin(angle)])
        begin = size / 2 - way * rng.uniform(2.5, 4.5) + rng.uniform(-1.5, 1.5, 2)
        drawn.append(_dart(begin + np.arange(frames)[:, None] * pixels * way, angle, size))
    return _coloured(rng, np.stack(drawn))


def _coloured(rng: np.random.Generator, cover: Array) -> npt.NDArray[np.float32]:
    """Shares of pixels (B, T, S, S) as pictures (B, T, 3, S, S) of one colour a clip."""
    colours = COLOURS[rng.integers(len(COLOURS), size=len(cover))][:, None, :, None, None]
    ground = GROUND[:, None, None]
    unit = ground + cover[:, :, None] * (colours - ground)
    return np.asarray(2 * unit - 1, dtype=np.float32)


def _cover(kind: str, rng: np.random.Generator, t: Array, size: int) -> Array:
    """The share of each pixel that the shape covers, (T, S, S), at times ``t`` of 0 to 1."""
    radius = rng.uniform(2.2, 3.2)
    middle, near, far = size / 2, radius + 0.5, size - radius - 0.5
    aside = rng.uniform(near + 1, far - 1)
    slack = rng.uniform(0, 1.5, 2)
    there = (near + slack[0]) + t * (far - slack[1] - near - slack[0])
    if kind == "disc to the right":
        return _disc(there, np.full_like(t, aside), radius, size)
    if kind == "disc to the left":
        return _disc(size - there, np.full_like(t, aside), radius, size)
    if kind == "square down":
        return _square(np.full_like(t, aside), there, 0.85 * radius, size)
    if kind == "square up":
        return _square(np.full_like(t, aside), size - there, 0.85 * radius, size)
    if kind == "bouncing ball":
        phase = (2 * t + rng.uniform(0, 0.15)) % 1.0  # two falls and two rises
        height = 4 * phase * (1 - phase)
        return _disc(np.full_like(t, aside), far - height * (far - near) * rng.uniform(0.8, 1), radius, size)
    if kind == "turning hand":
        return _hand(2 * np.pi * (rng.uniform() + 0.8 * t), 0.42 * size, size)
    if kind == "growing ring":
        grown = 1.5 + t * rng.uniform(0.26, 0.34) * size
        y, x = _pixels(size)
        distance = np.hypot(x - middle - slack[0] + 0.75, y - middle - slack[1] + 0.75)
        return _filled(np.abs(distance - grown[:, None, None]) - 0.8)
    turn = 2 * np.pi * (rng.uniform() + 0.8 * t)
    around = middle - radius - 0.5
    return _disc(middle + around * np.cos(turn), middle + around * np.sin(turn), 0.9 * radius, size)


def _pixels(size: int) -> tuple[Array, Array]:
    """Rows and columns of the pixels' middles, each (1, S, S)."""
    at: Array = np.arange(size, dtype=np.float64) + 0.5
    return at[None, :, None], at[None, None, :]


def _filled(distance: Array) -> Array:
    """The covered share of pixels whose middles are ``distance`` outside of an edge."""
    return np.clip(0.5 - distance, 0, 1)


def _disc(x: Array, y: Array, radius: float, size: int) -> Array:
    rows, columns = _pixels(size)
    return _filled(np.hypot(columns - x[:, None, None], rows - y[:, None, None]) - radius)


def _square(x: Array, y: Array, half: float, size: int) -> Array:
    rows, columns = _pixels(size)
    return _filled(np.maximum(np.abs(columns - x[:, None, None]), np.abs(rows - y[:, None, None])) - half)


def _hand(angle: Array, length: float, size: int) -> Array:
    rows, columns = _pixels(size)
    along, across = _turned(columns - size / 2, rows - size / 2, angle[:, None, None])
    return _filled(np.hypot(along - np.clip(along, 0, length), across) - 1.1)


def _dart(places: Array, angle: float, size: int) -> Array:
    """A triangle with its tip ahead; ``places`` (T, 2) of its middle."""
    rows, columns = _pixels(size)
    along, across = _turned(columns - places[:, :1, None], rows - places[:, 1:, None], np.array(angle))
    slope = np.hypot(1.0, 0.55)
    return _filled(np.maximum(-along - 2.5, (0.55 * (along - 4.0) + np.abs(across)) / slope))


def _turned(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    """Coordinates along and across a direction."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
