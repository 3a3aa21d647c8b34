"""Schedules: which timesteps a loop of N steps visits. The implied last point is x_0 itself (sigma 0).

A schedule is a small frozen object with one method, ``timesteps(path, N)``; :class:`Spacing` names those that need
no argument. Most are written in noise levels, the "sigmas" of the literature: r = sigma / alpha on diffusion paths
(Karras et al. 2022, arXiv:2206.00364) and u = sigma / (alpha + sigma), from 1 at pure noise to 0, on flows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lehr.runtime.beta_quantile import beta_quantile
from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import VP, Interpolant, LinearFlow, Path

Array = npt.NDArray[np.float64]
MAX_STEPS = 1000
_TOLERANCE = 0.01  # published lists round their first and last sigma; they are moved onto the path


class Schedule(Protocol):
    """How N steps are laid over a path."""

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        """(N,) timesteps as the network sees them, noisiest first; InvalidInput where the schedule does not fit."""


class Spacing(str, Enum):
    """Schedules by name."""

    AUTO = "auto"  # trailing on discrete timesteps, linear on flows, karras elsewhere
    TRAILING = "trailing"
    LEADING = "leading"
    LINSPACE = "linspace"
    SIMPLE = "simple"
    DISTILLED = "distilled"
    LINEAR = "linear"
    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    BETA = "beta"


def timesteps(path: Path, num_inference_steps: int, spacing: Spacing | Schedule = Spacing.AUTO) -> Array:
    """(N,) timesteps as the network sees them, noisiest first.

    Raises:
        InvalidInput: fewer than one step, more than the path holds, a schedule that does not fit the path, or
            noise levels that do not decrease.
    """
    n = num_inference_steps
    if not 1 <= n <= MAX_STEPS:
        raise InvalidInput(f"the number of steps must be 1 to {MAX_STEPS}, got {n}.")
    if spacing is Spacing.AUTO:
        spacing = automatic(path)
    schedule = _NAMED[spacing] if isinstance(spacing, Spacing) else spacing
    visited = np.asarray(schedule.timesteps(path, n), dtype=np.float64)
    if visited.shape != (n,):
        raise InvalidInput(f"the schedule holds {visited.size} noise levels, expected {n}: one a step, noisiest first.")
    levels = noise_levels(path, visited)
    if not (np.all(np.diff(levels) < 0) and np.all(levels > 0)):
        raise InvalidInput(
            f"noise levels must be positive and strictly decreasing, got {_shown(levels)}; "
            "the last step, to zero, is implied."
        )
    return visited


def automatic(path: Path) -> Spacing:
    """What ``auto`` means on a path."""
    if isinstance(path, VP):
        return Spacing.TRAILING
    return Spacing.LINEAR if is_flow(path) else Spacing.KARRAS


# ------------------------------------------------------------------------------------------------ noise levels


def is_flow(path: Path) -> bool:
    """Whether noise levels are u = sigma / (alpha + sigma) rather than r = sigma / alpha."""
    return isinstance(path, (LinearFlow, Interpolant))


def noise_levels(path: Path, visited: npt.ArrayLike) -> Array:
    """The noise level at each timestep."""
    alpha, sigma = path.alpha_sigma(visited)
    with np.errstate(divide="ignore"):
        return np.asarray(sigma / (alpha + sigma) if is_flow(path) else sigma / alpha)


def level_range(path: Path) -> tuple[float, float]:
    """The smallest and the largest noise level of a path."""
    low, high = noise_levels(path, [path.last_timestep, path.first_timestep])
    return float(low), float(high)


def _at_levels(path: Path, levels: npt.ArrayLike) -> Array:
    """The timesteps at noise levels; InvalidInput for a level outside the path."""
    levels = np.asarray(levels, dtype=np.float64)
    high = level_range(path)[1]
    if levels.size and (not np.all(np.isfinite(levels)) or levels.min() <= 0 or levels.max() > high * (1 + _TOLERANCE)):
        raise InvalidInput(f"noise levels must lie in (0, {high:.6g}] on this path, got {_shown(levels)}.")
    inside = np.minimum(levels, high)
    with np.errstate(divide="ignore"):
        visited = path.timestep_of(inside / (1 - inside) if is_flow(path) else inside)
    if np.any(np.abs(noise_levels(path, visited) - inside) > _TOLERANCE * inside):
        raise InvalidInput(
            f"the path's noise levels end at {level_range(path)[0]:.6g}, got {_shown(levels)}; leave out what is below."
        )
    return visited


def _shown(levels: Array) -> str:
    text = ", ".join(f"{level:.5g}" for level in levels[:8])
    return f"[{text}{', …' if len(levels) > 8 else ''}]"


# -------------------------------------------------------------------------------------------- discrete timesteps


@dataclass(frozen=True, slots=True, kw_only=True)
class Trailing:
    """T - 1, T - 1 - T/N, …: the noisiest timestep is always visited (Lin et al. 2024, arXiv:2305.08891, table 2)."""

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        total = _discrete(path, num_inference_steps)
        return np.asarray(np.round(np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]) - 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading:
    """…, 2 T/N, T/N, 0 (DDIM's original), all moved up by ``steps_offset`` (1 for Stable Diffusion)."""

    steps_offset: int = 0

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        total = _discrete(path, num_inference_steps)
        visited = np.arange(num_inference_steps, dtype=np.float64)[::-1] * (total // num_inference_steps)
        visited += self.steps_offset
        if visited[-1] < 0 or visited[0] > total - 1:
            raise InvalidInput(f"steps_offset {self.steps_offset} leads outside 0 … {total - 1}; use 0 or 1.")
        return visited


@dataclass(frozen=True, slots=True, kw_only=True)
class Linspace:
    """T - 1 … 0, both ends, rounded to trained timesteps."""

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        total = _discrete(path, num_inference_steps)
        return np.round(np.linspace(total - 1, 0, num_inference_steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """N of the timesteps a consistency distillation was trained on (Luo et al. 2023, arXiv:2310.04378, section 4.3).

    The teacher took ``original_inference_steps`` steps, which end at T - 1; every (M/N)-th of them is used.
    """

    original_inference_steps: int = 50

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        total, trained = _discrete(path, num_inference_steps), self.original_inference_steps
        if not num_inference_steps <= trained <= total:
            raise InvalidInput(
                f"the distilled schedule has {trained} of {total} timesteps, too few for {num_inference_steps} steps."
            )
        grid = (np.arange(trained, 0, -1) * (total // trained) - 1).astype(np.float64)
        return grid[np.floor(np.linspace(0, trained, num_inference_steps, endpoint=False)).astype(np.int64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simple:
    """Every (T/N)-th training timestep from the noisiest on, rounded towards noise (ComfyUI's "simple")."""

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        skipped = np.arange(num_inference_steps)
        if isinstance(path, LinearFlow):
            total = path.num_train_timesteps
            if num_inference_steps <= total:
                return np.asarray(total - skipped * total // num_inference_steps, dtype=np.float64)
        total = _discrete(path, num_inference_steps)
        return np.asarray(total - 1 - skipped * total // num_inference_steps, dtype=np.float64)


def _discrete(path: Path, num_inference_steps: int) -> int:
    if not isinstance(path, VP):
        raise InvalidInput(
            f"this spacing counts discrete training timesteps, which a {type(path).__name__} path has not; "
            f"use '{automatic(path).value}'."
        )
    if num_inference_steps > path.num_train_timesteps:
        total = path.num_train_timesteps
        raise InvalidInput(f"{num_inference_steps} steps over {total} training timesteps: ask for at most {total}.")
    return path.num_train_timesteps


# --------------------------------------------------------------------------------------------------------- flows


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """1, 1 - 1/N, …, 1/N of a flow's time, shifted towards noise: s -> k s / (k s + 1 - s).

    Attributes:
        shift: k (Esser et al. 2024, arXiv:2403.03206, equation 23); 1 shifts nothing, 3 is SD3's.
        end: the last time before the shift, 1/N by default.
    """

    shift: float = 1.0
    end: float | None = None

    def __post_init__(self) -> None:
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise InvalidInput(f"shift must be positive, got {self.shift}")
        if self.end is not None and not 0 < self.end < 1:
            raise InvalidInput(f"end must lie in (0, 1), got {self.end}")

    @classmethod
    def dynamic(
        cls,
        sequence_length: int,
        *,
        base_length: int = 256,
        max_length: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> Flow:
        """FLUX's resolution shift: k = e^mu, mu linear in the number of tokens of the picture."""
        if not (sequence_length > 0 and base_length < max_length):
            raise InvalidInput(
                "need sequence_length > 0 and base_length < max_length, "
                f"got {sequence_length}, {base_length} and {max_length}"
            )
        slope = (max_shift - base_shift) / (max_length - base_length)
        return cls(shift=math.exp(base_shift + slope * (sequence_length - base_length)))

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        end = 1 / num_inference_steps if self.end is None else self.end
        time = np.linspace(1, end, num_inference_steps)
        time = self.shift * time / (self.shift * time + (1 - time))  # 1 stays exactly 1
        if isinstance(path, LinearFlow):
            return np.asarray(path.num_train_timesteps * time)
        if isinstance(path, Interpolant):
            return np.asarray(1 - time)
        raise InvalidInput(
            f"'linear' is a flow's spacing and does not fit a {type(path).__name__} path; "
            f"use '{automatic(path).value}'."
        )


# ----------------------------------------------------------------------------------------- formulas in noise level


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """``sigma_min`` and ``sigma_max`` narrow the path's own range of noise levels."""

    sigma_min: float | None = None
    sigma_max: float | None = None

    def ends(self, path: Path) -> tuple[float, float]:
        low, high = level_range(path)
        low, high = (self.sigma_min or low), (self.sigma_max or high)
        if not math.isfinite(high):
            raise InvalidInput("this path starts at an infinite noise level; use 'trailing', or give sigma_max.")
        if not 0 < low < high:
            raise InvalidInput(f"need 0 < sigma_min < sigma_max, got {low} and {high}")
        return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Karras(_Range):
    """sigma^(1/rho) linear (Karras et al. 2022, arXiv:2206.00364, equation 5)."""

    rho: float = 7.0

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        low, high = self.ends(path)
        ramp, inverse = np.linspace(0, 1, num_inference_steps), 1 / self.rho
        return _at_levels(path, (high**inverse + ramp * (low**inverse - high**inverse)) ** self.rho)


@dataclass(frozen=True, slots=True, kw_only=True)
class Polyexponential(_Range):
    """log sigma polynomial in the step, of degree ``rho``; 1 is the exponential schedule, equal steps in log-SNR."""

    rho: float = 1.0

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        low, high = self.ends(path)
        ramp = np.linspace(1, 0, num_inference_steps) ** self.rho
        return _at_levels(path, high**ramp * low ** (1 - ramp))


@dataclass(frozen=True, slots=True, kw_only=True)
class Beta(_Range):
    """sigma at the quantiles of a Beta distribution: dense at both ends (Lee et al. 2024, arXiv:2407.12173)."""

    alpha: float = 0.6
    beta: float = 0.6

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        low, high = self.ends(path)
        share = beta_quantile(1 - np.linspace(0, 1, num_inference_steps), self.alpha, self.beta)
        return _at_levels(path, low + share * (high - low))


# --------------------------------------------------------------------------------------------------------- lists


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignYourSteps:
    """A published list of noise levels, carried over to N steps (Sabour et al. 2024, arXiv:2404.14507, section 4).

    The list has one entry more than its steps; log sigma is interpolated linearly to N + 1 entries, of which the
    last becomes 0.
    """

    sigmas: Sequence[float] = field(kw_only=False)

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        listed = np.asarray(self.sigmas, dtype=np.float64)
        if listed.ndim != 1 or len(listed) < 2 or listed.min() <= 0 or np.any(np.diff(listed) >= 0):
            raise InvalidInput("align-your-steps needs at least two positive, strictly decreasing sigmas.")
        position = np.linspace(0, len(listed) - 1, num_inference_steps + 1)
        return _at_levels(path, np.exp(np.interp(position, np.arange(len(listed)), np.log(listed)))[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sigmas:
    """Noise levels of your own, one a step; a final 0 may be written or left out."""

    sigmas: Sequence[float] = field(kw_only=False)

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        listed = np.atleast_1d(np.asarray(self.sigmas, dtype=np.float64))
        if len(listed) == num_inference_steps + 1 and listed[-1] == 0:
            listed = listed[:-1]
        return _at_levels(path, listed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timesteps:
    """Timesteps of your own, one a step, noisiest first."""

    values: Sequence[float] = field(kw_only=False)

    def timesteps(self, path: Path, num_inference_steps: int) -> Array:
        visited = np.atleast_1d(np.asarray(self.values, dtype=np.float64))
        alpha, sigma = path.alpha_sigma(visited)
        with np.errstate(divide="ignore", invalid="ignore"):
            back = path.timestep_of(sigma / alpha)
        scale = max(abs(path.first_timestep), abs(path.last_timestep))
        if not np.all(np.abs(back - visited) <= 1e-6 * scale):
            raise InvalidInput(
                f"timesteps must lie between {path.first_timestep:g} and {path.last_timestep:g} on this path, "
                f"got {_shown(visited)}."
            )
        return visited


_NAMED: dict[Spacing, Schedule] = {
    Spacing.TRAILING: Trailing(),
    Spacing.LEADING: Leading(),
    Spacing.LINSPACE: Linspace(),
    Spacing.SIMPLE: Simple(),
    Spacing.DISTILLED: Distilled(),
    Spacing.LINEAR: Flow(),
    Spacing.KARRAS: Karras(),
    Spacing.EXPONENTIAL: Polyexponential(),
    Spacing.BETA: Beta(),
}
