"""Inputs of a stage that a user recorded, checked: arrays by name, or pictures for what encodes pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime import picture
from lehr.runtime.arrays import read_arrays
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.stage import StageKind, StageSpec

Array = npt.NDArray[Any]

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_UNIT = (-1.0, 1.0)  # that black and white are to diffusers' autoencoders
_ROWS = 8  # in one evaluation; pictures are looked at one by one, since their activations are large


def recorded_feeds(spec: StageSpec, path: Path) -> tuple[dict[str, Array], ...]:
    """A stage's inputs, in evaluations.

    Args:
        spec: of the stage.
        path: an ``.npz`` file or a folder of them, with an array for each input by its name; for an autoencoder's
            encoder also a picture or a folder of pictures, which are brought to the stage's default size.

    Raises:
        InvalidInput: no such file, an input that is missing or unknown, another type or shape, or values that are not
            finite; the message names file and array.
    """
    files = _files(spec, path)
    if files[0].suffix.lower() in PICTURES:
        return _pictures(spec, files)
    found: list[dict[str, Array]] = []
    for file in files:
        arrays = _checked(spec, file)
        rows = len(arrays[spec.inputs[0].name])
        step = _ROWS if spec.max_batch is None else 1
        for first in range(0, rows, step):
            part = slice(first, first + step)
            found.append({t.name: arrays[t.name][part] if t.batched else arrays[t.name] for t in spec.inputs})
    return tuple(found)


def _files(spec: StageSpec, path: Path) -> list[Path]:
    kinds = {".npz", *(PICTURES if spec.kind is StageKind.LATENT_ENCODER else ())}
    what = "recorded inputs (.npz)" + (" or pictures" if len(kinds) > 1 else "")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds)
        suffixes = {file.suffix.lower() == ".npz" for file in files}
        if len(suffixes) != 1:
            raise InvalidInput(f"{path} holds {'both kinds of' if suffixes else 'no'} {what} of stage {spec.name!r}.")
        return files
    if not path.is_file() or path.suffix.lower() not in kinds:
        raise InvalidInput(f"{path} is no file or folder of {what} of stage {spec.name!r}.")
    return [path]


def _pictures(spec: StageSpec, files: list[Path]) -> tuple[dict[str, Array], ...]:
    tensor = spec.inputs[0]
    _, channels, height, width = tensor.sizes(spec.default_sizes(batch=1))
    loaded = (picture.load(file, channels, _UNIT, height=height, width=width) for file in files)
    return tuple({tensor.name: np.ascontiguousarray(one[None])} for one in loaded)


def _checked(spec: StageSpec, file: Path) -> dict[str, Array]:
    try:
        arrays = read_arrays(file)
    except BundleError as e:
        raise InvalidInput(f"{file} cannot be read: {e}") from e
    expected = {tensor.name: tensor for tensor in spec.inputs}
    if set(arrays) != set(expected):
        raise InvalidInput(
            f"{file} holds the arrays {sorted(arrays)}, expected one for each input of stage {spec.name!r}: "
            f"{', '.join(expected)}."
        )
    for name, array in arrays.items():
        dtype = expected[name].dtype.numpy
        if not np.can_cast(array.dtype, dtype, casting="same_kind"):
            raise InvalidInput(f"{file}: {name!r} holds {array.dtype}, expected {dtype}. Convert it before saving.")
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            raise InvalidInput(f"{file}: {name!r} holds values that are not finite. Record the inputs again.")
        arrays[name] = array.astype(dtype)
    try:
        spec.check_feeds(arrays)
    except InvalidInput as e:
        raise InvalidInput(f"{file}: {e}") from e
    return arrays
