"""What quantising one layer does to the final sample, by layer and timestep, without running its loop.

The error gains g_i of a solver table say how an error of evaluation i moves the final sample at once
(:mod:`lehr.runtime.error_gains`). The network answers to what has moved, and often takes most of it back: for
digits-adm's 20 steps the gains alone predict final errors 20 to 80 times too large. So the *response* of the loop is
measured, once for all layers: the error of a quantised graph at evaluation i, and at no other, is followed to the end
by the reference network, which gives

    h_i = |change of the final sample| / |error of evaluation i|

in place of g_i. A layer then costs a few evaluations with it alone quantised, at recorded inputs, and errors of
different layers and evaluations are taken to be independent:

    mean squared error of the final sample = Σ_i h_i² (mean squared error of evaluation i)

Both the map of layers against timesteps and the search for a cheap recipe are made of these numbers; the search then
measures what it chose.

Shape legend: L layers, O options, P points (evaluations looked at), B samples of the track.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.execute import OrtGraph, Session
from lehr.calibration.held_out import HeldOut
from lehr.calibration.tracks import Track, only, replay
from lehr.runtime.errors import InvalidInput, RunFailed

Array = npt.NDArray[Any]
Apply = Callable[[Mapping[str, str]], ir.Model]
Also = Callable[[str, str, Session], None]

POINTS = 6  # evaluations looked at; the others are taken to be like their neighbours


class OutOfTime(RunFailed):
    """A time limit was reached before anything could be said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Effects of single layers.

    Attributes:
        layers: names, in the order of the graph (L).
        options: names of what a layer can be made (O).
        points: the evaluations looked at (P).
        timesteps: theirs.
        weights: (P,) how many evaluations each stands for.
        gains: (P,) the table's error gains g.
        response: (P, B) h, the loop's response.
        errors: (L, O, P, B) mean squared error of the output; nan where a layer has not the option, or time ran out.
        probe: (P, B) the same of a graph with errors of the usual kind and size.
    """

    layers: tuple[str, ...]
    options: tuple[str, ...]
    points: tuple[int, ...]
    timesteps: tuple[float, ...]
    weights: Array
    gains: Array
    response: Array
    errors: Array
    probe: Array

    def effect(self) -> Array:
        """(L, O, B): predicted mean squared error of the final samples with one layer quantised."""
        return np.asarray((self.weights[:, None] * self.response**2 * self.errors).sum(axis=2))

    def noise(self) -> Array:
        """(L, O, B): error of single evaluations over a usual graph's, the mean over evaluations.

        A mean of decibels over evaluations falls, to first order, by the mean of their noise's relative growth.
        """
        usual = np.maximum(self.probe, np.finfo(np.float64).tiny)
        share = self.weights / self.weights.sum()
        return np.asarray((share[:, None] * self.errors / usual).sum(axis=2))

    def by_timestep(self, option: str) -> Array:
        """(L, P): the same by point, root mean square over samples: how far evaluations there move the result."""
        chosen = self.errors[:, self.options.index(option)]
        return np.asarray(np.sqrt((self.weights[:, None] * self.response**2 * chosen).mean(axis=-1)))

    def to_arrays(self) -> dict[str, Array]:
        """For a .npz file, all but the names."""
        return {
            "points": np.array(self.points, np.int64),
            "timesteps": np.array(self.timesteps, np.float64),
            "weights": self.weights,
            "gains": self.gains,
            "response": self.response,
            "errors": self.errors,
            "probe": self.probe,
        }


def measure_sensitivity(
    held_out: HeldOut,
    options: Mapping[str, Sequence[str]],
    apply: Apply,
    probe: ir.Model,
    *,
    points: int = POINTS,
    channel_weights: Array | None = None,
    deadline: float | None = None,
    also: Also | None = None,
) -> Sensitivity:
    """Measure single layers.

    Args:
        held_out: gives the reference loop.
        options: layer -> what it can be made, by name; layers in the order of the graph.
        apply: a plan, layer -> option, as a step graph.
        probe: a graph with errors of the usual kind and size, to measure the loop's response with.
        points: how many evaluations to look at.
        channel_weights: (C,) how much an error of each channel counts, for latents the decoder's measured
            sensitivity; by default all count alike.
        deadline: of ``time.monotonic``; layers that are not reached are nan.
        also: called with layer, option and the session that runs them, for what else is to be measured with it.

    Raises:
        InvalidInput: no layer, or weights of another number of channels.
        OutOfTime: the deadline passed before the loop's response was known.
    """
    names = tuple(options)
    kinds = tuple(dict.fromkeys(option for able in options.values() for option in able))
    if not names or not kinds:
        raise InvalidInput("no layer of the graph can be quantised, so there is nothing to search.")
    track = held_out.track
    chosen, weights = spread(len(track.outputs), points)
    scale = channel_scale(channel_weights, track.final.shape[1], track.final.ndim)
    threads = held_out.settings.threads
    gauge = OrtGraph(probe, threads=threads)
    sizes = output_errors(held_out, track, gauge, chosen, scale=scale)
    response = measure_response(held_out, track, gauge, chosen, sizes, scale=scale, deadline=deadline)
    errors = np.full((len(names), len(kinds), len(chosen), len(track.final)), np.nan)
    jobs = [(layer, option) for layer, able in options.items() for option in able]
    for layer, option in jobs:
        if deadline is not None and time.monotonic() > deadline:
            break
        session = OrtGraph(apply({layer: option}), threads=threads)
        found = output_errors(held_out, track, session, chosen, scale=scale)
        errors[names.index(layer), kinds.index(option)] = found
        if also is not None:
            also(layer, option, session)
    return Sensitivity(
        layers=names,
        options=kinds,
        points=chosen,
        timesteps=tuple(float(track.timesteps[i]) for i in chosen),
        weights=weights,
        gains=track.gains[list(chosen)],
        response=response,
        errors=errors,
        probe=sizes,
    )


def spread(evaluations: int, points: int) -> tuple[tuple[int, ...], Array]:
    """Evaluations to look at, the first and last among them, and how many each stands for; (P,) summing to all."""
    count = max(1, min(points, evaluations))
    chosen = np.unique(np.rint(np.linspace(0, evaluations - 1, count)).astype(int))
    nearest = np.abs(np.arange(evaluations)[:, None] - chosen[None]).argmin(axis=1)
    return tuple(chosen.tolist()), np.bincount(nearest, minlength=len(chosen)).astype(np.float64)


def channel_scale(weights: Array | None, channels: int, rank: int) -> Array:
    """Weights of squared errors, of mean 1, in a shape that multiplies (B, C, …)."""
    if weights is None:
        return np.ones((1,) * rank)
    given = np.asarray(weights, np.float64)
    if given.shape != (channels,) or not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
        raise InvalidInput(
            f"channel weights have shape {given.shape}, expected ({channels},): one for each channel of the sample, "
            "none negative and not all 0."
        )
    return np.asarray((given / given.mean()).reshape(1, channels, *(1,) * (rank - 2)))


# --------------------------------------------------------------------------------------------------- measuring


def output_errors(
    held_out: HeldOut, track: Track, session: Session, points: Sequence[int], *, scale: Array | float = 1.0
) -> Array:
    """(P, B): mean squared errors of a step graph's guided outputs at the reference's inputs."""
    answers = replay(held_out, track, session, frozenset(points))
    return np.stack([_mean_square(answers[i] - track.outputs[i], scale) for i in points])


def measure_response(
    held_out: HeldOut,
    track: Track,
    gauge: Session,
    points: Sequence[int],
    sizes: Array,
    *,
    scale: Array | float = 1.0,
    deadline: float | None = None,
) -> Array:
    """(P, B): how far the loop carries an error of each point, for errors as ``gauge`` makes them, (P, B) in size.

    Raises:
        OutOfTime: the deadline passed.
    """
    response = np.zeros(sizes.shape)
    for row, point in enumerate(points):
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime(
                "the time limit passed before the sensitivity of the loop was measured; give it more (--time-limit)."
            )
        final = held_out.draw(_Impulse(held_out, track, gauge, point), range(len(track.final)))
        moved = _mean_square(final.astype(np.float64) - track.final, scale)
        response[row] = np.sqrt(np.divide(moved, sizes[row], out=np.zeros_like(moved), where=sizes[row] > 0))
    return response


class _Impulse:
    """The reference but for one evaluation, which another graph answers. What came before it is not run again."""

    def __init__(self, held_out: HeldOut, track: Track, other: Session, point: int) -> None:
        self._reference, self._other, self._point, self._output = held_out.reference, other, point, held_out.output
        self._calls = iter(track.calls)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        call = next(self._calls)
        if call.index < self._point:
            return {self._output: call.output}
        if call.index == self._point:
            return {self._output: only(self._other.run(call.feeds))}
        return self._reference.run(feeds)


def _mean_square(error: Array, scale: Array | float) -> Array:
    return np.asarray((error**2 * scale).mean(axis=tuple(range(1, error.ndim))))
