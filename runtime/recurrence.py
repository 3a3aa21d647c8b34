"""The sparse form of a solver table: each row from a few earlier inputs and outputs, found numerically.

A table says what every row is in terms of all outputs; a loop wants to keep few of them. Most samplers are
recurrences in one of three quantities, the output F, the x_0 estimate D or the noise estimate eps, so each is
tried as the quantity that the loop keeps, and the form that keeps the fewest latents is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
TOLERANCE = 1e-12  # of a row's largest coefficient
_MAX_INPUTS, _MAX_OUTPUTS = 5, 6  # UniPC and SA-Solver of order 4 look back furthest
_FEW, _MANY = 4, 8  # outputs of any age in one row: the Runge-Kutta start of PNDM reaches back 12 evaluations
_NEGLIGIBLE = 1e-15  # of a row: what rounding leaves where the exact coefficient is 0
_MAX_GROWTH = 1e3  # of inputs that cancel in one row
_MAX_ROUNDING = 10.0  # in units of the float32 rounding of one row; beyond, the loop carries its state in float64


class Kept(str, Enum):
    """Which quantity of an evaluation a recurrence keeps."""

    OUTPUT = "output"
    DENOISED = "denoised"
    NOISE = "noise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: ``start`` x_T + Σ c input_j + Σ c Y^bank_j + Σ c z_j.

    Attributes:
        start: coefficient of x_T.
        inputs: (row j, coefficient) pairs.
        outputs: (bank, evaluation j, coefficient) triples.
        noises: (noise j, coefficient) pairs, each noise in one row only.
        expired: the inputs (j,) and outputs (bank, j) that no later row uses.
    """

    start: float
    inputs: tuple[tuple[int, float], ...]
    outputs: tuple[tuple[int, int, float], ...]
    noises: tuple[tuple[int, float], ...]
    expired: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """A table's rows from what is still in memory.

    Bank 0 is Y_j = from_input[j] * input_j + from_output[j] * F_j, bank 1 clip(D_j) where the table has it.

    Attributes:
        kept: what Y is.
        from_input, from_output: (N,) how Y comes from an evaluation's input and output.
        rows: N + 1 rows; the last one is the final sample.
        used: every input (j,) and output (bank, j) that some row uses.
        depth: how many latents are alive at once, the newest input and output included.
        wide: rounding to float32 would add up along the rows, so the latents are kept in float64.
    """

    kept: Kept
    from_input: Array
    from_output: Array
    rows: tuple[Row, ...]
    used: frozenset[tuple[int, ...]]
    depth: int
    wide: bool = False


def find_recurrence(
    coefficients: Array, evaluations: int, banks: int, kept: Mapping[Kept, tuple[Array, Array]]
) -> Recurrence | None:
    """The recurrence of fewest latents that reproduces ``coefficients`` to :data:`TOLERANCE`, or None.

    Args:
        coefficients: (N + 1, 1 + banks * N + M), columns x_T, one bank after another, noises.
        evaluations: N.
        banks: 1, or 2 with a bank of clipped estimates.
        kept: the quantities to try, each as its (N,) coefficients on the input and on the output; those that are
            not finite or do not determine the output are skipped. :attr:`Kept.DENOISED` is what bank 1 clips.
    """
    columns = _Columns(coefficients, evaluations, banks)
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
        if (best is None or found.depth < best.depth) and _reproduces(found, columns):
            best = found
        if best is not None and best.depth <= 1 + banks:
            break  # one input and the newest outputs: nothing is smaller
    return None if best is None else replace(best, wide=_rounding(best, columns, kept[Kept.DENOISED]) > _MAX_ROUNDING)


# ---------------------------------------------------------------------------------------------- columns by age


class _Columns:
    """The table with its columns in the order in which they come into being, so that age is position."""

    def __init__(self, coefficients: Array, evaluations: int, banks: int) -> None:
        n = self.evaluations = evaluations
        self.banks = banks
        first_noise = 1 + banks * n
        used = coefficients[:, first_noise:] != 0
        first_use = np.where(used.any(axis=0), used.argmax(axis=0), -1)
        order, self.ends, self.fresh_starts = [0], [], []
        noise_at: list[bool] = [False]
        for row in range(n + 1):
            if row > 0:
                order += [1 + b * n + row - 1 for b in range(banks)]
            self.fresh_starts.append(len(order))
            noise_at += [False] * (len(order) - len(noise_at))
            order += (first_noise + np.flatnonzero(first_use == row)).tolist()
            noise_at += [True] * (len(order) - len(noise_at))
            self.ends.append(len(order))  # row i has its support before ends[i]
        self.first_noise, self.order = first_noise, order
        self.is_noise = np.array(noise_at)
        self.table: Array = coefficients[:, order]

    def position(self, evaluation: int) -> int:
        """Where the columns of an evaluation begin."""
        return self.ends[evaluation]

    def where_used(self, values: Array, otherwise: float) -> Array:
        """``values`` for evaluations whose output some row uses, ``otherwise`` for the others."""
        used = np.any(self.table[:, [self.position(j) for j in range(self.evaluations)]] != 0, axis=0)
        return np.where(used, values, otherwise)

    def in_terms_of(self, from_input: Array, from_output: Array) -> Array:
        """The table with Y_j = from_input[j] input_j + from_output[j] F_j in the place of F_j."""
        if not np.any(from_input):
            return self.table
        at = np.array([self.position(j) for j in range(self.evaluations)])
        result = self.table.copy()
        result[:, at] /= from_output
        for i in range(1, len(result)):
            share = self.table[i, at[:i]] * from_input[:i] / from_output[:i]
            result[i] -= share @ result[:i]
        return result


@dataclass(frozen=True, slots=True)
class _Terms:
    start: float
    inputs: list[tuple[int, float]]
    outputs: list[tuple[int, int, float]]
    noises: list[tuple[int, float]]


# ------------------------------------------------------------------------------------------------- finding rows


def _find_rows(columns: _Columns, table: Array, at_most: int | None) -> list[_Terms] | None:
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
    norms = np.sqrt(np.einsum("ij,ij->i", columns.table, columns.table))
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


def _fresh(columns: _Columns, table: Array, i: int) -> list[tuple[int, float]]:
    """The noises first used in row i; later rows know them only through this one."""
    span = range(columns.fresh_starts[i], columns.ends[i])
    return [(columns.order[c] - columns.first_noise, float(table[i, c])) for c in span]


def _try(columns: _Columns, table: Array, i: int, size: tuple[int, int], norms: Array) -> _Terms | None:
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
    if np.abs(share @ bound - target).max() > TOLERANCE * largest:
        return None
    if np.abs(share) @ norms[i - num_inputs : i][::-1] > _MAX_GROWTH * norms[i]:
        return None
    return _terms(columns, table, i, share, cut, _NEGLIGIBLE * largest)


def _spread(columns: _Columns, table: Array, i: int, at_most: int) -> _Terms | None:
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
        if np.any(np.abs(rest[columns.is_noise[:end]]) > TOLERANCE * largest):
            continue
        found = _terms(columns, table, i, share, 1, TOLERANCE * largest)
        if len(found.outputs) <= at_most and (best is None or len(found.outputs) < len(best.outputs)):
            best = found
    return best


def _terms(columns: _Columns, table: Array, i: int, share: Array, cut: int, negligible: float) -> _Terms:
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


# ------------------------------------------------------------------------------------------ lifetimes, checking


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


def _reproduces(found: Recurrence, columns: _Columns) -> bool:
    """Run the recurrence on basis vectors and compare with the table, so that errors cannot add up unseen."""
    table = columns.table
    place = {original: c for c, original in enumerate(columns.order)}
    rows = np.zeros_like(table)
    kept = np.zeros((len(table), table.shape[1]))
    for i, row in enumerate(found.rows):
        rows[i, 0] += row.start
        for j, c in row.inputs:
            rows[i] += c * rows[j]
        for bank, j, c in row.outputs:
            if bank == 0:
                rows[i] += c * kept[j]
            else:
                rows[i, place[1 + bank * columns.evaluations + j]] += c
        for j, c in row.noises:
            rows[i, place[columns.first_noise + j]] += c
        if i < columns.evaluations:
            kept[i] = found.from_input[i] * rows[i]
            kept[i, columns.position(i)] += found.from_output[i]
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-300)
    return bool(np.all(np.abs(rows - table) <= TOLERANCE * scale))


def _rounding(found: Recurrence, columns: _Columns, denoised: tuple[Array, Array]) -> float:
    """The largest error of a row, over its norm, when every row and kept quantity is rounded with relative error 1.

    x_T, outputs and noises are taken to be independent unit normals; the error of each rounding is followed
    through the later rows. Clipping is taken to let all of an error through.
    """
    n, banks, table = columns.evaluations, columns.banks, columns.table
    norms = np.sqrt(np.einsum("ij,ij->i", table, table))
    sources = 1 + banks  # of each row: its own sum, and those of the quantities kept of it
    errors = np.zeros((n + 1, sources * (n + 1)))
    kept_errors, kept_norms = np.zeros((banks, n, sources * (n + 1))), np.ones((banks, n))
    made = {b: pair for b, pair in enumerate([(found.from_input, found.from_output), denoised][:banks])}
    if found.kept is Kept.OUTPUT:
        del made[0]  # the network's own output, not a sum
    for i, row in enumerate(found.rows):
        variance = row.start**2 + sum(c * c for _, c in row.noises)
        for j, c in row.inputs:
            errors[i] += c * errors[j]
            variance += (c * norms[j]) ** 2
        for bank, j, c in row.outputs:
            errors[i] += c * kept_errors[bank, j]
            variance += (c * kept_norms[bank, j]) ** 2
        errors[i, sources * i] = math.sqrt(variance)
        for bank, (on_input, on_output) in made.items() if i < n else ():
            kept_errors[bank, i] = on_input[i] * errors[i]
            kept_errors[bank, i, sources * i + 1 + bank] = math.hypot(on_input[i] * norms[i], on_output[i])
            if bank == 0:
                quantity = on_input[i] * table[i]
                quantity[columns.position(i)] += on_output[i]
                kept_norms[bank, i] = np.linalg.norm(quantity)
    return float((np.linalg.norm(errors, axis=1) / np.maximum(norms, 1e-300)).max())
