"""Samples as a picture file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.arrays import read_arrays
from lehr.runtime.errors import BundleError, InvalidInput

GAP = 2  # pixels between pictures


def to_bytes(samples: npt.NDArray[Any], value_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """(N, C, H, W) in ``value_range`` -> (N, H, W, C) bytes, C 1 or 3.

    Raises:
        InvalidInput: another number of channels; latents have no picture without their decoder.
    """
    check_channels(samples.shape)
    low, high = value_range
    unit = (np.clip(samples, low, high) - low) / (high - low)
    pictures: npt.NDArray[np.uint8] = np.rint(unit * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return pictures


def check_channels(shape: tuple[int, ...]) -> None:
    """Raise InvalidInput unless (N, C, H, W) samples of ``shape`` are pictures."""
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise InvalidInput(
            f"samples of shape {shape[1:]} are no pictures (1 or 3 channels expected); write them to a .npz file."
        )


def frame_axis(shape: tuple[int | str, ...]) -> int | None:
    """The axis that counts frames in samples of the named ``shape``, as a spec has it; None where there is one picture.

    >>> frame_axis(("batch", 4, "frames", "height", "width"))
    2
    """
    return shape.index("frames") if "frames" in shape else None


def sheet(shots: npt.NDArray[Any], value_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """(N, K, C, H, W), K frames or views of each sample, as one picture: a sample a row."""
    return grid(to_bytes(shots.reshape(-1, *shots.shape[2:]), value_range), columns=shots.shape[1])


def film(shots: npt.NDArray[Any], value_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """(N, K, C, H, W) as K pictures (K, H', W', C), each of all samples side by side."""
    return np.stack([grid(to_bytes(shots[:, k], value_range)) for k in range(shots.shape[1])])


def grid(pictures: npt.NDArray[np.uint8], *, columns: int | None = None, zoom: int = 1) -> npt.NDArray[np.uint8]:
    """(N, H, W, C) -> one (rows, columns, C) picture, row by row, on white; each pixel drawn ``zoom`` times."""
    n, height, width, channels = pictures.shape
    columns = columns or min(n, max(1, round(math.sqrt(n * 2.5))))
    rows = -(-n // columns)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for k, picture in enumerate(pictures):
        y, x = (k // columns) * (height + GAP), (k % columns) * (width + GAP)
        sheet[y : y + height, x : x + width] = picture
    return sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)


def save_png(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    """Write a (H, W, C) picture; the file appears whole or not at all."""
    from PIL import Image

    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(partial, format="PNG")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_animation(path: Path, pictures: npt.NDArray[np.uint8], *, milliseconds: int = 500) -> None:
    """Write (N, H, W, C) pictures as the frames of a ``.gif`` or ``.webp``, shown again and again.

    The file appears whole or not at all. A GIF has 256 colours a frame; a WebP is written without loss.
    """
    from PIL import Image

    frames = [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pictures]
    kind = path.suffix.lower()[1:].upper()
    options = {"lossless": True} if kind == "WEBP" else {}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        frames[0].save(
            partial,
            format=kind,
            save_all=True,
            append_images=frames[1:],
            duration=milliseconds,
            loop=0,
            **options,
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_npz(path: Path, samples: npt.NDArray[np.float32]) -> None:
    """Write float32 samples under the name ``samples``; the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, samples=samples)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(
    path: Path,
    channels: int | str,
    value_range: tuple[float, float],
    *,
    height: int | None = None,
    width: int | None = None,
) -> npt.NDArray[np.float32]:
    """A sample from a file: a picture as (C, H, W) in ``value_range``, or the array of a .npz as it is.

    A .npz holds the array under ``samples``, or one array alone.

    Args:
        path: of the file.
        channels: of the sample; pictures have 1 or 3.
        value_range: that black and white are mapped to.
        height: in pixels, that a picture is resized to (Lanczos); None is its own.
        width: likewise.

    Raises:
        InvalidInput: no such file, no picture, an archive with other content, or a model whose samples are no pictures.
    """
    if path.suffix.lower() == ".npz":
        try:
            arrays = read_arrays(path)
        except (BundleError, OSError) as e:
            raise InvalidInput(f"cannot read {path}: {e}") from e
        if "samples" not in arrays and len(arrays) != 1:
            raise InvalidInput(f"{path} holds the arrays {sorted(arrays)}, expected 'samples' or one array alone.")
        array = arrays.get("samples", next(iter(arrays.values())))
        return np.asarray(array, dtype=np.float32)
    if channels not in {1, 3}:
        raise InvalidInput(f"{path} is a picture, but the model's samples have {channels} channels; give a .npz file.")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            converted = image.convert("L" if channels == 1 else "RGB")
            size = width or converted.width, height or converted.height
            if size != converted.size:
                converted = converted.resize(size, Image.Resampling.LANCZOS)
            pixels = np.asarray(converted, dtype=np.float32)
    except (UnidentifiedImageError, OSError) as e:
        raise InvalidInput(f"cannot read {path} as a picture or a .npz file: {e}") from e
    low, high = value_range
    unit = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1) / 255
    return np.asarray(low + (high - low) * unit, dtype=np.float32)


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Find out before the work whether ``path`` can be written.

    Raises:
        InvalidInput: an ending that is not known, a folder that does not exist, or one that cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise InvalidInput(f"cannot write {path.name!r}: the name must end in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise InvalidInput(f"cannot write {path}: the folder {path.parent} does not exist. Create it first.")
    if path.is_dir():
        raise InvalidInput(f"cannot write {path}: it is a folder. Name a file.")
    if not os.access(path.parent, os.W_OK):
        raise InvalidInput(f"cannot write {path}: no permission to write in {path.parent}.")
