"""What the cache of hoisted results is made of: keys by content, one sample's rows, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.backends.base import DeviceSession, Session
from lehr.runtime.device import DeviceArray, stacked
from lehr.runtime.spec import TensorSpec

Array = npt.NDArray[Any]
Tensor = Array | DeviceArray


@dataclass(slots=True)
class Shared:
    """What all samples of one call share: a sample's sizes, and what was computed from those and shared conditions."""

    sizes: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Key:
    """One sample's conditions, by content; ``shared`` is the digest of what it shares."""

    shared: bytes
    row: bytes


def digest_of(conditions: Mapping[str, Array], batched: Sequence[str], row: int) -> bytes:
    """Of one sample's conditions, by content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in batched:
        digest.update(conditions[name][row].tobytes())
    return digest.digest()


def results_of(session: Session, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """An engine's results, where it computes them."""
    if isinstance(session, DeviceSession):
        return session.run_resident(feeds)
    return session.run(feeds)  # type: ignore[arg-type]  # an engine on the host was given arrays of the host only


def row_of(tensor: Tensor, k: int) -> Tensor:
    """A sample's share of a result; on the host a copy, so that it can be forgotten by itself."""
    return tensor.row(k) if isinstance(tensor, DeviceArray) else np.array(tensor[k])


def as_batch(row: Tensor) -> DeviceArray:
    """A sample's share as a batch of one."""
    if not isinstance(row, DeviceArray):
        raise TypeError("a loop on the device needs hoisted tensors on the device")
    return row.reshape((1, *row.shape))


def stacked_rows(tensors: Sequence[TensorSpec], rows: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """One array a tensor, a row a sample; without a copy for a single sample."""
    found: dict[str, Tensor] = {}
    for k, tensor in enumerate(tensors):
        on_device = [row[k] for row in rows if isinstance(row[k], DeviceArray)]
        if on_device:
            found[tensor.name] = stacked(on_device)  # type: ignore[arg-type]
        elif len(rows) == 1:
            found[tensor.name] = rows[0][k][None]  # type: ignore[index]
        else:
            found[tensor.name] = np.stack([row[k] for row in rows])  # type: ignore[misc]
    return found
