"""Calibration data that a user recorded: inputs of the denoiser, checked, and put in order of their timesteps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.calibration.collected import BATCH, VERSION, Evaluation, Trajectories, cache_folder, content, write_part
from lehr.runtime.arrays import read_arrays
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.files import storage_errors
from lehr.runtime.spec import ModelSpec

Array = npt.NDArray[Any]

LEAST_RECORDED = 16  # rows of recorded inputs; fewer tell more about themselves than about the model


def recorded(bundle: Bundle, path: Path, *, folder: Path | None = None) -> Trajectories:
    """Calibration data from inputs that a user recorded.

    Args:
        bundle: of the model that they were fed to.
        path: an ``.npz`` file, or a folder of them, with an array for every input of the denoiser by its name: the
            sample (N, C, …), the timestep (N,), conditions (N, …).
        folder: where the data is kept in parts; by default :func:`cache_folder`.

    Raises:
        InvalidInput: no such file, an input that is missing or unknown, another shape, values that are not finite, or
            too few rows; the message names file, array and row.
    """
    spec, files = bundle.manifest.model, _files_of(path)
    names = {spec.sample.name, spec.timestep.name, *(tensor.name for tensor in spec.conditions)}
    digest = hashlib.sha256(f"recorded {VERSION}".encode())
    rows: dict[float, list[tuple[Path, int]]] = {}
    loaded: dict[Path, dict[str, Array]] = {}
    for file in files:
        arrays = _checked(spec, file, names)
        loaded[file] = arrays
        for name in sorted(arrays):
            digest.update(content(arrays[name]).encode())
        for k, t in enumerate(arrays[spec.timestep.name].tolist()):
            rows.setdefault(float(t), []).append((file, k))
    count = sum(len(found) for found in rows.values())
    if count < LEAST_RECORDED:
        raise InvalidInput(
            f"{path} holds {count} recorded inputs; calibration needs at least {LEAST_RECORDED}, better some hundred "
            "over all timesteps. Record more, or leave --data out to draw them."
        )
    place = (folder or cache_folder()) / digest.hexdigest()[:32]
    with storage_errors(f"making {place}"):
        place.mkdir(parents=True, exist_ok=True)
    timesteps = sorted(rows, reverse=True)
    parts: list[Path] = []
    for index, t in enumerate(timesteps):
        for first in range(0, len(rows[t]), 2 * BATCH):
            part = place / f"part-{len(parts):05d}.npz"
            parts.append(part)
            write_part(part, [_gathered(spec, loaded, rows[t][first : first + 2 * BATCH], index, t)])
    return Trajectories(
        parts=tuple(parts),
        timesteps=np.array(timesteps, np.float64),
        gains=np.ones(len(timesteps)),
        samples=count,
        source="recorded",
        conditions="recorded",
        digest=digest.hexdigest(),
    )


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise InvalidInput(f"{path} holds no .npz file. Expected recorded inputs of the denoiser, a file or more.")
        return files
    if not path.is_file():
        raise InvalidInput(f"no such file: {path}. Expected an .npz of recorded inputs, or a folder of them.")
    return [path]


def _checked(spec: ModelSpec, file: Path, names: set[str]) -> dict[str, Array]:
    try:
        arrays = read_arrays(file)
    except BundleError as e:
        raise InvalidInput(f"{file} cannot be read: {e}") from e
    if set(arrays) != names:
        missing, unknown = sorted(names - set(arrays)), sorted(set(arrays) - names)
        what = "; ".join(
            f"{word} {', '.join(found)}" for word, found in (("lacks", missing), ("has the unknown", unknown)) if found
        )
        raise InvalidInput(
            f"{file} {what}. Expected an array for each input of {spec.name}: {', '.join(sorted(names))}."
        )
    for name, array in arrays.items():
        bad = np.argwhere(~np.isfinite(array)) if array.dtype.kind == "f" else np.empty((0, 1))
        if len(bad):
            raise InvalidInput(
                f"{file}: {name!r} is {array[tuple(bad[0])]} in row {bad[0][0]}, expected finite numbers. "
                "Record the inputs again, or leave that row out."
            )
        dtype = next(tensor.dtype.numpy for tensor in spec.inputs if tensor.name == name)
        if not np.can_cast(array.dtype, dtype, casting="same_kind"):
            raise InvalidInput(f"{file}: {name!r} holds {array.dtype}, expected {dtype}. Convert it before saving.")
        arrays[name] = array.astype(dtype)
    spec.check_feeds(arrays)
    return arrays


def _gathered(
    spec: ModelSpec, loaded: Mapping[Path, Mapping[str, Array]], rows: Sequence[tuple[Path, int]], index: int, t: float
) -> Evaluation:
    """Rows of several files as one evaluation; what all samples of a file share is taken from the first."""
    shared = {tensor.name for tensor in spec.conditions if tensor.shape[:1] != ("batch",)}

    def gather(name: str) -> Array:
        first = loaded[rows[0][0]][name]
        return first if name in shared else np.stack([loaded[file][name][k] for file, k in rows])

    conditions = {tensor.name: gather(tensor.name) for tensor in spec.conditions}
    return Evaluation(index=index, sample=gather(spec.sample.name), timestep=t, conditions=conditions)
