"""DPM-Solver++(2S): second-order single step (Lu et al. 2022, arXiv:2211.01095, algorithm 1), ancestral by ``eta``.

By default a step evaluates the network twice, the second time in the middle of log sigma (k-diffusion's "DPM++ 2S a"
at eta 1). With ``layout`` "grid" every other timestep serves as the middle point, so N steps are N evaluations.

diffusers: DPMSolverSinglestepScheduler with ``algorithm_type="dpmsolver++"``, ``solver_order=2``,
``lower_order_final=True`` is ``layout`` "grid" on the same integer timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._exponential import mass, slope_weight
from lehr.runtime.solvers._grid import ancestral_split, finite_grid
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, SolverType, check_share, recorded

Array = npt.NDArray[np.float64]


class Layout(str, Enum):
    """Where a step's second evaluation lies."""

    MIDDLE = "middle"  # halfway in log sigma, beside the schedule
    GRID = "grid"  # at the schedule's next timestep


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMpp2SOptions(Options):
    """``eta``: share of fresh noise, for ``layout`` middle. ``solver_type``: weight of D's slope, as in dpmpp_2m."""

    eta: float = 0.0
    layout: Layout = Layout.MIDDLE
    solver_type: SolverType = SolverType.MIDPOINT

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        if self.eta and self.layout is Layout.GRID:
            raise InvalidInput(
                "dpmpp_2s injects noise in layout 'middle' alone; set eta to 0 or the layout to 'middle'."
            )


def dpmpp_2s(path: Path, prediction: Prediction, timesteps: Array, options: DPMpp2SOptions) -> SolverTable:
    """In y = x / alpha: y' = (r'/r) y + (1 - r'/r) D + h w (D_2 - D) / h_2, with D_2 found at lambda + h_2."""
    points, n = finite_grid("dpmpp_2s", path, timesteps), len(timesteps)
    table = TableWriter("dpmpp_2s", path, prediction, max_evaluations=2 * n, max_noises=n)
    r, alphas = points.ratios, points.alphas
    y = table.x_T / alphas[0]
    i = 0
    while i < n:
        stride = 2 if options.layout is Layout.GRID and i + 2 < n else 1
        denoised = table.denoise(alphas[i] * y, timesteps[i])
        down, up = ancestral_split(r[i], r[i + stride], options.eta)
        if down == 0 or (options.layout is Layout.GRID and stride == 1):
            y = denoised + down / r[i] * (y - denoised)
        else:
            middle, timestep = r[i + 1], timesteps[min(i + 1, n - 1)]
            if options.layout is Layout.MIDDLE:
                middle = math.sqrt(r[i] * down)
                timestep = float(path.timestep_of(middle))
            y_middle = denoised + middle / r[i] * (y - denoised)
            second = table.denoise(float(path.alpha_sigma(timestep)[0]) * y_middle, timestep)
            h, h_2 = math.log(r[i] / down), math.log(r[i] / middle)
            slope = (second - denoised) / h_2
            y = down / r[i] * y + mass(h, 1.0) * denoised + slope_weight(h, 1.0, options.solver_type) * h * slope
        if up > 0:
            y = y + up * table.noise()
        i += stride
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="dpmpp_2s",
    summary="second order single step, two evaluations a step; ancestral at eta 1",
    reference="Lu et al. 2022, arXiv:2211.01095",
    order=2,
    build=dpmpp_2s,
    options=DPMpp2SOptions(),
    stochastic=True,
    evaluations=2,
    paths=DIFFUSIONS,
)
