"""The sparse form of a solver table: each row from a few earlier inputs and outputs.

A table says what every row is in terms of all outputs; a loop wants to keep few of them. Most samplers are
recurrences in one of three quantities: the output F, the x_0 estimate D or the noise estimate eps.
:mod:`lehr.runtime.recurrence_search` finds the form, :mod:`lehr.runtime.recurrence_replay` checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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


class Columns:
    """The table with its columns in the order in which they come into being, so that age is position."""

    def __init__(self, coefficients: Array, evaluations: int, banks: int, starting_scale: float) -> None:
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
        self.starting_scale = starting_scale

    def norm(self, vectors: Array) -> Array:
        """The standard deviation of what vectors (…, columns) stand for: all but x_T are taken to be unit normals."""
        scaled = vectors.copy()
        scaled[..., 0] *= self.starting_scale
        norm: Array = np.linalg.norm(scaled, axis=-1)
        return norm

    def coherent_norm(self, vectors: Array) -> Array:
        """The same if all outputs of a bank are one and the same normal, as near the data those of x_0 are."""
        parts = [vectors[..., :1] * self.starting_scale, vectors[..., self.is_noise]]
        for bank in range(self.banks):
            at = [self.position(j) + bank for j in range(self.evaluations)]
            parts.append(vectors[..., at].sum(axis=-1, keepdims=True))
        norm: Array = np.linalg.norm(np.concatenate(parts, axis=-1), axis=-1)
        return norm

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
        result: Array = self.table.copy()
        result[:, at] /= from_output
        for i in range(1, len(result)):
            share = self.table[i, at[:i]] * from_input[:i] / from_output[:i]
            result[i] -= share @ result[:i]
        return result
