"""Paths: the pair (alpha_t, sigma_t) with x_t = alpha_t x_0 + sigma_t eps, and how timesteps number them.

``timestep`` is always the number the network is fed. A path maps it to (alpha, sigma), and the noise-to-signal
ratio sigma / alpha back to a timestep; solvers work on the ratio and need no other property of a path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[np.float64]
Value = TypeVar("Value", float, "npt.NDArray[np.floating[Any]]")


class Path(Protocol):
    """A diffusion or flow path. Arrays are float64, one entry a timestep."""

    @property
    def first_timestep(self) -> float:
        """The noisiest timestep, where sampling starts."""

    @property
    def last_timestep(self) -> float:
        """The least noisy timestep a schedule visits; after it comes x_0 itself."""

    def alpha_sigma(self, timesteps: npt.ArrayLike) -> tuple[Array, Array]:
        """(alpha, sigma), each of the shape of ``timesteps``."""

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        """The timestep at which sigma / alpha equals ``ratio``; inverse of :meth:`alpha_sigma`."""

    def init_noise_sigma(self, timestep: float) -> float:
        """The standard deviation of the starting sample at ``timestep``."""

    def to_json(self) -> dict[str, Any]: ...


class BetaSchedule(str, Enum):
    """How beta grows over the training timesteps (diffusers' names)."""

    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"  # linear in sqrt(beta); Stable Diffusion
    COSINE = "squaredcos_cap_v2"  # Nichol & Dhariwal 2021, equation 17


@dataclass(frozen=True, kw_only=True)
class VP:
    """Variance preserving with discrete training timesteps (DDPM, Ho et al. 2020): alpha² = alpha_bar.

    ``zero_terminal_snr`` shifts and stretches alpha so that the last timestep is pure noise, alpha = 0
    (Lin et al. 2024, arXiv:2305.08891, algorithm 1); epsilon predictions say nothing about x_0 there.
    """

    schedule: BetaSchedule = BetaSchedule.LINEAR
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_train_timesteps <= 1_000_000:
            raise InvalidInput(f"num_train_timesteps must be 1 … 1e6, got {self.num_train_timesteps}")
        if self.zero_terminal_snr and self.num_train_timesteps < 3:
            raise InvalidInput(f"zero_terminal_snr needs at least 3 training timesteps, got {self.num_train_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InvalidInput(f"need 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}")

    @cached_property
    def alphas_cumprod(self) -> Array:
        """alpha_bar, (num_train_timesteps,)."""
        steps = self.num_train_timesteps
        if self.schedule is BetaSchedule.LINEAR:
            betas = np.linspace(self.beta_start, self.beta_end, steps)
        elif self.schedule is BetaSchedule.SCALED_LINEAR:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        else:
            edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        cumulative: Array = np.cumprod(1 - betas, dtype=np.float64)
        if self.zero_terminal_snr:
            root = np.sqrt(cumulative)
            cumulative = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return cumulative

    @cached_property
    def _log_ratios(self) -> Array:
        bar = self.alphas_cumprod[:-1] if self.zero_terminal_snr else self.alphas_cumprod
        ratios: Array = 0.5 * np.log((1 - bar) / bar)
        return ratios

    @property
    def first_timestep(self) -> float:
        return float(self.num_train_timesteps - 1)

    @property
    def last_timestep(self) -> float:
        return 0.0

    def alpha_sigma(self, timesteps: npt.ArrayLike) -> tuple[Array, Array]:
        """Exact at integer timesteps; between them log(sigma/alpha) is interpolated linearly.

        The logarithm is infinite at a zero terminal SNR; before it alpha/sigma is linear.
        """
        t = np.asarray(timesteps, dtype=np.float64)
        inverse = np.exp(-np.interp(t, np.arange(len(self._log_ratios)), self._log_ratios))  # alpha / sigma
        if self.zero_terminal_snr:
            inverse = inverse * np.clip(self.first_timestep - t, 0, 1)
        sigma = 1 / np.sqrt(1 + inverse**2)
        return inverse * sigma, sigma

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        r = np.asarray(ratio, dtype=np.float64)
        t = np.interp(np.log(r), self._log_ratios, np.arange(len(self._log_ratios)))
        if self.zero_terminal_snr:
            finite = math.exp(self._log_ratios[-1])
            t = np.where(r > finite, self.first_timestep - finite / r, t)
        return np.asarray(t)

    def init_noise_sigma(self, timestep: float) -> float:
        """1 wherever the loop starts: the path keeps unit variance for data of unit variance."""
        return 1.0

    def to_json(self) -> dict[str, Any]:
        return {"kind": "vp", **asdict(self), "schedule": self.schedule.value}


@dataclass(frozen=True, kw_only=True)
class LinearFlow:
    """Rectified flow (Liu et al. 2022; SD3, FLUX): alpha = 1 - s, sigma = s, timestep = num_train_timesteps * s."""

    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise InvalidInput(f"num_train_timesteps must be positive, got {self.num_train_timesteps}")

    @property
    def first_timestep(self) -> float:
        return float(self.num_train_timesteps)

    @property
    def last_timestep(self) -> float:
        return min(1.0, self.num_train_timesteps / 1000)  # a flow that is told s itself ends at the same noise

    def alpha_sigma(self, timesteps: npt.ArrayLike) -> tuple[Array, Array]:
        sigma = np.asarray(timesteps, dtype=np.float64) / self.num_train_timesteps
        return 1 - sigma, sigma

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        ratio = np.asarray(ratio, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            sigma = np.where(np.isinf(ratio), 1.0, ratio / (1 + ratio))
        return np.asarray(sigma * self.num_train_timesteps)

    def init_noise_sigma(self, timestep: float) -> float:
        return timestep / self.num_train_timesteps

    def to_json(self) -> dict[str, Any]:
        return {"kind": "linear_flow", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Variance exploding as Karras et al. 2022 use it: alpha = 1, timestep = c_noise = ln(sigma) / 4."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise InvalidInput(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def first_timestep(self) -> float:
        return math.log(self.sigma_max) / 4

    @property
    def last_timestep(self) -> float:
        return math.log(self.sigma_min) / 4

    def alpha_sigma(self, timesteps: npt.ArrayLike) -> tuple[Array, Array]:
        sigma = np.exp(4 * np.asarray(timesteps, dtype=np.float64))
        return np.ones_like(sigma), sigma

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        logs: Array = np.log(np.asarray(ratio, dtype=np.float64)) / 4
        return logs

    def init_noise_sigma(self, timestep: float) -> float:
        return math.exp(4 * timestep)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "edm", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class VE:
    """Variance exploding as score-SDE uses it (Song et al. 2021, arXiv:2011.13456): alpha = 1, timestep = sigma.

    The paper's time s in [0, 1] gives the geometric sigma_min (sigma_max / sigma_min)^s; its network is fed sigma.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise InvalidInput(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def first_timestep(self) -> float:
        return self.sigma_max

    @property
    def last_timestep(self) -> float:
        return self.sigma_min

    def alpha_sigma(self, timesteps: npt.ArrayLike) -> tuple[Array, Array]:
        sigma = np.array(timesteps, dtype=np.float64)
        return np.ones_like(sigma), sigma

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        return np.array(ratio, dtype=np.float64)

    def init_noise_sigma(self, timestep: float) -> float:
        return timestep

    def to_json(self) -> dict[str, Any]:
        return {"kind": "ve", **asdict(self)}


class Curve(str, Enum):
    """The interpolants of SiT (Ma et al. 2024, arXiv:2401.08740, section 2.4)."""

    LINEAR = "linear"  # alpha = t, sigma = 1 - t
    GVP = "gvp"  # alpha = sin(pi t / 2), sigma = cos(pi t / 2)
    VP = "vp"  # alpha = exp(-(1-t)² (beta_max - beta_min) / 4 - (1-t) beta_min / 2), alpha² + sigma² = 1


@dataclass(frozen=True, kw_only=True)
class Interpolant:
    """A stochastic interpolant as SiT numbers it: timestep = t in [0, 1], noise at t = 0 and data at t = 1.

    The network's output is the velocity d x_t / dt, so the path knows its own derivative in t, written below as
    alpha' and sigma'. ``beta_min`` and ``beta_max`` shape the ``vp`` curve alone.
    """

    curve: Curve = Curve.LINEAR
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise InvalidInput(f"need 0 < beta_min < beta_max, got {self.beta_min} and {self.beta_max}")

    @property
    def first_timestep(self) -> float:
        return 0.0

    @property
    def last_timestep(self) -> float:
        return 0.999  # SiT's sample_eps

    def alpha_sigma(self, timesteps: npt.ArrayLike) -> tuple[Array, Array]:
        t = np.array(timesteps, dtype=np.float64)
        if self.curve is Curve.LINEAR:
            return t, 1 - t
        if self.curve is Curve.GVP:
            return np.sin(0.5 * math.pi * t), np.sin(0.5 * math.pi * (1 - t))
        log_alpha = -(1 - t) * ((1 - t) * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        r = np.array(ratio, dtype=np.float64)
        if self.curve is Curve.LINEAR:
            return np.asarray(1 / (1 + r))
        if self.curve is Curve.GVP:
            return np.asarray(np.arctan2(1, r) * 2 / math.pi)
        spread = self.beta_max - self.beta_min
        decay = np.minimum(0.5 * np.log1p(r**2), spread / 4 + self.beta_min / 2)  # -log alpha, at most that of t = 0
        return np.asarray(1 - 2 * decay / (self.beta_min / 2 + np.sqrt(self.beta_min**2 / 4 + spread * decay)))

    def init_noise_sigma(self, timestep: float) -> float:
        """sigma for the straight curve; the others keep unit variance for data of unit variance."""
        return 1 - timestep if self.curve is Curve.LINEAR else 1.0

    def denoised_from_velocity(self, alpha: Value, sigma: Value) -> tuple[Value, Value]:
        """(on_sample, on_velocity) of D = on_sample * x_t + on_velocity * (alpha' x_0 + sigma' eps).

        Eliminating eps gives D = (sigma v - sigma' x_t) / (alpha' sigma - alpha sigma'). On the straight curve
        alpha' = -sigma' = 1; on the others alpha² + sigma² = 1, hence sigma' = -alpha alpha' / sigma and
        D = alpha x_t + (sigma² / alpha') v, with alpha' as below. All forms hold at both ends.
        """
        if self.curve is Curve.LINEAR:
            return 1.0 / (alpha + sigma), sigma / (alpha + sigma)
        if self.curve is Curve.GVP:
            return alpha, sigma * (2 / math.pi)  # alpha' = pi/2 sigma
        spread = self.beta_max - self.beta_min
        rate = (self.beta_min**2 / 4 - spread * np.log(alpha)) ** 0.5  # alpha' / alpha
        return alpha, sigma**2 / (alpha * rate)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "interpolant", **asdict(self), "curve": self.curve.value}


def path_from_json(data: Mapping[str, Any]) -> Path:
    """Rebuild a path from :meth:`Path.to_json`; raises InvalidInput for a kind that does not exist."""
    fields = {key: value for key, value in data.items() if key != "kind"}
    if data.get("kind") == "vp":
        return VP(**{**fields, "schedule": BetaSchedule(fields["schedule"])})
    if data.get("kind") == "linear_flow":
        return LinearFlow(**fields)
    if data.get("kind") == "edm":
        return EDM(**fields)
    if data.get("kind") == "ve":
        return VE(**fields)
    if data.get("kind") == "interpolant":
        return Interpolant(**{**fields, "curve": Curve(fields["curve"])})
    raise InvalidInput(f"unknown path {data.get('kind')!r}; known: edm, interpolant, linear_flow, ve, vp.")
