"""L4: what an engine costs beside a baseline's, as ratios new / old measured in one run.

Latency is a median of paired ratios. What disturbs a machine lasts longer than an evaluation, so both engines are
evaluated in turn on the same inputs, and each ratio is of the fastest of a few. Pairs are added in rounds, each as long
as all before it, until a confidence interval of the median lies on one side of the limit: a bootstrap over blocks of
neighbours, which are not independent (Künsch 1989; percentile method). Every round loads both engines anew, because
where their memory comes to lie makes per cents. An interval that never decides is a failure: a gate that cannot tell
does not let pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.ci.checks import Check, Outcome, judged
from lehr.ci.footprint import footprint
from lehr.ci.policy import CostLimits
from lehr.runtime import engine as engines
from lehr.runtime.backends import Session, backend
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.golden import Golden
from lehr.runtime.hoisted import PROMPT, SCHEDULE, STEP, Residency, hoisted_denoiser

WARM_UP, FASTEST_OF = 3, 3  # evaluations of each engine: after loading, and for each ratio
LEAST_PAIRS, MOST_PAIRS, LEAST_ROUNDS = 10, 1280, 3
RESAMPLES, BLOCK = 1000, 5
THREADS = 1  # of both: two engines on 2 busy cores differed from themselves by 15 % with two threads, by 1 % with one
_THREAD_OPTIONS = ("intra_op_threads", "threads")  # what the engine libraries' options call them

# ------------------------------------------------------------------------------------------------------ the rung


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """An older bundle of the same model, and its engine for the same target and recipe."""

    bundle: Bundle
    record: EngineRecord


def baseline_of(bundle: Bundle, record: EngineRecord, old: Bundle) -> Baseline:
    """The engine in ``old`` that ``record`` is to be compared with.

    Raises:
        InvalidInput: ``old`` is of another model.
        BundleError: it has no such engine, or not for this machine.
    """
    ours, theirs = bundle.manifest.model, old.manifest.model
    if ours.name != theirs.name:
        raise InvalidInput(f"the baseline is of model {theirs.name!r}, expected {ours.name!r}. Give one of that model.")
    for what in ("inputs", "outputs", "dims"):
        if getattr(ours, what) != getattr(theirs, what):
            raise InvalidInput(
                f"the baseline's model {theirs.name!r} has other {what} than the one to judge, so their cost is not "
                "comparable. Give a baseline that was exported from the same architecture."
            )
    found = engines.find(old, record.target, record.recipe)
    engines.check(old, found)
    return Baseline(bundle=old, record=found)


def cost(bundle: Bundle, record: EngineRecord, baseline: Baseline, golden: Golden, limits: CostLimits) -> list[Check]:
    """Checks of L4: size and latency are judged, memory and start-up are facts."""
    return [
        _size(bundle, record, baseline, limits),
        *_footprints(bundle, record, baseline),
        _latency(bundle, record, baseline, golden, limits),
    ]


# ------------------------------------------------------------------------------------------- size, memory, start-up


def engine_bytes(bundle: Bundle, record: EngineRecord) -> int:
    """Bytes of an engine's files."""
    return sum(bundle.manifest.files[name].bytes for name in bundle.names(record.folder + "/"))


def _size(bundle: Bundle, record: EngineRecord, baseline: Baseline, limits: CostLimits) -> Check:
    new, old = engine_bytes(bundle, record), engine_bytes(baseline.bundle, baseline.record)
    ratio = new / old
    reason = f"{new / 1e6:,.2f} MB beside {old / 1e6:,.2f} MB: ratio {ratio:.3f}, must be below {limits.size_ratio:g}"
    return judged("L4.size", ratio < limits.size_ratio, reason, value=ratio, limit=limits.size_ratio)


def _footprints(bundle: Bundle, record: EngineRecord, baseline: Baseline) -> list[Check]:
    try:
        new, old = footprint(bundle, record), footprint(baseline.bundle, baseline.record)
    except RunFailed as e:
        return [Check(name="L4.memory", outcome=Outcome.NOT_RUN, reason=str(e))]
    pairs = {"memory": ("MB", new.peak_mb, old.peak_mb), "start": ("s", new.start_seconds, old.start_seconds)}
    return [
        Check(
            name=f"L4.{name}",
            outcome=Outcome.NOTED,
            reason=f"{a:,.3g} {unit} beside {b:,.3g} {unit}, one process each: ratio {a / b:.3f}",
            value=a / b,
        )
        for name, (unit, a, b) in pairs.items()
    ]


# --------------------------------------------------------------------------------------------------------- latency


def _latency(bundle: Bundle, record: EngineRecord, baseline: Baseline, golden: Golden, limits: CostLimits) -> Check:
    k = len(golden.steps.timesteps) // 2
    inputs, timestep = golden.steps.inputs[k], float(golden.steps.timesteps[k])

    def load(one: Bundle, of: EngineRecord) -> Callable[[], Any]:
        denoiser = _at(one, of)
        return lambda: denoiser(inputs, timestep, golden.steps.conditions)

    found = paired_ratio(
        lambda: load(bundle, record),
        lambda: load(baseline.bundle, baseline.record),
        limits,
        clock=time.perf_counter,
    )
    reason = (
        f"ratio {found.median:.3f} [{found.low:.3f}, {found.high:.3f}] over {found.pairs} pairs, batch {len(inputs)}, "
        f"one thread; must be below {limits.latency_ratio:g}"
    )
    if found.decided is None:
        reason += "; the interval did not decide, which is no pass: repeat on a quieter machine"
    return judged("L4.latency", found.decided is True, reason, value=found.median, limit=limits.latency_ratio)


def _at(bundle: Bundle, record: EngineRecord) -> Denoiser:
    """The engine with all its graphs in memory and a fixed number of threads, whatever it was built with."""
    graphs = bundle.manifest.graphs

    def load(name: str) -> Session:
        engines.check(bundle, record, name)
        plan = record.plans[name]
        fixed: dict[str, Any] = {key: THREADS for key in _THREAD_OPTIONS if key in plan.options}
        return backend(record.library).load(bundle.path(f"{record.folder}/{plan.file}"), {**plan.options, **fixed})

    signatures = {name: graphs[name].signature for name in (PROMPT, SCHEDULE, STEP) if name in graphs}
    return hoisted_denoiser(bundle.manifest.model, signatures, load, residency=Residency.ALL, ends=record.ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A median of paired ratios with its interval; ``decided`` is True below the limit, False above, None between."""

    median: float
    low: float
    high: float
    pairs: int
    decided: bool | None


def paired_ratio(
    load_new: Callable[[], Callable[[], Any]],
    load_old: Callable[[], Callable[[], Any]],
    limits: CostLimits,
    *,
    clock: Callable[[], float],
) -> Ratio:
    """Time two calls in turn until the interval around the median of new / old lies on one side of the limit.

    Args:
        load_new: makes what is timed, anew for each round.
        load_old: the same for what it is compared with.
        limits: the limit, the interval's confidence, and after how long no further round begins.
        clock: seconds, from anywhere.
    """
    ratios: list[float] = []
    begun, wanted, rounds = clock(), LEAST_PAIRS, 0
    while True:
        if rounds % 2 == 0:
            new, old = load_new(), load_old()
        else:
            old, new = load_old(), load_new()
        rounds += 1
        for _ in range(WARM_UP):
            new()
            old()
        while len(ratios) < wanted:
            ratios.append(_ratio(new, old, clock, len(ratios) % 2 == 0))
        if rounds < LEAST_ROUNDS:
            wanted *= 2
            continue
        low, high = median_interval(np.array(ratios), limits.confidence)
        decided = True if high < limits.latency_ratio else False if low >= limits.latency_ratio else None
        if decided is not None or wanted >= MOST_PAIRS or clock() - begun > limits.max_seconds:
            median = float(np.median(ratios))
            return Ratio(median=median, low=low, high=high, pairs=len(ratios), decided=decided)
        wanted *= 2


def median_interval(values: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Bootstrap confidence interval of the median over blocks of neighbours; equal values give an equal interval."""
    count = -(-len(values) // BLOCK)
    starts = np.random.default_rng(0).integers(max(1, len(values) - BLOCK + 1), size=(RESAMPLES, count, 1))
    draws = (starts + np.arange(BLOCK)).reshape(RESAMPLES, -1)[:, : len(values)]
    medians = np.median(values[np.minimum(draws, len(values) - 1)], axis=1)
    tail = (1 - confidence) / 2
    return float(np.quantile(medians, tail)), float(np.quantile(medians, 1 - tail))


def _ratio(new: Callable[[], Any], old: Callable[[], Any], clock: Callable[[], float], new_first: bool) -> float:
    """The fastest of a few evaluations of each, in turn."""
    best = {True: np.inf, False: np.inf}
    for turn in range(2 * FASTEST_OF):
        is_new = (turn % 2 == 0) is new_first
        best[is_new] = min(best[is_new], _timed(new if is_new else old, clock))
    return float(best[True] / best[False])


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started
