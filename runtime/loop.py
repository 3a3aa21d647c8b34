"""The only sampling loop: it executes a solver table, for every sampler, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.noise import batch_normal
from lehr.runtime.recurrence import Kept, Recurrence, Row
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.table_ops import LearnedVariance

Array = npt.NDArray[np.floating[Any]]
Network = Callable[[Array, float], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What ``on_step`` sees after evaluation ``index``: the input, the raw output, and the x_0 estimate."""

    index: int
    timestep: float
    sample: Array
    output: Array
    denoised: Array


def sample(
    network: Network,
    table: SolverTable,
    x_T: Array,
    *,
    injected: Sequence[Array] | Callable[[int], Array] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Array:
    """Run a sampler.

    Args:
        network: ``network(sample, timestep)`` returns the raw output in ``table.prediction``, of the sample's shape;
            twice the channels, the prediction first, if (and only if) the table has a learned variance.
        table: the sampler.
        x_T: (B, …) starting sample, unit noise times ``table.init_noise_sigma``; float32, or float64 for a
            float64 loop.
        injected: the noises in the order the sampler draws them, or a function of their number; by default the
            counter-based generator with seed 0.
        on_step: called after every evaluation; an exception raised there ends the loop.

    Returns:
        (B, …) final sample, of x_T's dtype.

    Raises:
        InvalidInput: too few injected noises, or noises of another shape than x_T.
        RunFailed: the network returned another shape than the sample's.
    """
    if x_T.dtype not in (np.float32, np.float64):
        raise InvalidInput(f"x_T is {x_T.dtype}, expected float32 or float64.")
    if table.variance is not None and x_T.ndim < 2:
        raise InvalidInput(f"x_T has shape {x_T.shape}; a sampler with learned variance needs (batch, channels, …).")
    draw = _injected(injected, table, x_T)
    form = table.recurrence()
    inputs = _recurrent(form, table, x_T, draw) if form else _dense(table, x_T, draw)
    current = next(inputs)
    for i in range(len(table)):
        timestep = float(table.timesteps[i])
        output = _checked(network(current, timestep), table, x_T)
        prediction, variance = output, None
        if table.variance is not None:
            prediction, variance = output[:, : x_T.shape[1]], output[:, x_T.shape[1] :]
        if on_step is not None:
            denoised = _denoised(table, i, current, prediction, x_T)
            on_step(Step(index=i, timestep=timestep, sample=current, output=output, denoised=denoised))
        current = inputs.send(_Evaluation(prediction, variance))
    return current


@dataclass(frozen=True, slots=True)
class _Evaluation:
    prediction: Array
    variance: Array | None  # the network's extra channels


def _denoised(table: SolverTable, i: int, model_input: Array, prediction: Array, like: Array) -> Array:
    pair = ((table.denoised_from_input[i], model_input), (table.denoised_from_output[i], prediction))
    return _scaled_sum(pair, like)


def _checked(output: Array, table: SolverTable, x_T: Array) -> Array:
    expected = x_T.shape if table.variance is None else (x_T.shape[0], 2 * x_T.shape[1], *x_T.shape[2:])
    if output.shape != expected:
        why = "" if table.variance is None else f" ({table.sampler} expects a learned variance beside the prediction)"
        raise RunFailed(
            f"the network returned shape {output.shape} for a sample of shape {x_T.shape}, expected {expected}{why}."
        )
    return output.astype(x_T.dtype, copy=False)


# ---------------------------------------------------------------------------------------------- the two forms

_Draw = Callable[[int, Array | None], Array]
_Rows = Generator[Array, _Evaluation, None]


def _recurrent(form: Recurrence, table: SolverTable, x_T: Array, draw: _Draw) -> _Rows:
    """Yield the rows; is sent the evaluations. Keeps ``form.depth`` latents."""
    like = x_T.astype(np.float64) if form.wide else x_T
    inputs: dict[int, Array] = {}
    outputs: dict[tuple[int, int], Array] = {}
    variance: Array | None = None

    def terms(row: Row) -> Iterable[tuple[float, Array]]:
        """Nothing here outlives the row: a list of the terms would keep latents that have expired."""
        yield row.start, like
        yield from ((c, inputs[j]) for j, c in row.inputs)
        yield from ((c, outputs[bank, j]) for bank, j, c in row.outputs)
        yield from ((c, draw(j, variance)) for j, c in row.noises)

    for i, row in enumerate(form.rows):
        current = _scaled_sum(terms(row), like)
        for key in row.expired:
            if len(key) == 1:
                del inputs[key[0]]
            else:
                del outputs[key[0], key[1]]
        evaluation = yield current.astype(x_T.dtype, copy=False)
        variance = evaluation.variance
        prediction = evaluation.prediction.astype(like.dtype, copy=False)
        if (i,) in form.used:
            inputs[i] = current
        if (0, i) in form.used:
            outputs[0, i] = prediction
            if form.kept is not Kept.OUTPUT:
                outputs[0, i] = _scaled_sum(((form.from_input[i], current), (form.from_output[i], prediction)), like)
        if table.clip is not None and (1, i) in form.used:
            outputs[1, i] = table.clip(_denoised(table, i, current, prediction, like))


def _dense(table: SolverTable, x_T: Array, draw: _Draw) -> _Rows:
    """The same from the table itself: keeps every output, and sums in float64 since large terms may cancel."""
    predictions: list[Array] = []
    clipped: list[Array] = []
    noises: dict[int, Array] = {}
    variance: Array | None = None
    like: Array = x_T.astype(np.float64)
    for i in range(len(table) + 1):
        terms = [(float(table.start[i]), like)]
        terms += zip(table.outputs[i].tolist(), predictions, strict=False)
        if table.clipped is not None:
            terms += zip(table.clipped[i].tolist(), clipped, strict=False)
        for j in np.flatnonzero(table.noises[i]).tolist():
            if j not in noises:
                noises[j] = draw(j, variance)
            terms.append((float(table.noises[i, j]), noises[j]))
        current = _scaled_sum(terms, like)
        evaluation = yield current.astype(x_T.dtype)
        predictions.append(evaluation.prediction)
        variance = evaluation.variance
        if table.clip is not None:
            clipped.append(table.clip(_denoised(table, i, current, evaluation.prediction, like)))


def _scaled_sum(terms: Iterable[tuple[float, Array]], like: Array) -> Array:
    """Σ c a in ``like``'s dtype, element by element, so that a batch changes nothing."""
    total: Array | None = None
    scratch: Array | None = None
    for coefficient, array in terms:
        if coefficient == 0:
            continue
        factor = like.dtype.type(coefficient)
        if total is None:
            total = np.multiply(array, factor, dtype=like.dtype)
            continue
        scratch = np.multiply(array, factor, out=scratch, dtype=like.dtype)
        np.add(total, scratch, out=total)
    return np.zeros_like(like) if total is None else total


# ------------------------------------------------------------------------------------------------------ noises


def _injected(
    given: Sequence[Array] | Callable[[int], Array] | None,
    table: SolverTable,
    x_T: Array,
) -> _Draw:
    """``draw(j, variance)``: noise j, scaled by what the network's extra channels say."""
    if given is None:
        number: Callable[[int], Array] = lambda j: batch_normal(0, range(len(x_T)), x_T.shape[1:], stream=1 + j)  # noqa: E731
    elif callable(given):
        number = given
    else:
        noises = list(given)
        if len(noises) < table.num_noises:
            raise InvalidInput(f"{table.sampler} injects {table.num_noises} noises, got {len(noises)}.")
        number = noises.__getitem__

    def draw(j: int, variance: Array | None) -> Array:
        noise = number(j)
        if noise.shape != x_T.shape:
            raise InvalidInput(f"injected noise {j} has shape {noise.shape}, expected {x_T.shape}.")
        if table.variance in (None, LearnedVariance.UNUSED) or variance is None:
            return noise
        slope = 0.0 if table.variance_slopes is None else float(table.variance_slopes[j])
        return table.variance.scale(noise, variance, slope)

    return draw
