"""What the gate says: checks with an outcome and a reason, and the report that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

REPORT_SCHEMA = 1  # of a report's JSON; what reads it back refuses any other


class Outcome(str, Enum):
    """What became of a check; the value is the word that people read."""

    PASSED = "pass"
    FAILED = "FAIL"
    WAIVED = "waived"  # failed, and let through by the policy
    NOTED = "note"  # measured, and not judged
    NOT_RUN = "-"  # the reason says why


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the table.

    Attributes:
        name: level and what is looked at, such as "L2.guided.ssim".
        reason: what was found, and what was expected.
        value, limit: the two that were compared, where they are numbers.
    """

    name: str
    outcome: Outcome
    reason: str
    value: float | None = None
    limit: float | None = None

    @property
    def level(self) -> str:
        return self.name.partition(".")[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "level": self.level,
            "outcome": self.outcome.value,
            "reason": self.reason,
            "value": self.value,
            "limit": self.limit,
        }


def judged(name: str, good: bool, reason: str, *, value: float | None = None, limit: float | None = None) -> Check:
    """A check that passes if ``good`` and fails if not."""
    outcome = Outcome.PASSED if good else Outcome.FAILED
    return Check(name=name, outcome=outcome, reason=reason, value=value, limit=limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeries:
    """L1 by timestep: the score's relative error, and what was allowed."""

    timesteps: tuple[float, ...]
    rel_error: tuple[float, ...]
    limits: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSeries:
    """L2 of one recorded loop of N evaluations.

    Attributes:
        timesteps: (N,).
        drift: (N + 1,) relative error of the input of each evaluation and of the final sample.
        explained: (N + 1,) the drift that the step before and an error within L1's limits explain.
        diverges_at: the first entry of ``drift`` above ``explained``; None if there is none.
        eager, engine: (B, C, …) final samples.
    """

    timesteps: tuple[float, ...]
    drift: tuple[float, ...]
    explained: tuple[float, ...]
    diverges_at: int | None
    eager: Array = field(repr=False)
    engine: Array = field(repr=False)

    def divergence(self) -> dict[str, Any] | None:
        """Where and by how much the loop leaves what is explained; evaluation None is the starting sample."""
        if self.diverges_at is None:
            return None
        before = self.diverges_at - 1
        return {
            "evaluation": before if before >= 0 else None,
            "timestep": self.timesteps[before] if before >= 0 else None,
            "drift": self.drift[self.diverges_at],
            "explained": self.explained[self.diverges_at],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is to blame.

    Attributes:
        kind: "layer", "inputs", "guidance", "sampler", "noise" or "unknown".
        text: for people.
        graph, layer, tensor, timestep: where it is a layer.
        unseen: layers that are fused with that one.
    """

    kind: str
    text: str
    graph: str | None = None
    layer: str | None = None
    unseen: tuple[str, ...] = ()
    tensor: str | None = None
    timestep: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "text": self.text,
            "graph": self.graph,
            "layer": self.layer,
            "unseen": list(self.unseen),
            "tensor": self.tensor,
            "timestep": self.timestep,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionSeries:
    """What was drawn and measured.

    Attributes:
        network, sha256: whose features.
        samples: how many of each.
        noise: Fréchet distance of two independent sets of this size, from the reference's halves.
        reference, engine: the first samples of each.
    """

    network: str
    sha256: str
    samples: int
    noise: float
    reference: Array = field(repr=False)
    engine: Array = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"network": self.network, "sha256": self.sha256, "samples": self.samples, "noise": self.noise}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that the gate found out about one engine.

    Attributes:
        bundle: its folder's name.
        model, engine, target, recipe: what was judged.
        policy: name, and SHA-256 of its file.
        required: levels that the policy asks for.
        checks: in the order in which people read them.
        steps, loops: what was measured, for curves and pictures.
        value_range: of the model's samples.
        environment, hashes: where, and of what; by name.
        culprit: what is to blame for failures of L0 to L2.
        distribution: what L3 drew.
        pictures: PNG files of the bundle's calibration, by name.
        history: recorded parity of the baseline and of this bundle: column -> measure -> value.
    """

    bundle: str
    model: str
    engine: str
    target: str
    recipe: str
    baseline: str | None
    policy: str
    policy_sha256: str
    required: tuple[str, ...]
    checks: tuple[Check, ...]
    steps: StepSeries | None
    loops: Mapping[str, LoopSeries]
    value_range: tuple[float, float]
    environment: Mapping[str, str]
    hashes: Mapping[str, str]
    culprit: Found | None = None
    distribution: DistributionSeries | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    history: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Every required level was judged, and nothing failed that is not waived."""
        if any(check.outcome is Outcome.FAILED for check in self.checks):
            return False
        seen = {check.level for check in self.checks if check.outcome in (Outcome.PASSED, Outcome.WAIVED)}
        return set(self.required) <= seen

    @property
    def verdict(self) -> str:
        """One sentence's end."""
        return f"{'passes' if self.passed else 'does NOT pass'} policy {self.policy}"

    @property
    def divergence(self) -> dict[str, dict[str, Any] | None]:
        """By recorded loop."""
        return {name: loop.divergence() for name, loop in self.loops.items()}

    def count(self, outcome: Outcome) -> int:
        return sum(check.outcome is outcome for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        steps = self.steps
        series: dict[str, Any] = {"drift": {name: list(loop.drift) for name, loop in self.loops.items()}}
        series["explained"] = {name: list(loop.explained) for name, loop in self.loops.items()}
        if steps is not None:
            series |= {"timesteps": list(steps.timesteps), "rel_error": list(steps.rel_error)}
            series |= {"limits": list(steps.limits)}
        return {
            "schema": REPORT_SCHEMA,
            "passed": self.passed,
            "bundle": self.bundle,
            "model": self.model,
            "engine": self.engine,
            "target": self.target,
            "recipe": self.recipe,
            "baseline": self.baseline,
            "policy": {"name": self.policy, "sha256": self.policy_sha256, "required": list(self.required)},
            "checks": [check.to_json() for check in self.checks],
            "divergence": self.divergence,
            "culprit": None if self.culprit is None else self.culprit.to_json(),
            "distribution": None if self.distribution is None else self.distribution.to_json(),
            "series": series,
            "environment": dict(self.environment),
            "hashes": dict(self.hashes),
        }


def first_above(values: Array, limits: Array) -> int | None:
    """The first index whose value exceeds its limit; None if there is none."""
    above = np.flatnonzero(~(values <= limits))  # a NaN is above
    return int(above[0]) if above.size else None
