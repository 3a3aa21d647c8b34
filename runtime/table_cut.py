"""Cutting a solver table in two: loops that start half-way (img2img) or change the network half-way (base, refiner).

The cut is made at a row k. The head ends there, at x_t itself instead of the network's input; the tail starts from
x_t = alpha_k x_0 + sigma_k eps, whoever made it. What a tail knows of the past is that latent alone:

- a one-step method needs no more, and head and tail together are the whole table, to rounding;
- a multistep method restarts its history: the quantity it keeps (D, eps or F) is taken to have been, before the cut,
  what it is at the cut. That is how such samplers take their own first step, at first order, and it is what two
  diffusers schedulers do of which the second begins at the cut;
- a method of which a later row uses a latent from before the cut, as two-stage ones do in mid-step, is refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.recurrence import Row
from lehr.runtime.solver_table import SolverTable

Array = npt.NDArray[np.float64]

_NEGLIGIBLE = 1e-11  # of a row's largest coefficient: the past that rounding leaves


def head(table: SolverTable, row: int) -> SolverTable:
    """The first ``row`` evaluations; the result of its loop is x_t where the rest starts.

    Raises:
        InvalidInput: a row that leaves nothing on one side.
    """
    _check_row(table, row)
    scale = _input_scale(table, row)
    noises = _first_noise_after(table, row)

    def cut(bank: Array, columns: int) -> Array:
        rows: Array = bank[: row + 1, :columns].copy()
        rows[-1] /= scale
        return rows

    start = table.start[: row + 1].copy()
    start[-1] /= scale
    points = _points(table, slice(0, row))
    return replace(
        table,
        timesteps=points["timesteps"],
        alphas=points["alphas"],
        sigmas=points["sigmas"],
        denoised_from_input=points["denoised_from_input"],
        denoised_from_output=points["denoised_from_output"],
        start=start,
        outputs=cut(table.outputs, row),
        noises=cut(table.noises, noises),
        clipped=None if table.clipped is None else cut(table.clipped, row),
        variance_slopes=None if table.variance_slopes is None else table.variance_slopes[:noises].copy(),
        options={**table.options, "ends_before": row},
    )


def tail(table: SolverTable, row: int) -> SolverTable:
    """The evaluations from ``row`` on; x_T of its loop is x_t at that row.

    Its noises are numbered from 0; those of the whole table's loop that it draws follow :func:`head`'s.

    Raises:
        InvalidInput: a row outside the table, or one at which the sampler cannot be cut.
    """
    if row == 0 and _starts_at_x_t(table):
        return table
    if row:
        _check_row(table, row)
    rows, markov = _exact_rows(table, row)
    if not markov:
        rows = _restarted_rows(table, row)
    n, first_noise = len(table) - row, _first_noise_after(table, row)
    banks = 1 if table.clipped is None else 2
    start = 1 + banks * n
    points = _points(table, slice(row, None))
    return replace(
        table,
        timesteps=points["timesteps"],
        alphas=points["alphas"],
        sigmas=points["sigmas"],
        denoised_from_input=points["denoised_from_input"],
        denoised_from_output=points["denoised_from_output"],
        start=rows[:, 0].copy(),
        outputs=rows[:, 1 : 1 + n].copy(),
        clipped=None if table.clipped is None else rows[:, 1 + n : start].copy(),
        noises=rows[:, start:].copy(),
        variance_slopes=None if table.variance_slopes is None else table.variance_slopes[first_noise:].copy(),
        init_noise_sigma=float(table.sigmas[row]),
        options={**table.options, "begins_at": row, "history": "not needed" if markov else "restarted"},
    )


def split(table: SolverTable, row: int) -> tuple[SolverTable, SolverTable]:
    """(head, tail): run the first, hand its result to the second.

    Raises:
        InvalidInput: as :func:`head` and :func:`tail`.
    """
    return head(table, row), tail(table, row)


def row_below(table: SolverTable, timestep: float) -> int:
    """The first evaluation less noisy than ``timestep``, counted as the table's timesteps run; N if there is none."""
    timesteps = table.timesteps
    towards = 1.0 if timesteps[-1] < timesteps[0] else -1.0
    below = np.flatnonzero(towards * timesteps < towards * timestep)
    return int(below[0]) if below.size else len(table)


# ---------------------------------------------------------------------------------------------- what both need


def _check_row(table: SolverTable, row: int) -> None:
    if not 0 < row < len(table):
        raise InvalidInput(
            f"{table.sampler} with {len(table)} evaluations cannot be cut before evaluation {row}: one side would be "
            f"empty. Cut before evaluation 1 to {len(table) - 1}."
            if len(table) > 1
            else f"{table.sampler} evaluates the network once, so there is nothing to cut; ask for more steps."
        )


def _points(table: SolverTable, part: slice) -> dict[str, Array]:
    names = ("timesteps", "alphas", "sigmas", "denoised_from_input", "denoised_from_output")
    return {name: getattr(table, name)[part].copy() for name in names}


def _input_scale(table: SolverTable, row: int) -> float:
    return float(table.prediction.input_scale(float(table.alphas[row]), float(table.sigmas[row])))


def _first_noise_after(table: SolverTable, row: int) -> int:
    """Noises are numbered as they are drawn: those of rows up to ``row`` come first."""
    used = np.flatnonzero(np.any(table.noises[: row + 1] != 0, axis=0))
    return int(used[-1]) + 1 if used.size else 0


def _starts_at_x_t(table: SolverTable) -> bool:
    return bool(np.isclose(table.start[0], _input_scale(table, 0), rtol=1e-9)) and not np.any(table.noises[0])


# ---------------------------------------------------------------------------------------------- the rows of a tail


def _exact_rows(table: SolverTable, row: int) -> tuple[Array, bool]:
    """Rows over (x_t, F [, clip(D)], z) of the tail, and whether x_t is all they need of the past.

    Row i is lambda_i times row k and what came after it, if the past of both is parallel.
    """
    first_noise = _first_noise_after(table, row)
    old = [table.start[:, None], table.outputs[:, :row], table.noises[:, :first_noise]]
    new = [table.outputs[:, row:], table.noises[:, first_noise:]]
    if table.clipped is not None:
        old.append(table.clipped[:, :row])
        new.insert(1, table.clipped[:, row:])
    past, here = np.concatenate(old, axis=1)[row:], np.concatenate(old, axis=1)[row]
    share = past @ here / (here @ here)
    left = np.abs(past - share[:, None] * here).max(axis=1)
    markov = bool(np.all(left <= _NEGLIGIBLE * np.abs(table.coefficients[row:]).max(axis=1)))
    rows = np.concatenate([(share * _input_scale(table, row))[:, None], *(bank[row:] for bank in new)], axis=1)
    return rows, markov


def _restarted_rows(table: SolverTable, row: int) -> Array:
    """The same by running the sparse form on basis vectors from ``row`` on, with a history that stood still."""
    form = table.recurrence()
    if form is None:
        raise _uncuttable(table, row, "it has no recurrence")
    n, banks = len(table) - row, 1 if table.clipped is None else 2
    first_noise = _first_noise_after(table, row)
    basis = np.eye(1 + banks * n + table.num_noises - first_noise)
    inputs = {row: _input_scale(table, row) * basis[0]}
    outputs: dict[tuple[int, int], Array] = {}
    rows = [inputs[row]]
    for i in range(row, len(table)):
        outputs[0, i] = form.from_input[i] * inputs[i] + form.from_output[i] * basis[1 + i - row]
        if banks == 2:
            outputs[1, i] = basis[1 + n + i - row]
        inputs[i + 1] = _row(table, row, form.rows[i + 1], inputs, outputs, basis[1 + banks * n :], first_noise)
        rows.append(inputs[i + 1])
    return np.array(rows)


def _row(
    table: SolverTable,
    row: int,
    terms: Row,
    inputs: dict[int, Array],
    outputs: dict[tuple[int, int], Array],
    noises: Array,
    first_noise: int,
) -> Array:
    if terms.start or any(j < row for j, _ in terms.inputs):
        raise _uncuttable(table, row, "a later row uses a latent from before the cut")
    if any(j < first_noise for j, _ in terms.noises):
        raise _uncuttable(table, row, "a later row uses a noise from before the cut")
    total = np.zeros(len(inputs[row]))
    for j, c in terms.inputs:
        total += c * inputs[j]
    for bank, j, c in terms.outputs:
        total += c * outputs[bank, max(j, row)]
    for j, c in terms.noises:
        total += c * noises[j - first_noise]
    return total


def _uncuttable(table: SolverTable, row: int, why: str) -> InvalidInput:
    return InvalidInput(
        f"{table.sampler} cannot be cut before evaluation {row} of {len(table)}: {why}. Cut between two whole steps, "
        "or use a one-step or a plain multistep sampler, such as ddim, euler or dpmpp_2m."
    )
