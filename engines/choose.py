"""``--library auto`` where several libraries can build: measure their engines against each other, keep one.

Each is held against the golden data first (level L1), then timed on the same inputs, in turn, so that a disturbance
meets all of them. A turn of short evaluations has as many as a loop has, since in a loop caches and threads are warm.
Hoisted results are cached by then: what is timed is the step.

An engine of ONNX Runtime is tried with waiting threads that sleep and with threads that spin: what waking them costs
depends on how long operators take, and on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy.typing as npt

from lehr.runtime.backends import Session, backend
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import STEP, Plan
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.golden import INDEX_FILE, read
from lehr.runtime.hoisted import Residency, hoisted_denoiser
from lehr.runtime.host import cores
from lehr.runtime.precision_schedule import graph_of
from lehr.runtime.recipe import Recipe
from lehr.runtime.verify import rel_error_limit, step_errors
from lehr.runtime.whole_loop import LOOP

WARM_UP = 3  # evaluations of each
ROUNDS, SECONDS = 30, 4.0  # turns of each, of which as many as fit into the time; at least three
TURN_S, MOST_EVALUATIONS = 0.03, 20  # a turn's time, for as many evaluations as fit, at least one
MARGIN = 1.05  # how much faster an engine must be than those before it; less is noise
# Bytes of an engine that is tried with spinning threads, too. A larger one has larger operators, which hide what waking
# costs, and would be in memory once more to be tried.
SPIN_BELOW = 200_000_000

Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One library's engine, not yet in the bundle: its plans lie in ``folder``."""

    library: str
    folder: Path
    plans: Mapping[str, Plan]

    @property
    def spinning(self) -> bool:
        """Whether its threads spin while a step runs."""
        return any(plan.options.get("spinning", False) for plan in self.plans.values())

    @property
    def name(self) -> str:
        """Among other candidates."""
        return named(self.library, self.spinning)


def named(library: str, spinning: bool) -> str:
    """What a candidate is called, for people."""
    return f"{library}, spinning" if spinning else library


def with_spinning(candidate: Candidate) -> list[Candidate]:
    """The same engine with threads that spin; none if it has no such setting, or could not gain."""
    running = {name: plan for name, plan in candidate.plans.items() if graph_of(name) in (STEP, LOOP)}
    asleep = all(plan.options.get("spinning") is False and "provider" not in plan.options for plan in running.values())
    threads = max((int(plan.options.get("intra_op_threads", 1)) or cores() for plan in running.values()), default=1)
    size = sum(file.stat().st_size for file in candidate.folder.iterdir())
    if not asleep or threads < 2 or size >= SPIN_BELOW:
        return []
    awake = {name: replace(plan, options={**plan.options, "spinning": True}) for name, plan in running.items()}
    return [replace(candidate, plans={**candidate.plans, **awake})]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row of what was tried.

    Attributes:
        spinning: whether the library's threads spin while a step runs.
        max_rel_error, limit: of the score, by the golden data; None where the bundle has none.
        step_ms: median of one evaluation; None if it could not run.
        reason: why it could not be built or run; else empty.
    """

    library: str
    spinning: bool = False
    max_rel_error: float | None = None
    limit: float | None = None
    step_ms: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Among other rows."""
        return named(self.library, self.spinning)

    @property
    def passed(self) -> bool:
        """It runs, and meets parity as far as that can be judged."""
        within = self.max_rel_error is None or self.limit is None or self.max_rel_error <= self.limit
        return self.step_ms is not None and within

    def to_json(self) -> dict[str, Any]:
        return {
            "library": self.library,
            "spinning": self.spinning,
            "step_ms": self.step_ms,
            "max_rel_error": self.max_rel_error,
            "limit": self.limit,
            "passed": self.passed,
            "reason": self.reason,
        }


def measure(bundle: Bundle, recipe: Recipe, candidates: Sequence[Candidate], feeds: Feeds) -> list[Measured]:
    """Measure engines of one bundle, in the order given.

    Args:
        bundle: with the portable graphs, and golden data if it has any.
        recipe: of the engines; decides the limit.
        candidates: two or more.
        feeds: an example of the model's inputs, for bundles without golden data.

    Raises:
        BundleError: the golden data is damaged.
    """
    golden = read(bundle) if INDEX_FILE in bundle.manifest.files else None
    limit = None if golden is None else rel_error_limit(golden, recipe.name)
    if golden is not None:
        spec = bundle.manifest.model
        k = len(golden.steps.timesteps) // 2  # what most steps of a precision schedule compute
        sample = golden.steps.inputs[k]
        steps = golden.steps.timesteps[k : k + 1].astype(spec.timestep.dtype.numpy).repeat(len(sample))
        feeds = {spec.sample.name: sample, spec.timestep.name: steps, **golden.steps.conditions}
    errors: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    running: dict[str, Denoiser] = {}

    def judge(candidate: Candidate) -> None:
        try:
            denoiser = _open(bundle, candidate, recipe)
            _evaluate(denoiser, feeds)
            errors[candidate.name] = None if golden is None else max(step_errors(denoiser, golden))
        except (RunFailed, BundleError) as e:
            refused[candidate.name] = str(e)
        else:
            running[candidate.name] = denoiser

    for candidate in candidates:
        judge(candidate)
    times = interleaved({name: partial(_evaluate, denoiser, feeds) for name, denoiser in running.items()})
    return [
        Measured(
            library=c.library,
            spinning=c.spinning,
            max_rel_error=errors.get(c.name),
            limit=limit,
            step_ms=times.get(c.name),
            reason=refused.get(c.name, ""),
        )
        for c in candidates
    ]


def fastest(measured: Sequence[Measured]) -> Measured | None:
    """The row to keep, of rows in the target's order: the fastest that passed; None if none did.

    A row must beat those before it by :data:`MARGIN`.
    """
    best: tuple[float, Measured] | None = None
    for row in measured:
        if row.passed and row.step_ms is not None and (best is None or row.step_ms * MARGIN < best[0]):
            best = (row.step_ms, row)
    return None if best is None else best[1]


def _open(bundle: Bundle, candidate: Candidate, recipe: Recipe) -> Denoiser:
    def load(name: str) -> Session:
        plan = candidate.plans[name]
        return backend(candidate.library).load(candidate.folder / plan.file, plan.options)

    signatures = {name: graph.signature for name, graph in bundle.manifest.graphs.items()}
    ends = None if recipe.schedule is None else recipe.schedule.ends
    return hoisted_denoiser(bundle.manifest.model, signatures, load, residency=Residency.ALL, ends=ends)


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call, of which as many as fill a turn run one after the other; the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    alone = {name: _seconds(call, WARM_UP)[-1] for name, call in calls.items()}
    turns = {name: min(max(1, int(TURN_S / seconds)), MOST_EVALUATIONS) for name, seconds in alone.items()}
    begun = time.monotonic()
    for turn in range(ROUNDS):
        if turn >= 3 and time.monotonic() - begun > SECONDS:
            break
        for name, call in calls.items():
            times[name] += _seconds(call, 1 + turns[name])[1:]
    return {name: round(1e3 * median(values), 4) for name, values in times.items()}


def _seconds(call: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


def _evaluate(denoiser: Denoiser, feeds: Feeds) -> None:
    spec = denoiser.spec
    conditions = {tensor.name: feeds[tensor.name] for tensor in spec.conditions}
    denoiser.with_variance(feeds[spec.sample.name], float(feeds[spec.timestep.name][0]), conditions)
