"""Whether a traced table is the whole truth: the scheduler run once more, on random numbers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from lehr.export.schedulers.basis import Interceptor
from lehr.export.schedulers.run import Run
from lehr.runtime.errors import UnsupportedScheduler
from lehr.runtime.solver_table import SolverTable

Samples = npt.NDArray[np.float64]
_TOLERANCE = 1e-9  # of a row's terms; a scheduler that is linear agrees to 1e-13
_SHAPE = (2, 3, 2, 3)  # 3 channels, because schedulers of the DPM-Solver family take the first 3 for the prediction


def probe(run: Run, table: SolverTable) -> None:
    """Check every row on random numbers, with a network that is not linear.

    The rows are fed the outputs that the scheduler itself met, so that rounding cannot grow from row to row.

    Raises:
        UnsupportedScheduler: the scheduler is not linear beyond what the table says, or not finite.
    """
    generator = np.random.default_rng(0)
    x_T = generator.standard_normal(_SHAPE) * table.init_noise_sigma
    noises: list[Samples] = [generator.standard_normal(_SHAPE) for _ in range(table.num_noises)]
    inputs: list[Samples] = []
    outputs: list[Samples] = []

    def network(_i: int, model_input: torch.Tensor, timestep: float) -> torch.Tensor:
        x = model_input.numpy().copy()
        output = np.sin(1.5 * x + np.roll(x, 1, axis=-1) + timestep)
        inputs.append(x)
        outputs.append(output)
        extra = [0.5 + 0.5 * output[:, ::-1]] if run.extra_channels else []
        return torch.from_numpy(np.concatenate([output, *extra], axis=1))

    def draw(j: int) -> torch.Tensor:
        return torch.from_numpy(noises[j])

    if run.brownian is not None:
        run.brownian.draw = draw
    final = run(torch.from_numpy(x_T), network, Interceptor(run.name, _SHAPE, draw), sampler=run.brownian).numpy()
    if not np.all(np.isfinite(final)):
        raise run.not_finite(len(table) - 1)
    clip = table.clip
    clipped: list[Samples] = []
    if clip is not None:
        pairs = zip(table.denoised_from_input, table.denoised_from_output, inputs, outputs, strict=True)
        clipped = [
            np.asarray(clip(on_input * x + on_output * output), np.float64) for on_input, on_output, x, output in pairs
        ]
    if table.variance is not None:
        slopes = np.zeros(len(noises)) if table.variance_slopes is None else table.variance_slopes
        for j, row in enumerate((table.noises != 0).argmax(axis=0).tolist()):
            if row > 0:
                v = 0.5 + 0.5 * outputs[row - 1][:, ::-1]
                noises[j] = np.asarray(table.variance.scale(noises[j], v, float(slopes[j])), np.float64)
    vectors = np.stack([x_T, *outputs, *clipped, *noises]).reshape(1 + len(outputs) + len(clipped) + len(noises), -1)
    expected = np.stack([*inputs, final]).reshape(len(table) + 1, -1)
    error = np.abs(table.coefficients @ vectors - expected).max(axis=1)
    size = (np.abs(table.coefficients) @ np.abs(vectors)).max(axis=1)
    worst = int(np.argmax(error / np.maximum(size, math.ulp(0.0))))
    if not error[worst] <= _TOLERANCE * size[worst]:
        raise UnsupportedScheduler(
            f"{run.name} is not linear in the network's outputs and the noises: on random numbers row {worst} of its "
            f"table is off by {error[worst] / size[worst]:.1e}. Only clipping and thresholding of the x_0 estimate and "
            "learned variances are understood beside linear steps."
        )
