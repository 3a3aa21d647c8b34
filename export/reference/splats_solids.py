"""Coloured solids as sets of 3-D Gaussians, made from random numbers, and the words that name them.

Each Gaussian is a flat disc on the solid's surface, in the channels of
:mod:`lehr.export.backbones._splat_renderer`; its colour is the solid's, lit from above.

Shape legend: B solids, N Gaussians.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lehr.export.backbones._splat_renderer import LOG_SCALE

Array = npt.NDArray[np.float64]

COLOURS = {
    "red": (0.95, 0.25, 0.2),
    "green": (0.25, 0.8, 0.35),
    "blue": (0.25, 0.45, 1.0),
    "yellow": (1.0, 0.8, 0.15),
    "purple": (0.75, 0.35, 0.95),
}
VOCABULARY = 16  # channels of a word: one each, and some to spare
LOUDNESS = 4.0  # of that channel, so that a word has unit variance
OPACITY = 2.5  # logit
ACROSS, THROUGH = 0.11, 0.03  # standard deviations of a disc along the surface and through it
LIGHT = np.array([0.5, 0.8, 0.33])  # unit length, towards the light
DARKEST = 0.35


def _sphere(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    normal = _unit(rng.standard_normal((count, 3)))
    return 0.68 * normal, normal


def _cube(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    axis, side = rng.integers(3, size=count), rng.choice([-1.0, 1.0], size=count)
    normal = np.zeros((count, 3))
    normal[np.arange(count), axis] = side
    places = rng.uniform(-1, 1, (count, 3))
    places[np.arange(count), axis] = side
    return 0.52 * places, normal


def _torus(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Around the upright axis."""
    around, along = rng.uniform(0, 2 * np.pi, (2, count))
    outward = np.stack([np.cos(around), np.zeros(count), np.sin(around)], axis=1)
    normal = np.cos(along)[:, None] * outward + np.sin(along)[:, None] * np.array([0.0, 1.0, 0.0])
    return 0.6 * outward + 0.22 * normal, normal


def _cone(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Upright, its base included."""
    height, radius = 1.3, 0.62
    slant = np.hypot(height, radius)
    on_base = rng.uniform(size=count) < radius / (radius + slant)  # by area
    around, share = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(size=count))  # of the radius, by area
    outward = np.stack([np.cos(around), np.zeros(count), np.sin(around)], axis=1)
    up = np.array([0.0, 1.0, 0.0])
    base = radius * share[:, None] * outward - height / 2 * up
    side = radius * share[:, None] * outward + (height / 2 - height * share)[:, None] * up
    sloped = (height * outward + radius * up) / slant
    return np.where(on_base[:, None], base, side), np.where(on_base[:, None], -up, sloped)


def _helix(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """A tube that climbs in two turns."""
    t, around = rng.uniform(0, 1, count), rng.uniform(0, 2 * np.pi, count)
    angle, radius, tube, climb = 4 * np.pi * t, 0.55, 0.13, 1.2
    outward = np.stack([np.cos(angle), np.zeros(count), np.sin(angle)], axis=1)
    along = _unit(
        np.stack([-radius * np.sin(angle), np.full(count, climb / (4 * np.pi)), radius * np.cos(angle)], axis=1)
    )
    normal = np.cos(around)[:, None] * outward + np.sin(around)[:, None] * np.cross(along, outward)
    middle = radius * outward
    middle[:, 1] = climb * (t - 0.5)
    return middle + tube * normal, normal


SOLIDS: dict[str, Callable[[np.random.Generator, int], tuple[Array, Array]]] = {
    "sphere": _sphere,
    "cube": _cube,
    "torus": _torus,
    "cone": _cone,
    "helix": _helix,
}
WORDS = (*COLOURS, *SOLIDS)


def splats(rng: np.random.Generator, colour: str, solid: str, *, count: int) -> npt.NDArray[np.float32]:
    """(N, 14): a solid of one colour, its Gaussians drawn evenly from its surface."""
    places, normal = SOLIDS[solid](rng, count)
    lit = DARKEST + (1 - DARKEST) * np.clip(normal @ LIGHT, 0, 1)
    tint = 2 * lit[:, None] * np.array(COLOURS[colour]) - 1
    scales = np.log([ACROSS, ACROSS, THROUGH]) - LOG_SCALE
    fixed = np.broadcast_to(scales, (count, 3)), np.full((count, 1), OPACITY)
    found = np.concatenate([places, fixed[0], _turned_to(normal), fixed[1], tint], axis=1)
    return found.astype(np.float32)


def words(*spoken: str) -> npt.NDArray[np.float32]:
    """(words, ``VOCABULARY``): a channel of its own for each word."""
    found = np.zeros((len(spoken), VOCABULARY), np.float32)
    found[np.arange(len(spoken)), [WORDS.index(word) for word in spoken]] = LOUDNESS
    return found


def _unit(vectors: Array) -> Array:
    found: Array = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return found


def _turned_to(normal: Array) -> Array:
    """Quaternions (N, 4), real part first, of the shortest turn of the z axis to ``normal`` (N, 3) or its opposite.

    A disc is the same seen from either side, so the nearer of the two is taken, which no turn by half separates.
    """
    x, y, z = np.where(normal[:, 2:] < 0, -normal, normal).T
    return _unit(np.stack([1 + z, -y, x, np.zeros_like(z)], axis=1))
