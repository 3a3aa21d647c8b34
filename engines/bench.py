"""``lehr bench``: what engines and their peers take for one evaluation, each in a process of its own, taking turns.

A contestant is a command that speaks the protocol of :mod:`lehr.runtime.timing`. All run on the same inputs. In each
round each evaluates a few times while the others wait, so that a disturbance meets all of them; what is reported is the
median of all its evaluations, and the median over rounds of its ratio to the first contestant. A loop evaluates many
times in a row, with its weights in the caches and its threads awake, so evaluations of milliseconds have longer turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import RunFailed
from lehr.runtime.parity import sqnr_db
from lehr.runtime.timing import MARK

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

LOOPS = 3
LEAST_ROUNDS = 5
EVALUATIONS, MOST_EVALUATIONS = 4, 40  # of each contestant and round
TURN_S = 0.1  # for as many evaluations as fit
WARMING = 5  # one in so many evaluations of a turn, the first ones, refills the caches and does not count
_TAIL = 400  # characters of what a process that failed said last


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to evaluate a model.

    Attributes:
        name: for the table.
        command: arguments of a process, to which the file of inputs is appended.
        size: bytes of its files; None where they are not its own.
        loops: whether it can draw whole samples.
    """

    name: str
    command: tuple[str, ...]
    size: int | None = None
    loops: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of a contestant.

    Attributes:
        step_ms, p90_ms: median and 90th percentile of one evaluation.
        ratio: of an evaluation to the first contestant's, median over the rounds.
        sqnr_db: of its output against the reference, the worst over all inputs.
        start_s: from the start of its process to its first output.
        peak_mb, engine_mb: largest resident memory of the process, and what is beyond that of Python and the imports
            that were there before anything was loaded.
        loop_s: seconds of one loop, the median of three; None where it was not asked for or cannot be drawn.
        reason: why it could not be measured; else empty.
    """

    name: str
    step_ms: float | None = None
    p90_ms: float | None = None
    ratio: float | None = None
    sqnr_db: float | None = None
    start_s: float | None = None
    peak_mb: float | None = None
    engine_mb: float | None = None
    bytes: int | None = None
    loop_s: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Process:
    """A contestant that has started; raises RunFailed with what it said last if it ends early."""

    def __init__(self, contestant: Contestant, inputs: Path) -> None:
        self.contestant = contestant
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed by close()
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [*contestant.command, str(inputs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=child_environment(),
            text=True,
        )
        try:
            self.started = self._read()
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - begun

    def ask(self, **request: int | str) -> list[float]:
        """Its answer to one request: seconds."""
        if self._process.stdin is None:
            raise TypeError("the process has no standard input")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as e:
            raise RunFailed(f"{self.contestant.name} ended early: {self._last()}") from e
        seconds: list[float] = self._read()
        return seconds

    def output(self, inputs: Path) -> Array:
        """What it computes from some inputs."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "output.npy"
            self.ask(inputs=str(inputs), output=str(file))
            made: Array = np.load(file, allow_pickle=False)
        return made

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> Any:
        if self._process.stdout is None:
            raise TypeError("the process has no standard output")
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._process.wait()
        raise RunFailed(f"{self.contestant.name} ended early: {self._last()}")

    def _last(self) -> str:
        self._errors.seek(0)
        said = self._errors.read().strip()[-_TAIL:]
        return said.splitlines()[-1] if said else f"exit code {self._process.returncode}, no message"


def child_environment() -> dict[str, str]:
    """For processes that import what this one can, and whose threads sleep while others have their turn."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}


def compare(
    contestants: Sequence[Contestant],
    inputs: Sequence[Path],
    *,
    references: Sequence[Array] = (),
    loop_steps: int | None = None,
    seconds: float = 10.0,
    progress: Progress = lambda text: None,
) -> list[Row]:
    """Measure contestants against each other.

    Args:
        contestants: the first is what ratios refer to.
        inputs: of one evaluation each, :func:`lehr.runtime.timing.write_inputs`; the first are timed, on all of them
            outputs are compared.
        references: (B, C, …) for each inputs, what an evaluation should return; by default what the first contestant
            returns.
        loop_steps: also draw a sample in so many steps.
        seconds: of evaluations in all; at least five rounds are made.
        progress: takes a line of text now and then.

    Returns:
        A row a contestant, also for those that fail.
    """
    failed: dict[str, str] = {}
    running: list[Process] = []
    with ExitStack() as stack:

        def start(contestant: Contestant) -> None:
            progress(f"starting {contestant.name}")
            try:
                made = Process(contestant, inputs[0])
            except RunFailed as e:
                failed[contestant.name] = str(e)
            else:
                running.append(stack.enter_context(closing(made)))

        for contestant in contestants:
            start(contestant)
        rounds = _rounds(running, seconds, progress)
        if not references and running:
            references = [running[0].output(path) for path in inputs]
        found = {}
        for process, times in zip(running, rounds, strict=True):
            loop_s = None
            if loop_steps and process.contestant.loops:
                loop_s = float(np.median([process.ask(loop=loop_steps)[0] for _ in range(LOOPS)]))
            worst = min(sqnr_db(r, process.output(path)) for r, path in zip(references, inputs, strict=True))
            found[process.contestant.name] = _row(process, times, rounds[0], worst, loop_s)
    return [found.get(c.name, Row(name=c.name, reason=failed.get(c.name, ""))) for c in contestants]


def _rounds(running: Sequence[Process], seconds: float, progress: Progress) -> list[list[list[float]]]:
    """For each process, the seconds of each round's evaluations."""
    times: list[list[list[float]]] = [[] for _ in running]
    turns = [turn_of(process.ask(evaluations=3)[-1]) for process in running]
    progress(f"measuring {len(running)} in turn")
    begun = time.monotonic()
    while running and (len(times[0]) < LEAST_ROUNDS or time.monotonic() - begun < seconds):
        order = range(len(running)) if len(times[0]) % 2 == 0 else reversed(range(len(running)))
        for k in order:
            warming = -(-turns[k] // WARMING)
            times[k].append(running[k].ask(evaluations=warming + turns[k])[warming:])
    return times


def turn_of(seconds: float) -> int:
    """Evaluations that count in a turn of a contestant that needs so long for one."""
    return min(max(EVALUATIONS, int(TURN_S / seconds)), MOST_EVALUATIONS)


def _row(
    process: Process, times: list[list[float]], first: list[list[float]], sqnr: float, loop_s: float | None
) -> Row:
    every = 1000 * np.concatenate(times)
    ratios = [np.median(a) / np.median(b) for a, b in zip(times, first, strict=True)]
    peak, base = process.started["peak_mb"], process.started["base_mb"]
    return Row(
        name=process.contestant.name,
        step_ms=round(float(np.median(every)), 4),
        p90_ms=round(float(np.quantile(every, 0.9)), 4),
        ratio=round(float(np.median(ratios)), 4),
        sqnr_db=round(sqnr, 2),
        start_s=round(process.start_s, 3),
        peak_mb=round(peak, 1),
        engine_mb=round(peak - base, 1),
        bytes=process.contestant.size,
        loop_s=None if loop_s is None else round(loop_s, 4),
    )
