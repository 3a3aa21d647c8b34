"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) as a batch of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.loop import Network

Array = npt.NDArray[Any]
Evaluate = Callable[[Array, float, Mapping[str, Array]], Array]
PerEvaluation = Callable[[Array, float, Mapping[str, Array], Sequence[int]], Mapping[str, Array]]


def network(evaluate: Evaluate, conditions: Mapping[str, Array]) -> Network:
    """The denoiser with its conditions fixed, as the loop wants it."""
    return lambda sample, timestep: evaluate(sample, timestep, conditions)


def fed(evaluate: Evaluate, per_evaluation: PerEvaluation, numbers: Sequence[int]) -> Evaluate:
    """``evaluate`` with inputs that are made anew at every evaluation, such as a ControlNet's residuals.

    Args:
        evaluate: ``evaluate(sample, timestep, conditions)`` at any batch.
        per_evaluation: ``per_evaluation(sample, timestep, conditions, numbers)`` returns further inputs by name; it is
            given what ``evaluate`` is, and the number of the sample that each row belongs to.
        numbers: of the loop's samples; an evaluation of both halves of guidance holds each of them twice.
    """

    def evaluated(sample: Array, timestep: float, conditions: Mapping[str, Array]) -> Array:
        rows = tuple(numbers) * (len(sample) // len(numbers))
        return evaluate(sample, timestep, {**conditions, **per_evaluation(sample, timestep, conditions, rows)})

    return evaluated


def halves(conditions: Mapping[str, Array], unconditional: Mapping[str, Array]) -> dict[str, Array]:
    """The conditions of twice the batch: without the condition, then with it."""
    return {
        name: np.concatenate([unconditional[name], value]) if name in unconditional else value
        for name, value in conditions.items()
    }


def classifier_free(
    evaluate: Evaluate, conditions: Mapping[str, Array], unconditional: Mapping[str, Array], guidance_scale: float
) -> Network:
    """F_u + w (F_c - F_u), both halves in one evaluation of twice the batch.

    Args:
        evaluate: ``evaluate(sample, timestep, conditions)`` at any batch.
        conditions: name -> (B, …).
        unconditional: the same names and shapes, meaning "none"; a name it lacks is shared by all samples.
        guidance_scale: w; 1 is no guidance, and then one half is enough.

    Raises:
        InvalidInput: a model without conditions, or a scale that is not finite.
    """
    if not np.isfinite(guidance_scale):
        raise InvalidInput(f"the guidance scale must be finite, got {guidance_scale}.")
    if guidance_scale == 1.0:
        return network(evaluate, conditions)
    if not conditions:
        raise InvalidInput("this model has no condition, so guidance cannot act; leave --guidance-scale at 1.")
    both = halves(conditions, unconditional)

    def both_halves(sample: Array, timestep: float) -> Array:
        without, with_condition = np.split(evaluate(np.concatenate([sample, sample]), timestep, both), 2)
        difference = with_condition - without
        difference *= sample.dtype.type(guidance_scale)
        guided: Array = np.add(without, difference, out=difference)
        if guided.shape[1:] != sample.shape[1:]:  # a learned variance is not guided: it stays the condition's own
            guided[:, sample.shape[1] :] = with_condition[:, sample.shape[1] :]
        return guided

    return both_halves
