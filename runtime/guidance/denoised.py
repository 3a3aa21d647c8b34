"""Guidance by two evaluations whose combination changes along the loop or is not linear.

The loop takes raw outputs, so what is done to the x_0 estimate D is undone into an output: with the table's
D = a x + b F, a guided D becomes F = (D - a x) / b. Where b is 0 the output has no say in D, and none in the sample.

Shape legend: B batch, … the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance.evaluations import Evaluations
from lehr.runtime.guidance.plain import Evaluate, halves
from lehr.runtime.guidance.setting import Guidance, Projection
from lehr.runtime.loop import Network
from lehr.runtime.solver_table import SolverTable

Array = npt.NDArray[Any]


def guided(
    evaluate: Evaluate,
    conditions: Mapping[str, Array],
    unconditional: Mapping[str, Array],
    table: SolverTable,
    guidance: Guidance,
    *,
    default_scale: float = 1.0,
    guide: Evaluate | None = None,
) -> Network:
    """A network for one loop at a time over ``table``: it counts the evaluations.

    Args:
        evaluate: ``evaluate(sample, timestep, conditions)`` at any batch.
        conditions: name -> (B, …).
        unconditional: conditions that mean "none": of ``evaluate``, at the same shapes, or of ``guide``.
        table: the solver table that the loop runs.
        guidance: what to do.
        default_scale: where ``guidance`` names no scale.
        guide: a network of its own for D_u (Karras et al. 2024, arXiv:2406.02507, guide a model with a worse one);
            by default ``evaluate`` without its condition, in one evaluation of twice the batch.

    Raises:
        InvalidInput: a model without conditions and no guide, or a schedule that does not fit the table.
    """
    if guide is None and not conditions:
        raise InvalidInput(
            "this model has no condition, so guidance cannot act; leave it out or give a network that guides."
        )
    scales = guidance.scales(table, default_scale)
    both = {} if guide is not None else halves(conditions, unconditional)
    combine = _Combination(table, guidance)
    evaluations = Evaluations(table)

    def pair(sample: Array, timestep: float) -> tuple[Array, Array]:
        if guide is not None:
            return guide(sample, timestep, unconditional), evaluate(sample, timestep, conditions)
        without, with_condition = np.split(evaluate(np.concatenate([sample, sample]), timestep, both), 2)
        return without, with_condition

    def network(sample: Array, timestep: float) -> Array:
        i = evaluations.advance(timestep)
        if i == 0:
            combine.forget()
        if scales[i] == 1.0:
            return evaluate(sample, timestep, conditions)
        without, with_condition = pair(sample, timestep)
        channels = sample.shape[1]
        output = combine(i, scales[i], sample, without[:, :channels], with_condition[:, :channels])
        if with_condition.shape[1] == channels:
            return output
        return np.concatenate([output, with_condition[:, channels:]], axis=1)  # a learned variance is not guided

    return network


class _Combination:
    """(F_u, F_c) -> F at one evaluation; remembers the differences that momentum needs."""

    def __init__(self, table: SolverTable, guidance: Guidance) -> None:
        self._table, self._guidance = table, guidance
        self._mean: Array | None = None

    def forget(self) -> None:
        self._mean = None

    def __call__(self, i: int, scale: float, x: Array, without: Array, with_condition: Array) -> Array:
        if not self._guidance.acts_on_denoised:
            linear: Array = without + x.dtype.type(scale) * (with_condition - without)
            return linear
        on_input, on_output = float(self._table.denoised_from_input[i]), float(self._table.denoised_from_output[i])
        if on_output == 0:
            return with_condition
        given: Array = on_input * x.astype(np.float64)
        d_c = given + on_output * with_condition.astype(np.float64)
        difference = on_output * (with_condition.astype(np.float64) - without)
        if self._guidance.projection is not None:
            difference = self._project(self._guidance.projection, difference, d_c)
        denoised = d_c + (scale - 1) * difference
        if self._guidance.rescale > 0:
            phi = self._guidance.rescale
            denoised *= 1 - phi + phi * _per_sample(np.std, d_c) / np.maximum(_per_sample(np.std, denoised), _TINY)
        output: Array = ((denoised - given) / on_output).astype(with_condition.dtype)
        return output

    def _project(self, projection: Projection, difference: Array, d_c: Array) -> Array:
        if projection.momentum:
            if self._mean is not None:
                difference = difference + projection.momentum * self._mean
            self._mean = difference
        if projection.norm_threshold is not None:
            norm = np.maximum(_per_sample(np.linalg.norm, difference), _TINY)
            difference = difference * np.minimum(1.0, projection.norm_threshold / norm)
        square = np.maximum(_per_sample(np.sum, d_c * d_c), _TINY)
        parallel = d_c * (_per_sample(np.sum, difference * d_c) / square)
        projected: Array = difference - (1 - projection.parallel) * parallel
        return projected


_TINY = 1e-30  # keeps a constant or zero estimate from dividing by zero


def _per_sample(reduce: Callable[..., Array], values: Array) -> Array:
    """(B, …) -> (B, 1, …): a number for each sample, so that a batch changes nothing."""
    reduced: Array = reduce(values.reshape(len(values), -1), axis=1)
    return reduced.reshape(-1, *[1] * (values.ndim - 1))
