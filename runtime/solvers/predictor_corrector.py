"""Predictor-corrector sampling of score-SDE (Song et al. 2021, arXiv:2011.13456, algorithms 1 to 4).

At each level Langevin steps correct the sample, then one step of the reverse SDE predicts the next level. The paper
sets the corrector's step from norms, 2 (snr |z| / |score|)²; here it is fixed beforehand with their expectations for
data small against the noise, |z| / |score| = r, which leaves the sampler linear: 2 snr² r².

diffusers: ScoreSdeVeScheduler's predictor (``step_pred``) is ``predictor`` reverse_diffusion on the same sigmas; its
corrector is the norm-adaptive one. It returns the last step with or without its noise; here it is without.
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
from lehr.runtime.solvers._grid import finite_grid
from lehr.runtime.solvers.sampler import DIFFUSIONS, Options, Sampler, check_positive, recorded


class Predictor(str, Enum):
    """The variance of the reverse step from r to r'."""

    REVERSE_DIFFUSION = "reverse_diffusion"  # r² - r'², equation 46
    ANCESTRAL = "ancestral"  # the posterior's, r'² (1 - r'² / r²), equation 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorCorrectorOptions(Options):
    """``snr``: signal-to-noise ratio of a corrector step; ``corrector_steps``: how many at each level."""

    snr: float = 0.16
    corrector_steps: int = 1
    predictor: Predictor = Predictor.REVERSE_DIFFUSION

    def __post_init__(self) -> None:
        check_positive("snr", self.snr)
        if self.snr >= 0.7:
            raise InvalidInput(f"snr must be below 0.7, beyond which corrector steps diverge, got {self.snr}.")
        if not 0 <= self.corrector_steps <= 100:
            raise InvalidInput(f"corrector_steps must be 0 to 100, got {self.corrector_steps}.")


def predictor_corrector(
    path: Path, prediction: Prediction, timesteps: npt.NDArray[np.float64], options: PredictorCorrectorOptions
) -> SolverTable:
    """In y = x / alpha and r = sigma / alpha, where the score is (D - y) / r²."""
    points, n = finite_grid("predictor_corrector", path, timesteps), len(timesteps)
    evaluations = n * (1 + options.corrector_steps)
    table = TableWriter("predictor_corrector", path, prediction, max_evaluations=evaluations, max_noises=evaluations)
    r, alphas, step_size = points.ratios, points.alphas, 2 * options.snr**2
    y = table.x_T / alphas[0]
    for i in range(n):
        for _ in range(options.corrector_steps):
            y = y + step_size * (table.denoise(alphas[i] * y, timesteps[i]) - y)
            y = y + math.sqrt(2 * step_size) * r[i] * table.noise()
        shrink = (r[i + 1] / r[i]) ** 2
        y = y + (1 - shrink) * (table.denoise(alphas[i] * y, timesteps[i]) - y)
        if i + 1 < n:
            variance = (r[i + 1] if options.predictor is Predictor.ANCESTRAL else r[i]) ** 2 * (1 - shrink)
            y = y + math.sqrt(variance) * table.noise()
    return table.finish(y, init_noise_sigma=path.init_noise_sigma(timesteps[0]), options=recorded(options, n))


SAMPLER = Sampler(
    name="predictor_corrector",
    summary="reverse SDE steps with Langevin corrections between them",
    reference="Song et al. 2021, arXiv:2011.13456",
    order=1,
    build=predictor_corrector,
    options=PredictorCorrectorOptions(),
    stochastic=True,
    evaluations=2,
    paths=DIFFUSIONS,
)
