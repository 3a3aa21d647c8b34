"""What a scheduler does to basis vectors: its random draws, casts and clamps, caught on their way into PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from lehr.runtime.errors import UnsupportedScheduler
from lehr.runtime.table_ops import Clip, DenoisedOp, DynamicThreshold

Vector = npt.NDArray[np.float64]

_NORMALS = {torch.randn, torch.randn_like}
_OTHER_RANDOM = {
    torch.rand,
    torch.rand_like,
    torch.randint,
    torch.randint_like,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    torch.poisson,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.exponential_,
    torch.Tensor.bernoulli_,
}
_CASTS = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.type}
_CLAMPS = {torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip, torch.Tensor.clamp_, torch.Tensor.clip_}

Draw = Callable[[int], torch.Tensor]
Clamp = Callable[[torch.Tensor, Any, Any], torch.Tensor]


class Interceptor(TorchFunctionMode):
    """While active: noise comes from ``draw``, samples stay float64, and ``clamp`` replaces their clipping.

    Schedulers cast samples to float32 for the sake of half-precision pipelines; here that would only round.
    """

    def __init__(self, name: str, shape: tuple[int, ...], draw: Draw, clamp: Clamp | None = None) -> None:
        super().__init__()
        self.name, self.shape, self.num_draws = name, shape, 0
        self._draw, self._clamp = draw, clamp

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMALS:
            return self._noise(args, kwargs)
        if func in _OTHER_RANDOM:
            raise UnsupportedScheduler(
                f"{self.name} draws random numbers with {func.__name__}; a table holds injected unit normals only."
            )
        if func in _CASTS and self._is_state(args[0]) and _to_float32(func, args[1:], kwargs):
            return args[0]
        if func in _CLAMPS and self._clamp is not None and self._is_sample(args[0]):
            low, high = (*args[1:], None, None)[:2]
            return self._clamp(args[0], kwargs.get("min", low), kwargs.get("max", high))
        return func(*args, **kwargs)

    def _noise(self, args: Any, kwargs: Any) -> torch.Tensor:
        first = args[0] if args else kwargs["size"]
        shape = first.shape if isinstance(first, torch.Tensor) else args if isinstance(first, int) else first
        if tuple(shape) != self.shape:
            raise UnsupportedScheduler(
                f"{self.name} draws noise of shape {tuple(shape)} for a sample of shape {self.shape}; "
                "a table holds noises of the sample's shape only."
            )
        self.num_draws += 1
        return self._draw(self.num_draws - 1)

    def _is_sample(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and tuple(value.shape) == self.shape

    def _is_state(self, value: Any) -> bool:
        """A sample, or a network's output with more channels."""
        return (
            isinstance(value, torch.Tensor)
            and value.dtype == torch.float64
            and value.ndim == len(self.shape)
            and tuple(value.shape[2:]) == self.shape[2:]
        )


def _to_float32(func: Any, args: Any, kwargs: Any) -> bool:
    if func is torch.Tensor.float:
        return True
    targets = [value.dtype if isinstance(value, torch.Tensor) else value for value in (*args, *kwargs.values())]
    return torch.float32 in targets


# ------------------------------------------------------------------------------------------------------ clipping


@dataclass(slots=True)
class ClipRecorder:
    """Replaces each clipping of an x_0 estimate by a basis vector, and records what was clipped.

    Attributes:
        name: the scheduler, for messages.
        inputs: the rows of the table so far; the last one belongs to the running evaluation.
        output_at, clipped_at: where F_i and clip(D_i) stand in a vector.
        op: the operation, once one was met.
        denoised: evaluation -> (from_input, from_output) of the estimate that is clipped.
    """

    name: str
    inputs: list[Vector]
    output_at: Callable[[int], int]
    clipped_at: Callable[[int], int]
    op: DenoisedOp | None = None
    denoised: dict[int, tuple[float, float]] = field(default_factory=dict)

    def clamp(self, estimate: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
        """Stands for ``estimate.clamp(low, high)``."""
        low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
        if low != -high or not 0 < high < math.inf:
            raise UnsupportedScheduler(
                f"{self.name} clips to [{low:g}, {high:g}]; a table clips the x_0 estimate to a symmetric range only."
            )
        return self._record(estimate, Clip(limit=high))

    def threshold(self, estimate: torch.Tensor, config: Any) -> torch.Tensor:
        """Stands for ``scheduler._threshold_sample(estimate)``."""
        op = DynamicThreshold(ratio=float(config.dynamic_thresholding_ratio), max_value=float(config.sample_max_value))
        return self._record(estimate, op)

    def _record(self, estimate: torch.Tensor, op: DenoisedOp) -> torch.Tensor:
        if self.op not in (None, op):
            raise UnsupportedScheduler(f"{self.name} changes its clipping along the schedule ({self.op} and {op}).")
        i = len(self.inputs) - 1
        vector, row = estimate.reshape(-1, estimate.shape[-1])[0].numpy(), self.inputs[-1]
        on_output = float(vector[self.output_at(i)])
        rest = vector.copy()
        rest[self.output_at(i)] = 0
        on_input = float(rest @ row / (row @ row))
        if np.abs(rest - on_input * row).max() > 1e-9 * np.abs(vector).max() or i in self.denoised:
            raise UnsupportedScheduler(
                f"{self.name} clips something other than the x_0 estimate of evaluation {i}, or clips it twice; "
                "a table has one clipped estimate per evaluation."
            )
        self.op, self.denoised[i] = op, (on_input, on_output)
        clipped = torch.zeros_like(estimate)
        clipped[..., self.clipped_at(i)] = 1
        return clipped


# ---------------------------------------------------------------------------------------------------- Brownian


class BrownianPath:
    """Stands for a Brownian tree's noise sampler: unit noise over an interval, correlated where intervals overlap.

    The noise over [s, t] is (W_t - W_s) / sqrt(t - s). Cut at every end that the scheduler asks for, W has
    independent increments, and each is one injected noise. :meth:`ask` collects the intervals in a first run;
    :meth:`__call__` answers in the runs after it. Noises are numbered in the order in which they are first needed.
    """

    def __init__(self) -> None:
        self._asked: list[tuple[float, float]] = []
        self._number: dict[tuple[float, float], int] = {}
        self.draw: Draw | None = None

    def ask(self, sigma: Any, sigma_next: Any) -> tuple[float, float]:
        """Note an interval."""
        interval = tuple(sorted((float(sigma), float(sigma_next))))
        self._asked.append((interval[0], interval[1]))
        return self._asked[-1]

    def cut(self) -> int:
        """Divide the intervals asked for into the smallest ones, and return how many noises they are."""
        ends = sorted({end for interval in self._asked for end in interval})
        for low, high in self._asked:
            inside = [(a, b) for a, b in itertools.pairwise(ends) if low <= a and b <= high]
            for piece in reversed(inside):  # a sampler goes from high noise to low
                self._number.setdefault(piece, len(self._number))
        return len(self._number)

    def __call__(self, sigma: Any, sigma_next: Any) -> torch.Tensor:
        if self.draw is None:
            raise RuntimeError("a Brownian path answers only once its noises are known")
        low, high = sorted((float(sigma), float(sigma_next)))
        pieces = [piece for piece in self._number if low <= piece[0] and piece[1] <= high]
        total = torch.zeros(())
        for a, b in pieces:
            total = total + math.sqrt((b - a) / (high - low)) * self.draw(self._number[a, b])
        return total
