"""Decoding a large latent in tiles that overlap, so that memory stays that of one tile.

Every tile is decoded by itself and weighed by a ramp that falls to zero across the overlap; weights of neighbours add
up to one, so seams are blended and no pixel is brighter for being drawn twice (the idea of Jiménez 2023, "Mixture of
Diffusers", arXiv:2302.02412, applied to a decoder). A decoder whose pixels depend on less of the latent than half the
overlap is reproduced exactly in the middle of every tile; what reaches further (attention in the middle of an
AutoencoderKL, group normalisation) is computed tile by tile and makes the difference.

Shape legend: N pictures, C channels, H W height and width of the latent, f pixels along one side of a latent cell.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[np.float32]
Decode = Callable[[Array], Array]

AUTOMATIC_ABOVE = 128 * 128  # latent cells; 1024 x 1024 pixels, what published decoders were made for, stay whole
TILE = 64  # latent cells a side, 512 pixels of a decoder of factor 8
SMALLEST = 8
OVERLAP = 4  # a quarter of a tile


def tile_size(height: int, width: int, asked_for: int | None, *, sparing: bool) -> int | None:
    """Cells along a tile's side for a latent of ``height`` x ``width``; None decodes it whole.

    Args:
        height: of the latent.
        width: of the latent.
        asked_for: by the caller; None decides by size, 0 is whole.
        sparing: whether memory counts more than time: then every latent larger than a tile is tiled.

    Raises:
        InvalidInput: a tile below :data:`SMALLEST` cells.
    """
    if asked_for is not None and asked_for != 0:
        if asked_for < SMALLEST:
            raise InvalidInput(f"a tile has at least {SMALLEST} latent cells a side, got {asked_for}; 0 decodes whole.")
        return asked_for if max(height, width) > asked_for else None
    limit = TILE * TILE if sparing else AUTOMATIC_ABOVE
    return TILE if asked_for is None and height * width > limit else None


def tiled(decode: Decode, latent: Array, *, tile: int, factor: int) -> Array:
    """Decode tile by tile.

    Args:
        decode: (N, C, h, w) -> (N, c, f h, f w), for any h and w up to ``tile``.
        latent: (N, C, H, W).
        tile: cells along a tile's side; neighbours share a quarter of them.
        factor: f.

    Returns:
        (N, c, f H, f W).
    """
    height, width = latent.shape[2:]
    rows, columns = _spans(height, tile), _spans(width, tile)
    down, across = _weights(rows, factor), _weights(columns, factor)
    picture: Array | None = None
    for y, (top, bottom) in enumerate(rows):
        for x, (left, right) in enumerate(columns):
            part = decode(latent[:, :, top:bottom, left:right])
            expected = ((bottom - top) * factor, (right - left) * factor)
            if part.shape[2:] != expected:
                raise InvalidInput(f"the decoder returned {part.shape[2:]} pixels for a tile, expected {expected}.")
            if picture is None:
                picture = np.zeros((*part.shape[:2], height * factor, width * factor), dtype=np.float32)
            where = np.s_[:, :, top * factor : bottom * factor, left * factor : right * factor]
            picture[where] += part * (down[y][:, None] * across[x])
    if picture is None:
        raise InvalidInput(f"a latent of shape {latent.shape} holds nothing to decode.")
    return picture


def _spans(size: int, tile: int) -> list[tuple[int, int]]:
    """(begin, end) of the tiles along one side: as few as share a quarter with their neighbours, evenly spread."""
    if size <= tile:
        return [(0, size)]
    stride = tile - tile // OVERLAP
    count = 1 + -(-(size - tile) // stride)
    return [(k * (size - tile) // (count - 1), k * (size - tile) // (count - 1) + tile) for k in range(count)]


def _weights(spans: list[tuple[int, int]], factor: int) -> list[Array]:
    """Each tile's ramp along one side, in pixels; at every pixel the ramps of all tiles add up to 1."""
    total = np.zeros(spans[-1][1] * factor, dtype=np.float32)
    ramps = []
    for k, (begin, end) in enumerate(spans):
        pixels = np.arange((end - begin) * factor, dtype=np.float32) + np.float32(0.5)
        edge = np.float32(max(1, (end - begin) // OVERLAP * factor))
        ramp = np.ones_like(pixels)
        if k > 0:
            ramp = np.minimum(ramp, pixels / edge)
        if k + 1 < len(spans):
            ramp = np.minimum(ramp, pixels[::-1] / edge)
        ramps.append(ramp)
        total[begin * factor : end * factor] += ramp
    shares = zip(ramps, spans, strict=True)
    return [(ramp / total[begin * factor : end * factor]).astype(np.float32) for ramp, (begin, end) in shares]
