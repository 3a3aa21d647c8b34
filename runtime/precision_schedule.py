"""Which steps of a loop another recipe computes: the first few, or the last few.

A step is a timestep of the loop: a sampler that evaluates the network twice at one timestep asks the same engine both
times. What counts is the place among the timesteps of the loop at hand, which whoever runs one says beforehand
(:meth:`lehr.runtime.denoiser.Denoiser.loop`). An evaluation outside of any loop, or at a timestep that the loop never
announced, has the place of the nearest timestep in the model's own loop: the default sampler and number of steps, kept
here. So every evaluation has one answer, whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lehr.runtime.errors import InvalidInput

FIRST, LAST = "first", "last"
_STEP = "step"  # the graph that runs at every step, and the plan of it that computes what no end does


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """How many steps at each end of a loop stand apart.

    Attributes:
        first, last: numbers of steps; 0 for none. Where a loop is too short for both, the last ones win.
        timesteps: of the model's own loop, in order, each once.
    """

    first: int = 0
    last: int = 0
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 0 or self.first + self.last == 0:
            raise InvalidInput(
                "a precision schedule needs 1 step or more at an end of the loop, got "
                f"{self.first} first and {self.last} last ones."
            )
        if not np.all(np.isfinite(self.timesteps)) or len(set(self.timesteps)) != len(self.timesteps):
            raise InvalidInput(
                "the timesteps of a precision schedule must be finite and differ from each other; calibrate again."
            )
        if self.first + self.last >= len(self.timesteps):
            raise InvalidInput(
                f"the model's own loop has {len(self.timesteps)} steps, and {self.first} first and {self.last} last "
                "ones leave nothing for the recipe itself. Take fewer."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the ends that there are."""
        return tuple(name for name, steps in ((FIRST, self.first), (LAST, self.last)) if steps)

    def end_of(self, timestep: float, loop: tuple[float, ...] = ()) -> str | None:
        """The end that an evaluation belongs to; None for what lies between them.

        Args:
            timestep: of the evaluation.
            loop: timesteps of the loop at hand, in order, each once (:func:`steps_of`); empty outside of a loop.
        """
        if timestep in loop:
            place, steps = loop.index(timestep), len(loop)
        else:
            place, steps = int(np.argmin(np.abs(np.subtract(self.timesteps, timestep)))), len(self.timesteps)
        if place >= steps - self.last:
            return LAST
        return FIRST if place < self.first else None

    def share(self, steps: int) -> dict[str, float]:
        """What part of a loop of so many steps each end is."""
        last = min(self.last, steps)
        return {FIRST: min(self.first, steps - last) / steps, LAST: last / steps}

    def to_json(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last, "timesteps": list(self.timesteps)}

    @classmethod
    def from_json(cls, data: Any) -> Ends:
        """Read what :meth:`to_json` wrote; raises KeyError, TypeError, ValueError or InvalidInput for anything else."""
        if set(data) != {"first", "last", "timesteps"} or not all(type(data[k]) is int for k in ("first", "last")):
            raise ValueError("the ends of a precision schedule are two numbers of steps and the timesteps of a loop")
        return cls(first=data["first"], last=data["last"], timesteps=tuple(float(t) for t in data["timesteps"]))


def plan_of(end: str | None) -> str:
    """Name of the plan that computes an end of a loop, or with None what lies between the ends."""
    return _STEP if end is None else f"{_STEP}.{end}"


def graph_of(plan: str) -> str:
    """Name of the graph that a plan was compiled from."""
    return _STEP if plan in (_STEP, plan_of(FIRST), plan_of(LAST)) else plan


def steps_of(timesteps: Iterable[float]) -> tuple[float, ...]:
    """Timesteps of a loop in order, each once."""
    return tuple(dict.fromkeys(float(t) for t in timesteps))
