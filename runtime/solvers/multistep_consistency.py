"""Multistep consistency sampling: jump to x_0, add noise up to the next level, jump again.

Song et al. 2023, arXiv:2303.01469, algorithm 1. For a network preconditioned as in EDM the jump passes the paper's
boundary condition at the path's smallest level e, c_skip = s² / ((r - e)² + s²) and c_out = s (r - e) / sqrt(r² + s²)
with s = sigma_data. Other networks' D is taken as it is.

diffusers: CMStochasticIterativeScheduler with ``clip_denoised=False``. It tells the network 1000 ln(sigma) / 4, where
an EDM path says ln(sigma) / 4; its sigmas are Karras's at every (T/N)-th of 40 points, Sigmas(…) here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lehr.runtime.paths import EDM, VE, Path
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.solver_table import SolverTable, TableWriter
from lehr.runtime.solvers._grid import grid
from lehr.runtime.solvers.sampler import Options, Sampler, check_positive, recorded

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MultistepConsistencyOptions(Options):
    """``s_noise``: multiplies the noise added between jumps."""

    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_positive("s_noise", self.s_noise)


def multistep_consistency(
    path: Path, prediction: Prediction, timesteps: Array, options: MultistepConsistencyOptions
) -> SolverTable:
    """x' = alpha' (f + sqrt(r'² - e²) z), with e the level a consistency function ends at: 0 but for EDM and VE."""
    points, n = grid(path, timesteps), len(timesteps)
    table = TableWriter("multistep_consistency", path, prediction, max_evaluations=n, max_noises=n)
    end = path.sigma_min if isinstance(path, (EDM, VE)) else 0.0
    x = table.x_T
    for i in range(n):
        denoised = table.denoise(x, timesteps[i])
        x = _jump(x, denoised, points.ratios[i], end, prediction)
        std = math.sqrt(max(0.0, points.sigmas[i + 1] ** 2 - (points.alphas[i + 1] * end) ** 2)) if i + 1 < n else 0.0
        if std > 0:
            x = points.alphas[i + 1] * x + options.s_noise * std * table.noise()
    return table.finish(x, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


def _jump(x: Array, denoised: Array, ratio: float, end: float, prediction: Prediction) -> Array:
    """The consistency function; an EDM network's output is recovered from D and preconditioned anew."""
    if prediction.kind is not PredictionKind.EDM:
        return denoised
    on_sample, on_output = prediction.denoised_coefficients(1.0, ratio)
    output = (denoised - on_sample * x) / on_output
    data = prediction.sigma_data
    c_skip = data**2 / ((ratio - end) ** 2 + data**2)
    return np.asarray(c_skip * x + data * (ratio - end) / math.sqrt(ratio**2 + data**2) * output)


SAMPLER = Sampler(
    name="multistep_consistency",
    summary="consistency models: jumps to x_0 with noise between them",
    reference="Song et al. 2023, arXiv:2303.01469",
    order=1,
    build=multistep_consistency,
    options=MultistepConsistencyOptions(),
    stochastic=True,
)
