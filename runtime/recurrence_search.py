"""Finding a table's recurrence numerically: the same table in three quantities, the shortest form of each.

A row is sought as a combination of the last few inputs and of the outputs of the last few evaluations. The outputs
in that window are free, so the shares of the inputs follow from the columns that are older: what a row knows of
them, it can only know through the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lehr.runtime.recurrence import Columns, Kept, Recurrence, Row
from lehr.runtime.recurrence_replay import TOLERANCE, replayed, rounding

Array = npt.NDArray[np.float64]
_MAX_INPUTS, _MAX_OUTPUTS = 5, 6  # UniPC and SA-Solver of order 4 look back furthest
_FEW, _MANY = 4, 8  # outputs of any age in one row: the Runge-Kutta start of PNDM reaches back 12 evaluations
_SEARCH = 10 * TOLERANCE  # of a row; replaying the form fits the coefficients again where this is not enough
_NEGLIGIBLE = 1e-15  # of a row: what rounding leaves where the exact coefficient is 0
_MAX_GROWTH = 1e3  # of inputs that cancel in one row
_MAX_ROUNDING = 10.0  # in units of the float32 rounding of one row; beyond, the loop carries its state in float64


def find_recurrence(
    coefficients: Array,
    evaluations: int,
    banks: int,
    kept: Mapping[Kept, tuple[Array, Array]],
    *,
    starting_scale: float = 1.0,
) -> Recurrence | None:
    """The recurrence of fewest latents that reproduces ``coefficients`` to :data:`TOLERANCE`, or None.

    Args:
        coefficients: (N + 1, 1 + banks * N + M), columns x_T, one bank after another, noises.
        evaluations: N.
        banks: 1, or 2 with a bank of clipped estimates.
        kept: the quantities to try, each as its (N,) coefficients on the input and on the output; those that are
            not finite or do not determine the output are skipped. :attr:`Kept.DENOISED` is what bank 1 clips.
        starting_scale: the standard deviation of x_T.
    """
    columns = Columns(coefficients, evaluations, banks, starting_scale)
    best: Recurrence | None = None
    for name, (on_input, on_output) in kept.items():
        from_input, from_output = columns.where_used(on_input, 0.0), columns.where_used(on_output, 1.0)
        if not (np.all(np.isfinite(from_input)) and np.all(np.isfinite(from_output)) and np.all(from_output != 0)):
            continue
        if name is not Kept.OUTPUT and np.all(np.abs(from_input) <= 1e-9 * np.abs(from_output)):
            continue  # the output by another name
        table = columns.in_terms_of(from_input, from_output)
        terms = _find_rows(columns, table, None if best is None else best.depth)
        if terms is None:
            continue
        found = _with_lifetimes(name, from_input, from_output, terms)
        if best is None or found.depth < best.depth:
            best = replayed(found, columns) or best
        if best is not None and best.depth <= 1 + banks:
            break  # one input and the newest outputs: nothing is smaller
    return None if best is None else replace(best, wide=rounding(best, columns, kept[Kept.DENOISED]) > _MAX_ROUNDING)


# ------------------------------------------------------------------------------------------------- finding rows


@dataclass(frozen=True, slots=True)
class _Terms:
    start: float
    inputs: list[tuple[int, float]]
    outputs: list[tuple[int, int, float]]
    noises: list[tuple[int, float]]


def _find_rows(columns: Columns, table: Array, at_most: int | None) -> list[_Terms] | None:
    """Every row from its predecessors; None where a row has no such form."""
    banks = columns.banks
    sizes = sorted(
        ((k, length) for k in range(1, _MAX_INPUTS + 1) for length in range(1, _MAX_OUTPUTS + 1)),
        key=lambda size: (size[0] + banks * size[1], size[0]),
    )
    if at_most is not None:
        sizes = [size for size in sizes if size[0] + banks * size[1] <= at_most + 1]
    if np.any(table[0, 1 : columns.fresh_starts[0]]):
        return None
    norms = columns.norm(columns.table)
    rows = [_Terms(float(table[0, 0]), [], [], _fresh(columns, table, 0))]
    last = sizes[0] if sizes else (1, 1)
    for i in range(1, len(table)):
        found = _try(columns, table, i, last, norms) or _spread(columns, table, i, _FEW)
        for size in sizes if found is None else ():
            found = _try(columns, table, i, size, norms)
            if found is not None:
                last = size
                break
        found = found or _spread(columns, table, i, _MANY)
        if found is None:
            return None
        rows.append(found)
    return rows


def _fresh(columns: Columns, table: Array, i: int) -> list[tuple[int, float]]:
    """The noises first used in row i; later rows know them only through this one."""
    span = range(columns.fresh_starts[i], columns.ends[i])
    return [(columns.order[c] - columns.first_noise, float(table[i, c])) for c in span]


def _try(columns: Columns, table: Array, i: int, size: tuple[int, int], norms: Array) -> _Terms | None:
    """Row i from the last ``size[0]`` inputs and the outputs of the last ``size[1]`` evaluations."""
    num_inputs, num_outputs = min(size[0], i), min(size[1], i)
    end, cut = columns.fresh_starts[i], columns.position(i - num_outputs)
    previous = table[i - num_inputs : i, :end][::-1]
    row = table[i, :end]
    bound, target = previous[:, :cut], row[:cut]
    recent = columns.is_noise[cut:end]
    if recent.any():
        bound = np.concatenate([bound, previous[:, cut:][:, recent]], axis=1)
        target = np.concatenate([target, row[cut:][recent]])
    largest = max(float(np.abs(table[i]).max()), 1e-300)
    scale = np.maximum(np.abs(bound).max(axis=0), np.abs(target))
    keep = scale > _NEGLIGIBLE * largest
    if not keep.any():
        share = np.zeros(num_inputs)
    else:
        weighted, aim = bound[:, keep] / scale[keep], target[keep] / scale[keep]
        if num_inputs == 1:
            share = (weighted @ aim) / max(float(weighted[0] @ weighted[0]), 1e-300)
        else:
            share = np.linalg.lstsq(weighted.T, aim, rcond=1e-13)[0]
    if np.abs(share @ bound - target).max() > _SEARCH * largest:
        return None
    if np.abs(share) @ norms[i - num_inputs : i][::-1] > _MAX_GROWTH * norms[i]:
        return None
    return _terms(columns, table, i, share, cut, _NEGLIGIBLE * largest)


def _spread(columns: Columns, table: Array, i: int, at_most: int) -> _Terms | None:
    """Row i from one of the last inputs and at most so many outputs of any age."""
    end = columns.fresh_starts[i]
    largest = max(float(np.abs(table[i]).max()), 1e-300)
    best: _Terms | None = None
    for back in range(1, min(_MAX_INPUTS, i) + 1):
        if table[i - back, 0] == 0:
            continue
        share = np.zeros(back)
        share[-1] = table[i, 0] / table[i - back, 0]
        rest = table[i, :end] - share[-1] * table[i - back, :end]
        if np.any(np.abs(rest[columns.is_noise[:end]]) > _SEARCH * largest):
            continue
        found = _terms(columns, table, i, share, 1, _SEARCH * largest)
        if len(found.outputs) <= at_most and (best is None or len(found.outputs) < len(best.outputs)):
            best = found
    return best


def _terms(columns: Columns, table: Array, i: int, share: Array, cut: int, negligible: float) -> _Terms:
    """Row i with these shares of the previous inputs (newest first) and what is left from column ``cut`` on."""
    end = columns.fresh_starts[i]
    rest = table[i, cut:end] - share @ table[i - len(share) : i, cut:end][::-1]
    outputs = []
    for c in (cut + np.flatnonzero(np.abs(rest) > negligible)).tolist():
        if not columns.is_noise[c]:
            bank, evaluation = divmod(columns.order[c] - 1, columns.evaluations)
            outputs.append((bank, evaluation, float(rest[c - cut])))
    inputs = [(i - 1 - k, float(p)) for k, p in enumerate(share) if abs(p) > _NEGLIGIBLE]
    return _Terms(0.0, inputs, outputs, _fresh(columns, table, i))


def _with_lifetimes(kept: Kept, from_input: Array, from_output: Array, terms: list[_Terms]) -> Recurrence:
    last_use: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(terms):
        last_use.update(((j,), i) for j, _ in row.inputs)
        last_use.update(((bank, j), i) for bank, j, _ in row.outputs)
    expired: list[list[tuple[int, ...]]] = [[] for _ in terms]
    for key, i in last_use.items():
        expired[i].append(key)
    depth = max(sum(key[-1] < i <= last for key, last in last_use.items()) for i in range(len(terms)))
    rows = tuple(
        Row(
            start=row.start,
            inputs=tuple(row.inputs),
            outputs=tuple(row.outputs),
            noises=tuple(row.noises),
            expired=tuple(sorted(expired[i])),
        )
        for i, row in enumerate(terms)
    )
    return Recurrence(
        kept=kept,
        from_input=from_input,
        from_output=from_output,
        rows=rows,
        used=frozenset(last_use),
        depth=depth,
    )
