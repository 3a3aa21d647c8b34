"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) as changes of a model's weights.

An :class:`Adapter` says which rows of which weight gain ``scale * up @ down``, under the names that the bundle's own
graphs use, so nothing has to be looked up when it is applied. :mod:`lehr.export.checkpoints.lora` makes one from a
published file; the exporter merges it into the weights that it streams, the runtime into those of a loaded engine, both
with :func:`merged`.

Shape legend: O rows of a weight, R rows that an update changes, r rank, C everything behind a weight's first dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.refit import TensorFile

Array = npt.NDArray[Any]

DENOISER = "denoiser"  # the component that stands beside the stages
SUFFIX = ".lora.safetensors"  # of an adapter that was converted for a bundle
_PARTS = ("up", "down", "scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """``weight[start : start + R] += scale * up @ down``, the weight seen as (O, C).

    Attributes:
        up: (R, r).
        down: (r, C).
        start: the first row.
        scale: the adapter's own, alpha / r.
    """

    up: Array
    down: Array
    start: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0] or not self.up.shape[1]:
            raise InvalidInput(f"an update needs (R, r) and (r, C) of one rank r, got {self.up.shape, self.down.shape}")
        if self.start < 0 or not math.isfinite(self.scale):
            raise InvalidInput(f"an update needs start >= 0 and a finite scale, got {self.start} and {self.scale}")


Changes = Mapping[str, tuple[Update, ...]]  # by the weight's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What one file changes.

    Attributes:
        name: for people.
        changes: by component, "denoiser" or a stage's name.
    """

    name: str
    changes: Mapping[str, Changes]

    def of(self, component: str) -> Changes:
        """What it changes in one component; empty if nothing."""
        return self.changes.get(component, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """An adapter at a strength; 1 is what it was trained at, negative ones take it away."""

    adapter: Adapter
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InvalidInput(f"the scale of {self.adapter.name} must be a finite number, got {self.scale}.")


def split_scale(text: str) -> tuple[str, float]:
    """``FILE:SCALE`` or ``FILE`` -> the file's name and the scale, 1 where none is given.

    >>> split_scale("style.safetensors:0.8")
    ('style.safetensors', 0.8)
    """
    name, colon, number = text.rpartition(":")
    if not colon or number.endswith((".safetensors", ".bin", ".pt")):
        return text, 1.0
    try:
        scale = float(number)
    except ValueError as e:
        raise InvalidInput(f"{text!r} gives the scale {number!r}, expected a number: FILE:SCALE.") from e
    return name, scale


def changed_weights(applied: Iterable[Applied], component: str) -> dict[str, list[tuple[Update, float]]]:
    """Every update of a component's weights, with the strength it is applied at, by the weight's name."""
    found: dict[str, list[tuple[Update, float]]] = {}
    for use in applied:
        for name, updates in use.adapter.of(component).items():
            found.setdefault(name, []).extend((update, use.scale) for update in updates)
    return found


def merged(weight: Array, updates: Sequence[tuple[Update, float]], name: str) -> Array:
    """The weight with its updates, in float32 (float64 where it is that) and of the same shape.

    Raises:
        InvalidInput: an update of another size.
    """
    wide = np.float64 if weight.dtype == np.float64 else np.float32
    result = np.array(weight, dtype=wide)
    rows: Any = result.reshape(weight.shape[0], -1)
    for update, strength in updates:
        end = update.start + len(update.up)
        if update.down.shape[1] != rows.shape[1] or end > len(rows):
            raise InvalidInput(
                f"weight {name!r} of shape {weight.shape} cannot take rows {update.start} to {end} of "
                f"{update.down.shape[1]} values. The adapter belongs to another model."
            )
        product: Array = update.up.astype(wide) @ update.down.astype(wide)
        product *= wide(update.scale * strength)
        rows[update.start : end] += product
    return result


# ------------------------------------------------------------------------------------------------ stored form


def stored(adapter: Adapter) -> dict[str, Array]:
    """The tensors of an adapter's file: ``<component>/<weight>/<k>/<first row>/up``, ``/down`` and ``/scale``."""
    tensors: dict[str, Array] = {}
    for component, changes in adapter.changes.items():
        for name, updates in changes.items():
            for k, update in enumerate(updates):
                key = f"{component}/{name}/{k}/{update.start}"
                values = update.up, update.down, np.array([update.scale], dtype=np.float64)
                tensors |= {f"{key}/{part}": value for part, value in zip(_PARTS, values, strict=True)}
    return tensors


def read_adapter(path: Path) -> Adapter:
    """An adapter from a file that ``lehr lora`` wrote.

    Raises:
        InvalidInput: no such file, a damaged one, or one that was not converted.
    """
    if not path.is_file():
        raise InvalidInput(f"{path} does not exist. Expected an adapter made by lehr lora.")
    advice = f"Convert the published file for this bundle: lehr lora NAME.lehr FILE -o NAME{SUFFIX}"
    try:
        file = TensorFile(path)
        groups: dict[tuple[str, str, int, int], dict[str, Array]] = {}
        for key in file.names():
            component, name, k, start, part = key.split("/")
            shape = file.shape(key)
            kind = "float64" if part == "scale" else "float32"
            groups.setdefault((component, name, int(k), int(start)), {})[part] = file.read(key, kind).reshape(shape)
        changes: dict[str, dict[str, tuple[Update, ...]]] = {}
        for (component, name, _, first), parts in sorted(groups.items(), key=lambda item: item[0]):
            update = Update(up=parts["up"], down=parts["down"], start=first, scale=float(parts["scale"].item()))
            known = changes.setdefault(component, {})
            known[name] = (*known.get(name, ()), update)
    except (BundleError, InvalidInput, KeyError, ValueError) as e:
        raise InvalidInput(f"{path.name} is no adapter in the bundle's own names ({e}). {advice}") from e
    if not changes:
        raise InvalidInput(f"{path.name} holds no adapter. {advice}")
    return Adapter(name=path.name.removesuffix(SUFFIX), changes=changes)


def read_applied(texts: Iterable[str]) -> tuple[Applied, ...]:
    """``FILE:SCALE`` for each of several converted adapters; raises InvalidInput."""
    pairs = [split_scale(text) for text in texts]
    return tuple(Applied(adapter=read_adapter(Path(name)), scale=scale) for name, scale in pairs)
