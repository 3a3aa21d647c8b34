"""What a sampler's file declares about itself, and the options of its method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import EDM, VE, VP, Interpolant, LinearFlow, Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.schedules import Spacing
from lehr.runtime.solver_table import SolverTable

Array = npt.NDArray[np.float64]

DIFFUSIONS: tuple[type, ...] = (VP, EDM, VE)  # start at a finite noise-to-signal ratio
FLOWS: tuple[type, ...] = (LinearFlow, Interpolant)  # start at pure noise
EVERY_PATH = DIFFUSIONS + FLOWS


# ------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be chosen about a method beside path and schedule; this base has nothing to choose."""


class Final(str, Enum):
    """Where a loop ends."""

    ZERO = "zero"  # at x_0 itself
    SIGMA_MIN = "sigma_min"  # at the path's last timestep, with its remainder of noise


class SolverType(str, Enum):
    """How a second-order exponential integrator weighs the slope of D (Lu et al. 2022, arXiv:2211.01095)."""

    MIDPOINT = "midpoint"  # half the weight of D
    HEUN = "heun"  # the exact integral


class LowerOrderFinal(str, Enum):
    """When a multistep method lowers its order over the last steps."""

    FEW_STEPS = "few_steps"  # below 15 steps, as DPM-Solver does
    ALWAYS = "always"
    NEVER = "never"

    def lowers(self, num_inference_steps: int) -> bool:
        return self is LowerOrderFinal.ALWAYS or (self is LowerOrderFinal.FEW_STEPS and num_inference_steps < 15)


def check_share(name: str, value: float) -> None:
    """Raise InvalidInput unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise InvalidInput(f"{name} must lie in [0, 1], got {value}.")


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise InvalidInput unless ``value`` is finite and positive, or 0 where that is allowed."""
    if not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
        raise InvalidInput(f"{name} must be {'0 or more' if zero else 'positive'} and finite, got {value}.")


def check_order(name: str, value: int, largest: int) -> None:
    """Raise InvalidInput unless ``value`` is 1 … largest."""
    if not 1 <= value <= largest:
        raise InvalidInput(f"{name} must be 1 to {largest}, got {value}.")


def recorded(options: Options, num_inference_steps: int) -> dict[str, Any]:
    """The options as plain data, for a table's ``options``."""
    values = {item.name: getattr(options, item.name) for item in fields(options)}
    return {
        "num_inference_steps": num_inference_steps,
        **{name: value.value if isinstance(value, Enum) else value for name, value in values.items()},
    }


# ------------------------------------------------------------------------------------------------------- sampler

OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, kw_only=True)
class Sampler(Generic[OptionsT]):
    """A method.

    Attributes:
        order: of convergence, in the number of steps; for stochastic methods of their deterministic part.
        build: writes the table, ``build(path, prediction, timesteps, options)``.
        options: the defaults; ``build`` takes this type and no other.
        stochastic: whether it can inject noise.
        evaluations: of the network, a step; the first and the last step may take fewer.
        paths: what the method is defined on.
        spacing: what ``auto`` means on discrete timesteps.
    """

    name: str
    summary: str
    reference: str
    order: int
    build: Callable[[Path, Prediction, Array, OptionsT], SolverTable]
    options: OptionsT
    stochastic: bool = False
    evaluations: int = 1
    paths: tuple[type, ...] = EVERY_PATH
    spacing: Spacing = Spacing.TRAILING

    @property
    def takes_eta(self) -> bool:
        """Whether its share of noise is an option called ``eta``, 0 being deterministic."""
        return any(item.name == "eta" for item in fields(self.options))
