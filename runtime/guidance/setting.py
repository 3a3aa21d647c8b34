"""What may be chosen about guidance, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.solver_table import SolverTable

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, algorithm 1).

    The difference D_c - D_u is split into a part parallel to D_c, which saturates colours, and one perpendicular.

    Attributes:
        parallel: eta, the share of the parallel part that is kept; 1 keeps it whole, 0 is purely perpendicular.
        norm_threshold: r, the largest norm of a sample's difference; None sets no limit.
        momentum: beta, the running mean of the differences; negative values push away from earlier ones.
    """

    parallel: float = 0.0
    norm_threshold: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.parallel <= 1:
            raise InvalidInput(f"the parallel share of a guidance projection must lie in [0, 1], got {self.parallel}.")
        if self.norm_threshold is not None and not (math.isfinite(self.norm_threshold) and self.norm_threshold > 0):
            raise InvalidInput(f"the norm threshold of a guidance projection is positive, got {self.norm_threshold}.")
        if not -1 < self.momentum < 1:
            raise InvalidInput(f"the momentum of a guidance projection must lie in (-1, 1), got {self.momentum}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How a sample is pushed towards its condition.

    Attributes:
        scale: w of D_u + w (D_c - D_u), 1 being none; None is the model's own.
        schedule: one scale for each evaluation of the solver table, instead of ``scale``.
        interval: (low, high), both included: guidance acts where sigma / alpha lies between them and is 1 elsewhere
            (Kynkäänniemi et al. 2024, arXiv:2404.07724). On EDM paths that ratio is the paper's sigma; it is
            infinite at pure noise.
        rescale: phi, the share of the guided estimate that is brought back to the standard deviation of D_c, sample
            by sample (Lin et al. 2024, arXiv:2305.08891, equations 15 and 16, here on the x_0 estimate).
        projection: what is done to D_c - D_u; None leaves it as it is.
    """

    scale: float | None = None
    schedule: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        for scale in (self.scale, *self.schedule):
            if scale is not None and not math.isfinite(scale):
                raise InvalidInput(f"the guidance scale must be finite, got {scale}.")
        if self.schedule and self.scale is not None:
            raise InvalidInput("guidance takes a scale or a schedule of scales, not both.")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise InvalidInput(
                "the guidance interval must hold 0 <= low < high, as ratios sigma / alpha, "
                f"got {self.interval[0]} and {self.interval[1]}."
            )
        if not 0 <= self.rescale <= 1:
            raise InvalidInput(f"the guidance rescale phi must lie in [0, 1], got {self.rescale}.")

    @property
    def acts_on_denoised(self) -> bool:
        """Whether guided outputs are no longer a linear combination of the two outputs."""
        return self.projection is not None or self.rescale > 0

    def scales(self, table: SolverTable, default: float) -> Array:
        """(N,) the scale at each evaluation of ``table``; ``default`` stands for a scale that is not set.

        Raises:
            InvalidInput: a schedule of another length, or a default that is not finite.
        """
        if not math.isfinite(default):
            raise InvalidInput(f"the guidance scale must be finite, got {default}.")
        if self.schedule and len(self.schedule) != len(table):
            raise InvalidInput(
                f"the guidance schedule holds {len(self.schedule)} scales, but {table.sampler} evaluates the network "
                f"{len(table)} times; give one scale an evaluation."
            )
        whole = default if self.scale is None else self.scale
        scales: Array = np.array(self.schedule or [whole] * len(table), dtype=np.float64)
        if self.interval is not None:
            low, high = self.interval
            with np.errstate(divide="ignore"):
                ratio = table.sigmas / table.alphas
            scales[(ratio < low) | (ratio > high)] = 1.0
        return scales
