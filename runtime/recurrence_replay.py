"""Checking a recurrence by running it on basis vectors: does it give the table, and what does rounding do to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lehr.runtime.recurrence import Columns, Kept, Recurrence, Row

Array = npt.NDArray[np.float64]
TOLERANCE = 1e-12  # of a row's largest coefficient


def replayed(found: Recurrence, columns: Columns) -> Recurrence | None:
    """The recurrence if it gives every row of the table to :data:`TOLERANCE`, so that errors cannot add up unseen.

    Where it falls short by rounding, the coefficients are fitted again, each row to what the rows before it have
    really become.
    """
    return _replayed(found, columns) or _replayed(found, columns, fit=_fitted)


def _as_found(row: Row, _target: Array, _vectors: Array) -> Row:
    return row


def _fitted(row: Row, target: Array, vectors: Array) -> Row:
    """The row with the coefficients on its inputs and outputs that come closest to ``target``."""
    if not len(vectors):
        return row
    scale = np.linalg.norm(vectors, axis=1)
    values = (np.linalg.lstsq((vectors / scale[:, None]).T, target, rcond=None)[0] / scale).tolist()
    inputs = tuple((j, value) for (j, _), value in zip(row.inputs, values, strict=False))
    outputs = tuple((b, j, value) for (b, j, _), value in zip(row.outputs, values[len(inputs) :], strict=True))
    return replace(row, inputs=inputs, outputs=outputs)


def _replayed(
    found: Recurrence, columns: Columns, fit: Callable[[Row, Array, Array], Row] = _as_found
) -> Recurrence | None:
    table, n = columns.table, columns.evaluations
    place = {original: c for c, original in enumerate(columns.order)}
    alive: dict[tuple[int, ...], Array] = {}
    result = []
    for i, row in enumerate(found.rows):
        fresh = np.zeros(table.shape[1])
        fresh[0] = row.start
        for j, c in row.noises:
            fresh[place[columns.first_noise + j]] = c
        vectors = np.array([alive[j,] for j, _ in row.inputs] + [alive[b, j] for b, j, _ in row.outputs])
        row = fit(row, table[i] - fresh, vectors)  # noqa: PLW2901 - the same row, fitted
        values = [c for _, c in row.inputs] + [c for _, _, c in row.outputs]
        vector = fresh + np.array(values) @ vectors if values else fresh
        if np.abs(vector - table[i]).max() > TOLERANCE * max(float(np.abs(table[i]).max()), 1e-300):
            return None
        for key in row.expired:
            del alive[key]
        if (i,) in found.used:
            alive[i,] = vector
        if (0, i) in found.used:
            alive[0, i] = found.from_input[i] * vector
            alive[0, i][columns.position(i)] += found.from_output[i]
        if (1, i) in found.used:
            alive[1, i] = np.zeros(table.shape[1])
            alive[1, i][place[1 + n + i]] = 1
        result.append(row)
    return replace(found, rows=tuple(result))


def rounding(found: Recurrence, columns: Columns, denoised: tuple[Array, Array]) -> float:
    """The largest error of a row, over its norm, when every row and kept quantity is rounded with relative error 1.

    x_T and noises are taken to be independent normals, and outputs once independent too and once all equal, of which
    the smaller norm counts: multistep methods on x_0 estimates have coefficients that cancel when those agree. The
    error of each rounding is followed through the later rows. Clipping is taken to let all of an error through.
    """
    n, table = columns.evaluations, columns.table
    norms = columns.norm(table)
    least = np.maximum(np.minimum(norms, columns.coherent_norm(table)), 1e-300)
    sources = 1 + columns.banks  # of each evaluation: its row's sum, and those of the quantities kept of it
    made = [(found.from_input, found.from_output), denoised]
    alive: dict[tuple[int, ...], tuple[Array, float]] = {}  # error by source, and norm
    worst = 0.0
    for i, row in enumerate(found.rows):
        error = np.zeros(sources * (n + 1))
        variance = (row.start * columns.starting_scale) ** 2 + sum(c * c for _, c in row.noises)
        terms: list[tuple[float, tuple[int, ...]]] = [(c, (j,)) for j, c in row.inputs]
        terms += [(c, (b, j)) for b, j, c in row.outputs]
        for c, key in terms:
            earlier, norm = alive[key]
            error += c * earlier
            variance += (c * norm) ** 2
        error[sources * i] = math.sqrt(variance)
        worst = max(worst, float(np.linalg.norm(error)) / float(least[i]))
        for key in row.expired:
            del alive[key]
        if (i,) in found.used:
            alive[i,] = error, float(norms[i])
        for bank, (on_input, on_output) in enumerate(made):
            if (bank, i) not in found.used:
                continue
            if bank == 0 and found.kept is Kept.OUTPUT:
                alive[bank, i] = np.zeros_like(error), 1.0  # the network's own output, not a sum
                continue
            kept_error = on_input[i] * error
            kept_error[sources * i + 1 + bank] = math.hypot(on_input[i] * norms[i], on_output[i])
            quantity = on_input[i] * table[i]
            quantity[columns.position(i)] += on_output[i]
            alive[bank, i] = kept_error, float(columns.norm(quantity)) if bank == 0 else 1.0
    return worst
