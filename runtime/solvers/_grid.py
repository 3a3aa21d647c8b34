"""The points a loop visits, as the numbers solvers are written in, and the split of a step into noise and decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Path
from lehr.runtime.solvers.sampler import Final

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """N timesteps and N + 1 points of the path, the last one being where the loop ends.

    Attributes:
        timesteps: (N,) where the network is evaluated.
        alphas, sigmas: (N + 1,) of the path.
        ratios: (N + 1,) r = sigma / alpha; the first is infinite at pure noise, the last is 0 at x_0.
        lambdas: (N + 1,) -ln r, half the log-SNR.
    """

    timesteps: Array
    alphas: Array
    sigmas: Array
    ratios: Array
    lambdas: Array

    def __len__(self) -> int:
        """The number of steps N."""
        return len(self.timesteps)

    @property
    def flow_times(self) -> Array:
        """(N + 1,) u = sigma / (alpha + sigma): x / (alpha + sigma) moves on a straight flow in u on any path."""
        return np.asarray(self.sigmas / (self.alphas + self.sigmas))

    def history(self, i: int, order: int) -> int:
        """The order a multistep method reaches at step i: pure noise, at infinite -lambda, is no node."""
        return max(1, min(order, i + 1 if math.isfinite(self.lambdas[0]) else i))


def grid(path: Path, timesteps: Array, *, final: Final = Final.ZERO) -> Grid:
    """The points of ``path`` at ``timesteps`` and the one after them.

    Raises:
        InvalidInput: the loop shall end at the path's last timestep but is there before its last step.
    """
    alphas, sigmas = path.alpha_sigma(timesteps)
    end = (1.0, 0.0) if final is Final.ZERO else path.alpha_sigma(path.last_timestep)
    alphas, sigmas = np.append(alphas, float(end[0])), np.append(sigmas, float(end[1]))
    with np.errstate(divide="ignore"):
        ratios = sigmas / alphas
        lambdas = -np.log(ratios)
    if not ratios[-1] < ratios[-2] * (1 - 1e-9):
        raise InvalidInput(
            "the schedule already visits the path's smallest noise level, so no step is left to end there; "
            "end at zero, or use a schedule that stops earlier such as 'trailing'."
        )
    return Grid(timesteps=timesteps, alphas=alphas, sigmas=sigmas, ratios=ratios, lambdas=lambdas)


def finite_grid(sampler: str, path: Path, timesteps: Array) -> Grid:
    """The same for methods that divide by alpha; InvalidInput for a loop that starts at pure noise."""
    points = grid(path, timesteps)
    if not math.isfinite(points.ratios[0]):
        raise InvalidInput(
            f"sampler {sampler!r} needs a finite noise-to-signal ratio and this schedule starts at pure noise "
            "(alpha 0); start below it, or use euler, ddim, dpmpp_2m, unipc or flow_heun."
        )
    return points


def ancestral_split(ratio: float, ratio_next: float, eta: float) -> tuple[float, float]:
    """(down, up): decay to ``down``, then add ``up`` fresh noise, so that the variances add up to ratio_next².

    At eta 1 ``up`` is the standard deviation of the posterior of y = x / alpha (Ho et al. 2020, equation 7).
    """
    posterior = ratio_next * math.sqrt(max(0.0, 1 - (ratio_next / ratio) ** 2))
    up = min(ratio_next, eta * posterior)
    return math.sqrt(ratio_next**2 - up**2), up
