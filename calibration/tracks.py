"""Reference loops, recorded call by call, and what another step graph answers to the same calls.

An answer to a recorded call is the error of one evaluation alone: nothing has drifted yet. Score errors and
sensitivities are made of such answers.

Shape legend: B samples of the track, … the sample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lehr.calibration.budget import Losses
from lehr.calibration.execute import Session
from lehr.runtime.errors import InvalidInput
from lehr.runtime.loop import Step
from lehr.runtime.parity import WORST, relative_error, score, sqnr_db

if TYPE_CHECKING:
    from lehr.calibration.held_out import HeldOut

Array = npt.NDArray[Any]

SCORED = 8  # samples whose every evaluation is compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the step graph in a reference loop.

    Attributes:
        index, timestep, alpha, sigma: of the evaluation.
        sample: what the network was given; guidance puts its halves one after the other.
        feeds: everything that the step graph was given.
        output: what it returned.
    """

    index: int
    timestep: float
    alpha: float
    sigma: float
    sample: Array
    feeds: Mapping[str, Array]
    output: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """A reference loop.

    Attributes:
        calls: of the step graph, in order.
        inputs, outputs: of the network as the loop sees it, guided: (B, …) an evaluation.
        gains: the solver table's error gains, one an evaluation.
        timesteps: one an evaluation.
        final: (B, …) final samples.
    """

    calls: tuple[Call, ...]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    gains: Array
    timesteps: Array
    final: Array


class _Keeping:
    """The reference, with its calls kept."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.taken: list[tuple[dict[str, Array], Array]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        self.taken.append(({name: np.array(value) for name, value in feeds.items()}, np.array(only(outputs))))
        return outputs


class _Replaying:
    """Answers recorded calls, whatever it is asked: those of some evaluations by a session, others as recorded."""

    def __init__(self, session: Session, track: Track, evaluations: Collection[int], output: str) -> None:
        self._session, self._evaluations, self._output = session, evaluations, output
        self._calls = iter(track.calls)

    def run(self, _: Mapping[str, Array]) -> dict[str, Array]:
        call = next(self._calls)
        answered = call.index in self._evaluations
        return {self._output: only(self._session.run(call.feeds)) if answered else call.output}


def record(held_out: HeldOut, num: int = SCORED) -> Track:
    """The reference loop of the first ``num`` samples; raises InvalidInput for more than one batch."""
    if num > held_out.settings.batch:
        raise InvalidInput(f"a track is one batch: {num} samples are more than {held_out.settings.batch}.")
    table, keeping = held_out.table, _Keeping(held_out.reference)
    calls: list[Call] = []
    steps: list[Step] = []

    def close(_: int, step: Step) -> None:
        for feeds, output in keeping.taken:
            calls.append(
                Call(
                    index=step.index,
                    timestep=step.timestep,
                    alpha=float(table.alphas[step.index]),
                    sigma=float(table.sigmas[step.index]),
                    sample=feeds[held_out.spec.sample.name],
                    feeds=feeds,
                    output=output,
                )
            )
        keeping.taken.clear()
        steps.append(step)

    final = held_out.draw(keeping, range(num), on_step=close)
    return Track(
        calls=tuple(calls),
        inputs=tuple(np.array(step.sample) for step in steps),
        outputs=tuple(np.array(step.output) for step in steps),
        gains=table.gains(),
        timesteps=table.timesteps,
        final=final,
    )


def replay(held_out: HeldOut, track: Track, session: Session, evaluations: Collection[int]) -> dict[int, Array]:
    """Outputs of another step graph at the reference's inputs, guided, by evaluation: (B, …) float64.

    The loop runs once more. Whatever it asks for, the answer is that to the recorded call, so guidance and
    everything else between network and loop acts on the answers as it does on the reference's outputs.
    """
    outputs: dict[int, Array] = {}

    def keep(_: int, step: Step) -> None:
        if step.index in evaluations:
            outputs[step.index] = step.output.astype(np.float64)

    replaying = _Replaying(session, track, evaluations, held_out.output)
    held_out.draw(replaying, range(len(track.final)), on_step=keep)
    return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationError:
    """Another step graph's answer to one recorded call, beside the recorded output.

    Attributes:
        score: relative error of the score, the worst sample's. Where alpha is 0 the score does not depend on the
            network; there the outputs are compared.
        sqnr_db: signal to quantisation noise of the outputs, all samples together.
    """

    score: float
    sqnr_db: float


def evaluation_errors(held_out: HeldOut, track: Track, session: Session) -> list[EvaluationError]:
    """Of each call of a track."""
    found, channels = [], held_out.spec.sample_shape(1)[1]
    for call in track.calls:
        pair = [out[:, :channels].astype(np.float64) for out in (call.output, only(session.run(call.feeds)))]
        ratio = sqnr_db(*pair)
        if call.alpha != 0:
            pair = [score(held_out.spec.prediction, call.alpha, call.sigma, call.sample, out) for out in pair]
        found.append(EvaluationError(score=relative_error(*pair), sqnr_db=ratio))
    return found


def evaluation_losses(errors: Sequence[EvaluationError]) -> Losses:
    """Of some evaluations."""
    mean = min(float(np.mean([error.score for error in errors])), WORST)
    return Losses(score_error=mean, sqnr_db=tuple(error.sqnr_db for error in errors))


def only(outputs: Mapping[str, Array]) -> Array:
    """The result of a step graph, which has one."""
    return next(iter(outputs.values()))
