"""Calibration data on disk: every evaluation's inputs, one file a batch of samples, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.arrays import read_arrays, write_arrays
from lehr.runtime.errors import BundleError
from lehr.runtime.files import storage_errors

Array = npt.NDArray[Any]

VERSION = 2  # of the files and of what is collected
BATCH = 4  # samples at once, as many again under guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation's inputs.

    Attributes:
        index: number of the evaluation in its loop; of recorded inputs that of their timestep, in falling order.
        sample: (B, C, …) float32.
        timestep: of all of them.
        conditions: name -> (B, …), or what all samples share.
    """

    index: int
    sample: Array
    timestep: float
    conditions: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Calibration data on disk.

    Attributes:
        parts: files, read one at a time.
        timesteps: (N,) float64, of the evaluations by their index.
        gains: (N,) float64, how an error of each evaluation enters the final sample
            (:meth:`lehr.runtime.solver_table.SolverTable.gains`); ones for recorded inputs.
        samples: how many rows of each evaluation there are; of recorded inputs, how many rows in all.
        source: "loops" or "recorded".
        conditions: as of :class:`lehr.calibration.ranges.Ranges`, or "recorded".
        digest: SHA-256 of what determines the data: model, sampler, seeds; of recorded inputs their content.
    """

    parts: tuple[Path, ...]
    timesteps: Array
    gains: Array
    samples: int
    source: str
    conditions: str
    digest: str

    def evaluations(self) -> Iterator[Evaluation]:
        """Every evaluation; one part is in memory at a time.

        Raises:
            BundleError: a part is damaged.
        """
        for part in self.parts:
            yield from read_part(part)


def cache_folder() -> Path:
    """Where calibration data is kept between runs unless told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lehr" / "trajectories"


def write_part(part: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write one file, renamed when it is whole; conditions that several evaluations share are written once."""
    arrays: dict[str, Array] = {}
    sets: list[str] = []
    of = []
    for k, evaluation in enumerate(evaluations):
        arrays[f"sample.{k:05d}"] = evaluation.sample
        key = json.dumps({name: content(value) for name, value in evaluation.conditions.items()}, sort_keys=True)
        if key not in sets:
            sets.append(key)
            arrays |= {f"condition.{len(sets) - 1:05d}.{n}": v for n, v in evaluation.conditions.items()}
        of.append(sets.index(key))
    arrays["conditions"] = np.array(of, np.int64)
    arrays["index"] = np.array([evaluation.index for evaluation in evaluations], np.int64)
    arrays["timestep"] = np.array([evaluation.timestep for evaluation in evaluations], np.float64)
    partial = part.with_name(f".{part.name}.{os.getpid()}.partial")
    try:
        with storage_errors(f"writing {part}"):
            write_arrays(partial, arrays)
            partial.replace(part)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_whole(part: Path) -> bool:
    """Whether a part is there and can be read."""
    try:
        return part.is_file() and len(read_part(part)) > 0
    except BundleError:
        return False


def read_part(part: Path) -> list[Evaluation]:
    """What :func:`write_part` wrote; raises BundleError for a file that is missing or damaged."""
    try:
        arrays = read_arrays(part)
        return [
            Evaluation(
                index=int(arrays["index"][k]),
                sample=arrays[f"sample.{k:05d}"],
                timestep=float(arrays["timestep"][k]),
                conditions=_prefixed(arrays, f"condition.{int(arrays['conditions'][k]):05d}."),
            )
            for k in range(len(arrays["index"]))
        ]
    except (KeyError, IndexError, FileNotFoundError) as e:
        raise BundleError(f"calibration data {part} is missing or damaged ({e}). Delete it and calibrate again.") from e


def _prefixed(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}


def content(array: Array) -> str:
    """SHA-256 of an array's type, shape and numbers."""
    return hashlib.sha256(
        f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
    ).hexdigest()
