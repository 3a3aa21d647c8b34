"""Any diffusers scheduler as a solver table, by running it once on basis vectors.

The scheduler's own code is the compiler: it is run with x_T = e_0, F_i = e_{1+i} and the k-th noise a basis vector
of its own, and every sample it computes is then a row of coefficients. Nothing is re-implemented, so no option can
be forgotten. Whether the scheduler really is linear in these, is decided afterwards by a run on random numbers
with a network that is not linear.

Shape legend: N evaluations, M noises, V = 1 + N + N + M entries of a basis vector (x_T, F, clip(D), noises).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lehr.export.schedulers.basis import ClipRecorder, Interceptor, Vector
from lehr.export.schedulers.history import exact_denoised, kept_quantity
from lehr.export.schedulers.points import Point, prediction_of
from lehr.export.schedulers.probe import probe
from lehr.export.schedulers.refusals import check_supported
from lehr.export.schedulers.run import Run
from lehr.export.schedulers.setting import describe_options, prepare, step_arguments
from lehr.runtime.errors import UnsupportedScheduler
from lehr.runtime.solver_table import DynamicThreshold, LearnedVariance, SolverTable

_CHANNELS = 3  # schedulers of the DPM-Solver family take the first 3 channels for the prediction
_ESTIMATE = 0.02  # consistency models clip an x_0 estimate that differs from EDM's by sigma_min / sigma_data, 0.4 %


def trace_scheduler(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    schedule_options: Mapping[str, Any] | None = None,
    step_options: Mapping[str, Any] | None = None,
) -> SolverTable:
    """The solver table of a diffusers scheduler; the scheduler itself is left as it was.

    Args:
        scheduler: any scheduler object of diffusers whose ``step`` is plain (model output, timestep, sample).
        num_inference_steps: how many steps; not needed with ``timesteps`` or ``sigmas``.
        timesteps: timesteps of your own, where the scheduler's ``set_timesteps`` takes them.
        sigmas: noise levels of your own, likewise.
        mu: the shift of flow schedulers with ``use_dynamic_shifting``; :func:`dynamic_shift` computes it.
        schedule_options: further arguments of ``set_timesteps`` (LCM's ``original_inference_steps``).
        step_options: further arguments of ``step`` (DDIM's ``eta``, Euler's ``s_churn``).

    Returns:
        The table; ``timesteps`` are what the network is fed, ``injected`` noises come in the order in which the
        scheduler draws them.

    Raises:
        InvalidInput: an argument that the scheduler does not take, or a schedule that it refuses.
        UnsupportedScheduler: the scheduler or one of its options is no table, or is broken in diffusers itself.
    """
    check_supported(scheduler)
    run = Run.of(
        prepare(scheduler, num_inference_steps, timesteps, sigmas, mu, schedule_options or {}),
        step_arguments(scheduler, step_options or {}),
    )
    table = _traced(
        run, describe_options(scheduler, run.num_steps, timesteps, sigmas, mu, schedule_options, step_options)
    )
    probe(run, table)
    return table


# ----------------------------------------------------------------------------------------------------- tracing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    """What one run on basis vectors yields."""

    rows: Vector  # (N + 1, V)
    points: list[Point]
    clips: ClipRecorder
    kept: dict[int, tuple[float, float]]  # what a multistep scheduler keeps of an evaluation, on input and output
    drawn_at: list[int]  # the evaluation after which each noise is drawn


def _trace(run: Run, variance: float) -> _Trace:
    """Run on basis vectors; the network's extra channels, if any, are ``variance`` everywhere."""
    n, prediction = len(run.timesteps), prediction_of(run.scheduler, run.family)
    capacity = 2 * n + 2
    channels = _CHANNELS if run.extra_channels else 1
    shape = (1, channels, 1, 1 + 2 * n + capacity)
    rows: list[Vector] = []
    points: list[Point] = []
    drawn_at: list[int] = []
    kept: dict[int, tuple[float, float]] = {}

    def basis(index: int) -> torch.Tensor:
        vector = torch.zeros(shape, dtype=torch.float64)
        vector[..., index] = 1
        return vector

    def draw(j: int) -> torch.Tensor:
        if j >= capacity:
            raise UnsupportedScheduler(f"{run.name} draws more than two noises per evaluation; a table expects fewer.")
        drawn_at.extend([len(rows) - 1] * (j + 1 - len(drawn_at)))
        return basis(1 + 2 * n + j)

    def network(i: int, model_input: torch.Tensor, _timestep: float) -> torch.Tensor:
        rows.append(model_input.reshape(-1, shape[-1])[0].numpy().copy())
        output = basis(1 + i)
        return torch.cat([output, torch.full_like(output, variance)], dim=1) if run.extra_channels else output

    def locate(scheduler: Any, timestep: torch.Tensor, x: torch.Tensor, model_input: torch.Tensor) -> None:
        if not bool(torch.isfinite(model_input).all()):
            raise run.not_finite(len(points) - 1)
        points.append(run.family.where(scheduler, timestep))
        scale = run.family.scale(prediction, points[-1])
        if not torch.allclose(model_input, scale * x, rtol=1e-4, atol=1e-6 * float(x.abs().max())):
            raise UnsupportedScheduler(
                f"{run.name} scales its input at timestep {float(timestep):g} as no noise level of its family does, so "
                "the level cannot be read."
            )

    def remember(i: int, scheduler: Any) -> None:
        pair = kept_quantity(scheduler, rows[i], 1 + i)
        if pair is not None:
            kept[i] = pair

    clips = ClipRecorder(name=run.name, inputs=rows, output_at=lambda i: 1 + i, clipped_at=lambda i: 1 + n + i)
    if run.brownian is not None:
        run.brownian.draw = draw
    final = run.without_zero_alpha()(
        basis(0),
        network,
        Interceptor(run.name, shape, draw, clips.clamp),
        threshold=lambda estimate: clips.threshold(estimate, run.scheduler.config),
        sampler=run.brownian,
        before=locate,
        after=remember,
    )
    if tuple(final.shape) != shape:
        raise UnsupportedScheduler(f"{run.name} changes the sample's shape, from {shape} to {tuple(final.shape)}.")
    rows.append(final.reshape(-1, shape[-1])[0].numpy())
    if not bool(torch.isfinite(final).all()):
        raise run.not_finite(n - 1)
    if not bool(final.any()):  # IPNDM at one step
        raise UnsupportedScheduler(
            f"{run.name} returns zero at {n} evaluations in diffusers itself, whatever the network says. "
            "Use another number of steps."
        )
    return _Trace(rows=np.array(rows), points=points, clips=clips, kept=kept, drawn_at=drawn_at)


def _traced(run: Run, options: Mapping[str, Any]) -> SolverTable:
    trace = _trace(run, 1.0)
    n, num_noises = len(run.timesteps), len(trace.drawn_at)
    prediction = prediction_of(run.scheduler, run.family)
    alphas, sigmas = (np.array(values) for values in zip(*trace.points, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        on_sample, on_output = prediction.denoised_coefficients(alphas, sigmas)
        scale = np.asarray(prediction.input_scale(alphas, sigmas), np.float64)
        from_input, from_output = on_sample / scale, on_output * np.ones(n)
    for i, pair in exact_denoised(trace.kept, from_input, from_output, alphas, sigmas, scale).items():
        from_input[i], from_output[i] = pair
    for i, pair in trace.clips.denoised.items():
        away = max(abs(pair[0] - from_input[i]), abs(pair[1] - from_output[i]))
        named = isinstance(trace.clips.op, DynamicThreshold)  # by a method that is for nothing else
        if not (named or away <= _ESTIMATE * max(abs(from_input[i]), abs(from_output[i]))):
            raise UnsupportedScheduler(
                f"{run.name} clips something other than the x_0 estimate at evaluation {i}; a table clips nothing else."
            )
        from_input[i], from_output[i] = pair
    if not (np.all(np.isfinite(from_input)) and np.all(np.isfinite(from_output))):
        raise UnsupportedScheduler(
            f"{run.name} starts from pure noise (alpha = 0), where {prediction.kind.value} predictions say nothing "
            "about x_0: diffusers itself returns values that are not finite. Use a v prediction or no zero SNR."
        )
    noises = trace.rows[:, 1 + 2 * n : 1 + 2 * n + num_noises].copy()
    kind, slopes = None, None
    if run.extra_channels:
        kind, noises, slopes = _learned_variance(run, trace, noises)
    clipped = trace.rows[:, 1 + n : 1 + 2 * n].copy() if trace.clips.op is not None else None
    return SolverTable(
        sampler=type(run.scheduler).__name__,
        prediction=prediction,
        timesteps=np.array([float(t) for t in run.timesteps]),
        alphas=alphas,
        sigmas=sigmas,
        start=trace.rows[:, 0].copy(),
        outputs=trace.rows[:, 1 : 1 + n].copy(),
        noises=noises,
        clipped=clipped,
        clip=trace.clips.op,
        variance=kind,
        variance_slopes=slopes,
        denoised_from_input=from_input,
        denoised_from_output=from_output,
        init_noise_sigma=float(getattr(run.scheduler, "init_noise_sigma", 1.0)),
        options=options,
    )


def _learned_variance(run: Run, at_one: _Trace, noises: Vector) -> tuple[LearnedVariance, Vector, Vector | None]:
    """Which operation the extra channels are, from runs at other values of theirs: (kind, noises, slopes)."""
    first = 1 + 2 * len(run.timesteps)

    def noises_at(variance: float) -> Vector:
        rows = _trace(run, variance).rows
        if not np.array_equal(rows[:, :first], at_one.rows[:, :first]):
            raise UnsupportedScheduler(f"{run.name} uses the learned variance for more than scaling injected noise.")
        return np.asarray(rows[:, first : first + noises.shape[1]])

    at_four = noises_at(4.0)
    if np.array_equal(at_four, noises):
        return LearnedVariance.UNUSED, noises, None
    used = np.any(noises != 0, axis=0)
    first_use = np.where(used, (noises != 0).argmax(axis=0), 0)
    if any(used[j] and first_use[j] != at_one.drawn_at[j] + 1 for j in range(len(used))):
        raise UnsupportedScheduler(f"{run.name} keeps a noise of learned variance for a later step.")
    if run.scheduler.config.variance_type == "learned":
        kind, slopes, expected = LearnedVariance.DIRECT, None, 2 * noises
    else:
        kind, at_zero = LearnedVariance.LOG_RANGE, noises_at(0.0)
        column = np.arange(len(used))
        slopes = np.where(used, np.log(np.where(used, noises[first_use, column] / at_zero[first_use, column], 1)), 0.0)
        noises, expected = at_zero, at_zero * np.exp(4 * slopes)
    if not np.allclose(at_four, expected, rtol=1e-9, atol=0):
        raise UnsupportedScheduler(
            f"{run.name} scales its noise by the learned variance in another way than "
            f"{', '.join(known.value for known in LearnedVariance)}."
        )
    return kind, noises, slopes
