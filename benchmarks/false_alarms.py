"""Does the release gate alarm where nothing is wrong? 200 honest variations of the reference models' engines.

    python benchmarks/false_alarms.py           writes benchmarks/results/false_alarms.json

What varies: the seed of the golden data (recorded by eager PyTorch anew), the engine library, its threads, the format,
a rebuild, and how samples are batched. Every one must pass policy `release`. L3 has seeds of its own, so it is judged
once for each engine of digits-dit. What was found is written every 20 variations. No alarm in n trials bounds the rate
of alarms by 3 / n with 95 % confidence (the rule of three).
"""

from __future__ import annotations

import datetime as dt
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from environment import write

from lehr.ci import gate as gates
from lehr.ci.checks import Outcome
from lehr.ci.policy import Limits, Policy, policy
from lehr.engines.build import build
from lehr.engines.target import target
from lehr.export.golden import SEED, record
from lehr.export.package import Options, export
from lehr.export.source import resolve
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.golden import Golden, Tier, read
from lehr.runtime.golden import write as write_golden
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.recipe import recipe

WANTED = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How an engine is built; ``again`` counts rebuilds."""

    library: str
    threads: int
    recipe: str = "fp32"
    again: int = 0


# Model -> engines, sizes of batches (0: as recorded), seeds of golden data.
PLAN: Mapping[str, tuple[tuple[Engine, ...], tuple[int, ...], int]] = {
    "digits-dit": (
        (
            Engine(library="onnxruntime", threads=1),
            Engine(library="onnxruntime", threads=2),
            Engine(library="onnxruntime", threads=3, again=1),
            Engine(library="openvino", threads=1),
            Engine(library="openvino", threads=2, again=1),
            Engine(library="openvino", threads=1, recipe="bf16"),
        ),
        (0, 1, 3),
        11,
    ),
    "digits-adm": (
        (Engine(library="onnxruntime", threads=1), Engine(library="openvino", threads=2)),
        (0,),
        1,
    ),
}


class InBatches(Denoiser):
    """A denoiser that evaluates at most ``size`` samples at once."""

    def __init__(self, inner: Denoiser, size: int) -> None:
        super().__init__(inner.spec, lambda feeds: feeds)
        self._inner, self._size = inner, size
        self._batched = {tensor.name for tensor in inner.spec.conditions if tensor.batched}

    def prepare(self, timesteps: Any, sample_sizes: Any, conditions: Any) -> None:
        self._inner.prepare(timesteps, sample_sizes, conditions)

    def with_variance(
        self, sample: npt.NDArray[Any], timestep: float, conditions: Mapping[str, npt.NDArray[Any]]
    ) -> npt.NDArray[Any]:
        parts = []
        for first in range(0, len(sample), self._size):
            rows = slice(first, first + self._size)
            own = {n: v[rows] if n in self._batched else v for n, v in conditions.items()}
            parts.append(self._inner.with_variance(sample[rows], timestep, own))
        return np.concatenate(parts)


def without_draws(asked: Policy) -> Policy:
    """The same policy without L3."""

    def bare(limits: Limits) -> Limits:
        return replace(limits, L3=replace(limits.L3, samples=0.0))

    return replace(
        asked,
        limits=bare(asked.limits),
        recipes={name: bare(limits) for name, limits in asked.recipes.items()},
        required_with_features=(),
    )


def goldens(model: str, count: int) -> list[Golden]:
    """Eager's data on as many seeds."""
    found = resolve(model, preset=None, seed=0, structure_only=False)
    module = found.runnable().float()
    return [
        record(module, found.spec, Tier.FULL, seed=SEED + 1000 * k, progress=lambda text: None) for k in range(1, count)
    ]


def variations(scratch: Path) -> Iterator[dict[str, Any]]:
    """Judge them one after the other."""
    release = policy("release", dt.date(2030, 1, 1))
    load = load_denoiser
    for model, (plan, batches, seeds) in PLAN.items():
        root = scratch / f"{model}.lehr"
        export(model, root, Options(), progress=lambda text: None)
        recorded = [read(Bundle.open(root)), *goldens(model, seeds)]
        for made in plan:
            build(root, target("cpu"), recipe(made.recipe), library=made.library, threads=made.threads)
            for k, golden in enumerate(recorded):
                bundle = Bundle.open(root)
                with bundle.edit() as edit:
                    write_golden(edit, golden)
                for size in batches:
                    asked = release if not k and not size and model == "digits-dit" else without_draws(release)
                    wrapped = load if not size else lambda *given, size=size: InBatches(load(*given), size)
                    with patch.object(gates, "load_denoiser", wrapped):
                        report = gates.gate(bundle, engines.find(bundle, "cpu", made.recipe), asked)
                    yield {
                        "model": model,
                        "library": made.library,
                        "threads": made.threads,
                        "recipe": made.recipe,
                        "rebuilt": made.again,
                        "seed": SEED + 1000 * k,
                        "batch": size or len(golden.steps.inputs[0]),
                        "levels": sorted({c.level for c in report.checks if c.outcome is Outcome.PASSED}),
                        "passed": report.passed,
                        "failed": {c.name: c.reason for c in report.checks if c.outcome is Outcome.FAILED},
                    }


def keep(rows: list[dict[str, Any]], seconds: float) -> None:
    """Write what was found so far."""
    alarms = [row for row in rows if not row["passed"]]
    result = {
        "policy": "release",
        "variations": len(rows),
        "alarms": len(alarms),
        "rate_at_most": round(3 / len(rows), 4) if not alarms else None,
        "confidence": 0.95,
        "seconds": round(seconds),
        "rows": rows,
    }
    write("false_alarms", result)


def main() -> None:
    """Judge all of them and write what was found."""
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        for row in variations(Path(scratch)):
            rows.append(row)
            if len(rows) % 20 == 0 or not row["passed"]:
                print(f"{time.monotonic() - began:6.0f} s, {len(rows)}: {row}", file=sys.stderr, flush=True)
                keep(rows, time.monotonic() - began)
    keep(rows, time.monotonic() - began)
    if len(rows) < WANTED:
        sys.exit(f"{len(rows)} variations, expected {WANTED}")


if __name__ == "__main__":
    main()
