"""``--library auto`` where several libraries can build: measure their engines against each other, keep one.

Each is held against the golden data first (level L1), then timed on the same inputs, one evaluation of each in turn,
so that a disturbance meets all of them. Hoisted results are cached by then: what is timed is the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy.typing as npt

from lehr.runtime.backends import Session, backend
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.golden import INDEX_FILE, read
from lehr.runtime.hoisted import Residency, hoisted_denoiser
from lehr.runtime.recipe import Recipe
from lehr.runtime.verify import rel_error_limit, step_errors

WARM_UP, ROUNDS, SECONDS = 3, 30, 4.0  # evaluations of each, of which as many as fit into the time; at least three
MARGIN = 1.05  # how much faster a library must be than one the target names earlier; less is noise

Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One library's engine, not yet in the bundle: its plans lie in ``folder``."""

    library: str
    folder: Path
    plans: Mapping[str, Plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row of what was tried.

    Attributes:
        max_rel_error, limit: of the score, by the golden data; None where the bundle has none.
        step_ms: median of one evaluation; None if it could not run.
        reason: why it could not be built or run; else empty.
    """

    library: str
    max_rel_error: float | None = None
    limit: float | None = None
    step_ms: float | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """It runs, and meets parity as far as that can be judged."""
        within = self.max_rel_error is None or self.limit is None or self.max_rel_error <= self.limit
        return self.step_ms is not None and within

    def to_json(self) -> dict[str, Any]:
        return {
            "library": self.library,
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
            errors[candidate.library] = None if golden is None else max(step_errors(denoiser, golden))
        except (RunFailed, BundleError) as e:
            refused[candidate.library] = str(e)
        else:
            running[candidate.library] = denoiser

    for candidate in candidates:
        judge(candidate)
    times = interleaved({name: partial(_evaluate, denoiser, feeds) for name, denoiser in running.items()})
    return [
        Measured(
            library=c.library,
            max_rel_error=errors.get(c.library),
            limit=limit,
            step_ms=times.get(c.library),
            reason=refused.get(c.library, ""),
        )
        for c in candidates
    ]


def fastest(measured: Sequence[Measured]) -> str | None:
    """The library to keep, of rows in the target's order: the fastest that passed; None if none did.

    A library must beat those before it by :data:`MARGIN`.
    """
    best: tuple[float, str] | None = None
    for row in measured:
        if row.passed and row.step_ms is not None and (best is None or row.step_ms * MARGIN < best[0]):
            best = (row.step_ms, row.library)
    return None if best is None else best[1]


def _open(bundle: Bundle, candidate: Candidate, recipe: Recipe) -> Denoiser:
    def load(name: str) -> Session:
        plan = candidate.plans[name]
        return backend(candidate.library).load(candidate.folder / plan.file, plan.options)

    signatures = {name: graph.signature for name, graph in bundle.manifest.graphs.items()}
    ends = None if recipe.schedule is None else recipe.schedule.ends
    return hoisted_denoiser(bundle.manifest.model, signatures, load, residency=Residency.ALL, ends=ends)


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call, one of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.monotonic()
    for turn in range(WARM_UP + ROUNDS):
        if turn >= WARM_UP + 3 and time.monotonic() - begun > SECONDS:
            break
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(median(values), 4) for name, values in times.items()}


def _evaluate(denoiser: Denoiser, feeds: Feeds) -> None:
    spec = denoiser.spec
    conditions = {tensor.name: feeds[tensor.name] for tensor in spec.conditions}
    denoiser.with_variance(feeds[spec.sample.name], float(feeds[spec.timestep.name][0]), conditions)
