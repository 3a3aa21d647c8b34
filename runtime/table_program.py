"""A solver table as a program for the device: which places it needs, and what every row reads and writes there.

:mod:`lehr.runtime.loop` keeps arrays under names while they are used; here the same rows are given numbered places
beforehand, so that a kernel which knows its row's number knows all the rest. Order of terms, element type and the terms
left out for a factor of zero are the loop's, so both compute the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.recurrence import Kept
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.table_ops import Clip, LearnedVariance

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Key = tuple[str, int] | tuple[str, int, int]
START: Key = ("start", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableProgram:
    """N evaluations in ``slots`` places of the latent's size and ``ring`` places for injected noises.

    Attributes:
        wide: places hold float64, as the loop's sums do for this table; else float32.
        slots, ring: how many places there are; x_T stands in slot 0 and stays there.
        first: (N + 2,) where the terms of each row begin.
        source: (terms,) a slot, or -1 - place for a noise.
        factor: (terms,) on the source.
        target: (N + 1,) the slot of each row's sum; the last row has none, its sum is the sample.
        kept_input, kept_output, kept_slot: (N,) what bank 0 keeps of an evaluation and where; slot -1: nothing.
        denoised_input, denoised_output, clipped_slot: (N,) the same for the clipped x_0 estimate.
        limit: of the clipping.
        noises: for each of N + 1 rows, (noise, place) pairs that must stand there before it.
    """

    wide: bool
    slots: int
    ring: int
    first: Ints
    source: Ints
    factor: Floats
    target: Ints
    kept_input: Floats
    kept_output: Floats
    kept_slot: Ints
    denoised_input: Floats
    denoised_output: Floats
    clipped_slot: Ints
    limit: float
    noises: tuple[tuple[tuple[int, int], ...], ...]


def obstacle(table: SolverTable) -> str | None:
    """Why a table needs the loop on the host; None if the device can run it."""
    if table.clip is not None and not isinstance(table.clip, Clip):
        return "dynamic thresholding sorts every sample's values"
    if table.variance not in (None, LearnedVariance.UNUSED):
        return "the network's own variance scales the noise"
    return None


def table_program(table: SolverTable) -> TableProgram:
    """The program of a table that has no :func:`obstacle`."""
    form = table.recurrence()
    rows = _recurrent_terms(table) if form else _dense_terms(table)
    n = len(table)
    zeros, ones = np.zeros(n), np.ones(n)
    plain = form is None or form.kept is Kept.OUTPUT
    last = {key: i for i, row in enumerate(rows) for key, _ in row}
    places, rings = _Places(1), _Places(0)
    at: dict[Key, int] = {START: 0}
    source: list[int] = []
    noises: list[tuple[tuple[int, int], ...]] = []
    target, kept, clipped = (np.full(size, -1, dtype=np.int32) for size in (n + 1, n, n))
    for i, row in enumerate(rows):
        fresh = [key for key, _ in row if key[0] == "noise" and key not in at]
        for key in fresh:
            at[key] = rings.take()
        noises.append(tuple((key[1], at[key]) for key in fresh))
        source += [-1 - at[key] if key[0] == "noise" else at[key] for key, _ in row]
        if i < n:
            # Nothing that a row has read is overwritten before the next one, so a row can be computed twice.
            made: tuple[tuple[Ints, Key], ...] = (
                (target, ("input", i)),
                (kept, ("output", 0, i)),
                (clipped, ("output", 1, i)),
            )
            for slots, key in made:
                if slots is target or key in last:
                    at[key] = places.take()
                    slots[i] = at[key]
        for key in [key for key in at if key != START and last.get(key, i) <= i]:
            (rings if key[0] == "noise" else places).give(at.pop(key))
    return TableProgram(
        wide=form is None or form.wide,
        slots=places.count,
        ring=rings.count,
        first=np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32),
        source=np.array(source, dtype=np.int32),
        factor=np.array([factor for row in rows for _, factor in row], dtype=np.float64),
        target=target,
        kept_input=zeros if form is None or plain else np.asarray(form.from_input),
        kept_output=ones if form is None or plain else np.asarray(form.from_output),
        kept_slot=kept,
        denoised_input=np.asarray(table.denoised_from_input),
        denoised_output=np.asarray(table.denoised_from_output),
        clipped_slot=clipped,
        limit=table.clip.limit if isinstance(table.clip, Clip) else 0.0,
        noises=tuple(noises),
    )


class _Places:
    """Numbered places, the lowest free one first."""

    def __init__(self, taken: int) -> None:
        self.count, self._free = taken, set[int]()

    def take(self) -> int:
        if not self._free:
            self.count += 1
            return self.count - 1
        place = min(self._free)
        self._free.remove(place)
        return place

    def give(self, place: int) -> None:
        self._free.add(place)


_Row = list[tuple[Key, float]]


def _nonzero(terms: Iterable[tuple[Key, float]]) -> _Row:
    return [(key, factor) for key, factor in terms if factor != 0]


def _recurrent_terms(table: SolverTable) -> list[_Row]:
    form = table.recurrence()
    rows = []
    for row in () if form is None else form.rows:
        terms: _Row = [(START, row.start)]
        terms += [(("input", j), c) for j, c in row.inputs]
        terms += [(("output", bank, j), c) for bank, j, c in row.outputs]
        terms += [(("noise", j), c) for j, c in row.noises]
        rows.append(_nonzero(terms))
    return rows


def _dense_terms(table: SolverTable) -> list[_Row]:
    rows = []
    for i in range(len(table) + 1):
        terms: _Row = [(START, float(table.start[i]))]
        terms += [(("output", 0, j), c) for j, c in enumerate(table.outputs[i].tolist())]
        if table.clipped is not None:
            terms += [(("output", 1, j), c) for j, c in enumerate(table.clipped[i].tolist())]
        terms += [(("noise", j), c) for j, c in enumerate(table.noises[i].tolist())]
        rows.append(_nonzero(terms))
    return rows
