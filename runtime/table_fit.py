"""Whether a solver table was made for a model: its prediction, its path, its learned variance."""

from __future__ import annotations

import numpy as np

from lehr.runtime.errors import InvalidInput
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import ModelSpec

# Schedulers round timesteps to integers, or interpolate noise levels between them in ways of their own.
_TIMESTEP_SLACK = 2e-3  # of the path's range
_RATIO_SLACK = 1e-3
_SIZE_SLACK = 1e-2  # of sqrt(alpha² + sigma²), which tells variance preserving, exploding and flow apart


def check_fits(table: SolverTable, spec: ModelSpec) -> None:
    """Raise InvalidInput unless ``table`` is for models of ``spec``'s prediction, path and channels."""
    if table.prediction != spec.prediction:
        raise InvalidInput(
            f"the solver table is for {table.prediction.kind.value} models, "
            f"{spec.name} predicts {spec.prediction.kind.value}. Make the table for this model's prediction."
        )
    channels, returned = spec.sample.shape[1], spec.outputs[0].shape[1]
    if table.variance is not None and isinstance(channels, int) and returned != 2 * channels:
        raise InvalidInput(
            f"{table.sampler} uses a learned variance, so the network must return {2 * channels} channels; "
            f"{spec.name} returns {returned}. Use a sampler of fixed variance."
        )
    path, t = spec.path, table.timesteps
    first, last = path.first_timestep, path.last_timestep
    slack, low, high = _TIMESTEP_SLACK * abs(first - last), min(first, last), max(first, last)
    near = [path.alpha_sigma(np.clip(t + shift, low, high)) for shift in (-slack, slack)]
    with np.errstate(divide="ignore"):
        ratio = table.sigmas / table.alphas
        ratios = np.array([sigma / alpha for alpha, sigma in near])
    sizes = np.array([np.hypot(alpha, sigma) for alpha, sigma in near])
    size = np.hypot(table.alphas, table.sigmas)
    fits = (ratio >= ratios.min(axis=0) * (1 - _RATIO_SLACK)) & (ratio <= ratios.max(axis=0) * (1 + _RATIO_SLACK))
    fits &= (size >= sizes.min(axis=0) * (1 - _SIZE_SLACK)) & (size <= sizes.max(axis=0) * (1 + _SIZE_SLACK))
    if not np.all(fits):
        i = int(np.argmin(fits))
        alpha, sigma = (float(value) for value in path.alpha_sigma(np.clip(t[i], low, high)))
        raise InvalidInput(
            f"the solver table is for another path: at timestep {t[i]:g} it has alpha {table.alphas[i]:.4g}, sigma "
            f"{table.sigmas[i]:.4g}, where {spec.name}'s {type(path).__name__} path has {alpha:.4g} and {sigma:.4g}. "
            "Make the table with this model's path."
        )
