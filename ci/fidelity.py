"""L0 to L2: does the engine compute what eager computed?

L0 holds structure, and the bundle's own statements against its recorded tables; L1 single evaluations by the score's
error, timestep by timestep; L2 whole loops on the recorded noise, by final sample and by drift. Measures are those of
:mod:`lehr.runtime.verify`; what is allowed comes from a policy and from the noise floors in the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.ci.checks import Check, LoopSeries, Outcome, StepSeries, first_above, judged
from lehr.ci.policy import Limits, LoopLimits
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import STEP, EngineRecord
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.golden import Floor, Golden, Trajectory
from lehr.runtime.noise import batch_normal
from lehr.runtime.parity import WORST, compare, decibels, relative_error, score
from lehr.runtime.pipeline import Pipeline
from lehr.runtime.prediction import Prediction
from lehr.runtime.request import Request
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import default_sampler, samplers, solver_table
from lehr.runtime.spec import ModelSpec
from lehr.runtime.verify import precision_problem, replay, score_error, step_outputs, value_problem

Array = npt.NDArray[Any]

SAME_TABLE = 1e-6  # of coefficients of order one: float64 libraries differ by 1e-15, another schedule by far more
ROUNDING = 1e-6  # of a latent: what float32 sums leave where no evaluation errs at all
STEP_GROWTH = 2.0  # of an earlier drift in one step: at most 1.6 with both shipped models in fp32, fp16 and bf16
_FORMAT_OF = {"fp16": "float16", "bf16": "bfloat16"}  # recipe -> what an engine says it computes in

# -------------------------------------------------------------------------------------------------- L0, structure


def structure(
    denoiser: Denoiser, record: EngineRecord, golden: Golden, outputs: list[Array]
) -> tuple[list[Check], bool]:
    """Checks of L0, and whether the engine can be evaluated at all; fills ``outputs`` with the recorded evaluations."""
    checks = [_contract(denoiser.spec, golden), *_noise(golden), _precision(record)]
    try:
        outputs.extend(step_outputs(denoiser, golden))
    except RunFailed as e:
        return [*checks, judged("L0.runs", False, str(e))], False
    checks.append(judged("L0.runs", True, f"{len(outputs)} evaluations of the specified shape"))
    problems = ((k, value_problem(output)) for k, output in enumerate(outputs))
    bad = next(((k, problem) for k, problem in problems if problem), None)
    if bad is not None:
        broken = [k for k, sample in enumerate(outputs[bad[0]]) if not np.all(np.isfinite(sample))]
        which = f" in sample {broken[0]}" if broken else ""
        reason = f"{bad[1]}{which} at timestep {golden.steps.timesteps[bad[0]]:g}"
        return [*checks, judged("L0.values", False, reason)], True
    return [*checks, judged("L0.values", True, "finite and not constant at every timestep")], True


def _precision(record: EngineRecord) -> Check:
    problem, said = precision_problem(record), []
    for plan, recipe in record.recipes.items():
        found, name = record.plans[plan].achieved_precision, _FORMAT_OF.get(recipe)
        if not found:
            reason = f"{record.library} does not say what {plan} computes in; recipe {recipe} was asked for"
            return Check(name="L0.precision", outcome=Outcome.NOTED, reason=reason)
        if problem is None and name is not None and name not in found:
            problem = f"recipe {recipe} but the engine computes in {sorted(found)}"
        shares = ", ".join(f"{share:.0%} {name}" for name, share in found.items())
        said.append(f"{shares}, as recipe {recipe} asks" + ("" if plan == STEP else f" of {plan}"))
    return judged("L0.precision", problem is None, problem or "; ".join(said))


def _contract(spec: ModelSpec, golden: Golden) -> Check:
    """The bundle says what the network predicts, on which path and with which sampler: is it what was recorded?

    An engine can equal eager and still draw noise if these are wrong, because ``run`` makes its tables from them.
    """
    problem = _path_problem(spec, golden)
    for loop in golden.trajectories:
        problem = problem or _table_problem(spec, loop.table)
    found = "path, prediction and sampler give the recorded tables"
    if not golden.trajectories:
        found = "the path gives the recorded noise levels; the prediction is held by recorded loops only, here none"
    return judged("L0.contract", problem is None, problem or found)


def _path_problem(spec: ModelSpec, golden: Golden) -> str | None:
    levels = spec.path.alpha_sigma(golden.steps.timesteps)
    for name, ours, recorded in zip(
        ("alpha", "sigma"), levels, (golden.steps.alphas, golden.steps.sigmas), strict=True
    ):
        if not _same(ours, recorded):
            return f"the model's path gives another {name} than the one recorded for the same timesteps"
    return None


def _table_problem(spec: ModelSpec, recorded: SolverTable) -> str | None:
    name = spec.sampling.sampler or default_sampler(spec.path)
    if name != recorded.sampler:
        return f"the model's sampler is {name}, and the recorded loops ran {recorded.sampler}"
    if spec.prediction != recorded.prediction:
        return f"the model's prediction is {_said(spec.prediction)}, the recorded loops' {_said(recorded.prediction)}"
    steps = int(recorded.options.get("num_inference_steps", len(recorded)))
    try:
        made = solver_table(name, spec.path, spec.prediction, steps)
    except InvalidInput as e:
        return f"sampler {name} no longer fits the model: {e}"
    for item in ("timesteps", "alphas", "sigmas", "denoised_from_input", "denoised_from_output", "coefficients"):
        if not _same(getattr(made, item), getattr(recorded, item)):
            return f"sampler {name} over the model's path has other {item} than the recorded loops"
    return None


def _said(prediction: Prediction) -> str:
    return f"{'-' if prediction.sign < 0 else ''}{prediction.kind.value}"


def _noise(golden: Golden) -> list[Check]:
    """``run`` draws the recorded noise from the recorded seed, sample by sample: other noise is another picture."""
    known = [loop for loop in golden.trajectories if loop.seed is not None]
    for loop in known:
        drawn = batch_normal(loop.seed or 0, range(len(loop.x_T)), loop.x_T.shape[1:])
        start = drawn * np.float32(loop.table.init_noise_sigma)
        rows = [k for k in range(len(start)) if not _same(start[k], loop.x_T[k])]
        if rows:
            reason = f"seed {loop.seed} gives other noise for sample {rows[0]} of loop {loop.name} than was recorded"
            return [judged("L0.noise", False, reason)]
    return [judged("L0.noise", True, "recorded seeds give the recorded noise, sample by sample")] if known else []


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=SAME_TABLE, atol=SAME_TABLE))


# ------------------------------------------------------------------------------------------ L1, single evaluations


def steps(
    denoiser: Denoiser, record: EngineRecord, golden: Golden, limits: Limits, outputs: list[Array]
) -> tuple[list[Check], StepSeries]:
    """Checks of L1, from the recorded evaluations and two more that ask the same in another batch."""
    prediction = denoiser.spec.prediction
    errors = [score_error(prediction, golden, k, output) for k, output in enumerate(outputs)]
    allowed, source = step_limits(golden, limits, record.recipe)
    k = int(np.argmax(np.asarray(errors) / allowed))
    check = judged(
        "L1.score",
        all(e <= limit for e, limit in zip(errors, allowed, strict=True)),
        f"error {errors[k]:.2e} at timestep {golden.steps.timesteps[k]:g}, limit {allowed[k]:.2e} ({source})",
        value=errors[k],
        limit=float(allowed[k]),
    )
    series = StepSeries(
        timesteps=tuple(golden.steps.timesteps.tolist()), rel_error=tuple(errors), limits=tuple(allowed.tolist())
    )
    return [check, *_batches(denoiser, golden, allowed, outputs)], series


def step_limits(golden: Golden, limits: Limits, recipe: str) -> tuple[Array, str]:
    """What the score may err at each recorded timestep, and in words where that comes from.

    Where alpha is 0 the score does not depend on the network and the output is compared instead; no floor is recorded
    for it, so the largest of the other timesteps stands in.
    """
    floor, name = floor_of(golden, recipe)
    least = np.full(len(golden.steps.timesteps), limits.L1.rel_error)
    if floor is None or not floor.rel_error:
        why = f": {floor.unavailable}" if floor and floor.unavailable else ""
        return least, f"absolute; no {name} floor{why}"
    own = np.asarray(floor.rel_error)
    if floor.stated:
        return np.maximum(own, least), f"what recipe {name} states"
    own = limits.L1.floor_factor * np.where(golden.steps.alphas == 0, own.max(), own)
    return np.maximum(own, least), f"{limits.L1.floor_factor:g} x eager's {name}, at least {limits.L1.rel_error:.0e}"


def floor_of(golden: Golden, recipe: str) -> tuple[Floor | None, str]:
    """Eager's own error in the recipe's format, and the format's name."""
    name = "fp64" if recipe == "fp32" else recipe
    return golden.floors.get(name), name


def _batches(denoiser: Denoiser, golden: Golden, allowed: Array, outputs: list[Array]) -> list[Check]:
    """The same samples in another order, and one alone: samples are independent, and nothing kept is another's.

    A cache that hands the first prompt's tensors to the second is right in every batch that repeats the first.
    """
    k, batch = len(outputs) // 2, golden.steps.inputs.shape[1]
    if batch < 2:
        reason = "one sample is recorded: there is no other order"
        return [Check(name="L1.order", outcome=Outcome.NOT_RUN, reason=reason)]
    inputs, timestep, own, limit = (
        golden.steps.inputs[k],
        float(golden.steps.timesteps[k]),
        outputs[k],
        float(allowed[k]),
    )
    batched = {tensor.name for tensor in denoiser.spec.conditions if tensor.batched}

    def asked(name: str, words: str, choose: Callable[[Array], Array]) -> Check:
        conditions = {n: choose(v) if n in batched else v for n, v in golden.steps.conditions.items()}
        try:
            error = relative_error(choose(own), denoiser(choose(inputs), timestep, conditions))
        except RunFailed as e:
            return judged(name, False, f"samples {words}: {e}")
        reason = f"samples {words} differ by {error:.2e} at timestep {timestep:g}, limit {limit:.2e}"
        return judged(name, error <= limit, reason, value=error, limit=limit)

    return [
        asked("L1.order", "in another order", lambda array: np.roll(array, 1, axis=0)),
        asked("L1.alone", "evaluated alone", lambda array: array[-1:]),
    ]


# ----------------------------------------------------------------------------------------------- L2, whole loops


def loop(
    denoiser: Denoiser, record: EngineRecord, golden: Golden, limits: Limits, trajectory: Trajectory
) -> tuple[list[Check], LoopSeries]:
    """Checks of one recorded loop: the final sample, and the step at which the loop leaves what L1 explains."""
    final, drift = replay(denoiser, trajectory)
    drift.append(relative_error(trajectory.final, final))
    explained = explained_drift(golden, limits, record.recipe, trajectory, drift)
    table, at = trajectory.table, first_above(np.asarray(drift), explained)
    series = LoopSeries(
        timesteps=tuple(table.timesteps.tolist()),
        drift=tuple(drift),
        explained=tuple(explained.tolist()),
        diverges_at=at,
        eager=trajectory.final,
        engine=final,
    )
    parity = compare(trajectory.final, final, denoiser.spec.value_range)
    low, high = denoiser.spec.value_range
    measured = {f.name: float(getattr(parity, f.name)) for f in fields(parity)}
    measured["max_abs"] = min(measured["max_abs"] / (high - low), WORST)
    checks = _final(f"L2.{trajectory.name}", measured, loop_limits(golden, limits.L2, record.recipe))
    return [*checks, _divergence(f"L2.{trajectory.name}.drift", series)], series


def drawn(denoiser: Denoiser, record: EngineRecord, golden: Golden, limits: Limits) -> list[Check]:
    """The last recorded loop once more, as ``lehr run`` draws it: by seed, in two batches, through the pipeline."""
    # Recorded loops inject noise of their own, so samplers that inject any draw something else by seed.
    known = [loop for loop in golden.trajectories if loop.seed is not None and not loop.table.num_noises]
    loops = [loop for loop in known if loop.table.sampler in samplers()]
    if not loops:
        return []
    loop, batch = loops[-1], len(loops[-1].x_T)
    labels = loop.conditions["class_labels"].tolist() if set(loop.conditions) == {"class_labels"} else []
    request = Request(
        num=batch,
        seed=loop.seed or 0,
        sampler=loop.table.sampler,
        num_inference_steps=int(loop.table.options.get("num_inference_steps", len(loop.table))),
        guidance_scale=loop.guidance_scale,
        class_labels=labels,
        conditions={} if labels else loop.conditions,
        unconditional={} if labels else loop.unconditional,
        batch=-(-batch // 2),
        sizes={
            str(name): size
            for name, size in zip(denoiser.spec.sample.shape[1:], loop.x_T.shape[1:], strict=True)
            if isinstance(name, str)
        },
    )
    allowed = loop_limits(golden, limits.L2, record.recipe)["psnr_db"]
    words = f"seed {loop.seed} drawn in two batches"
    try:
        found = compare(loop.final, Pipeline(denoiser)(request), denoiser.spec.value_range).psnr_db
    except (RunFailed, InvalidInput) as e:
        return [judged("L2.run.psnr_db", False, f"{words}: {e}")]
    reason = f"{words}: {found:.1f} dB from eager's, at least {allowed:.9g} dB"
    return [judged("L2.run.psnr_db", found >= allowed, reason, value=found, limit=allowed)]


def _final(prefix: str, measured: Mapping[str, float], allowed: Mapping[str, float]) -> list[Check]:
    checks = []
    for name, limit in allowed.items():
        value, least = measured[name], name != "max_abs"
        unit = " dB" if name.endswith("_db") else ""
        shown = f"{value:.1f}{unit}" if unit else f"{value:.2g}" if not least else f"{value:.9g}"
        reason = f"{shown}, at {'least' if least else 'most'} {limit:.9g}{unit}"
        good = value >= limit if least else value <= limit
        checks.append(judged(f"{prefix}.{name}", good, reason, value=value, limit=limit))
    return checks


def loop_limits(golden: Golden, limits: LoopLimits, recipe: str) -> dict[str, float]:
    """What the final sample must reach, by measure."""
    floor, _ = floor_of(golden, recipe)
    slack = decibels(limits.floor_factor**2, 1)
    psnr, snr = limits.psnr_db, limits.snr_db
    if floor is not None and floor.stated and floor.psnr_db is not None:
        # What is stated is the error beside the value range; beside the sample's variance it is less by as much.
        psnr, snr = floor.psnr_db, snr + floor.psnr_db - psnr
    if floor is not None and floor.psnr_db is not None and floor.snr_db is not None:
        psnr, snr = min(psnr, floor.psnr_db - slack), min(snr, floor.snr_db - slack)
    return {
        "psnr_db": round(psnr, 3),
        "snr_db": round(snr, 3),
        "ssim": limits.ssim,
        "cosine": limits.cosine,
        "max_abs": limits.max_abs,
    }


def _divergence(name: str, series: LoopSeries) -> Check:
    found, last = series.divergence(), series.drift[-1]
    if found is None:
        reason = f"{last:.2e} at the end, and no step beyond what single evaluations explain"
        return Check(name=name, outcome=Outcome.NOTED, reason=reason, value=last, limit=series.explained[-1])
    where = "in the starting sample"
    if found["evaluation"] is not None:
        where = f"in evaluation {found['evaluation'] + 1} of {len(series.timesteps)} (timestep {found['timestep']:g})"
    reason = f"diverges {where}: drift {found['drift']:.2e}, explained {found['explained']:.2e}"
    return Check(name=name, outcome=Outcome.NOTED, reason=reason, value=found["drift"], limit=found["explained"])


def explained_drift(
    golden: Golden, limits: Limits, recipe: str, trajectory: Trajectory, drift: Sequence[float]
) -> Array:
    """(N + 1,) drift that the step before and one evaluation within L1's limits explain.

    Evaluation i enters the next latent with the table's coefficient b_(i+1)i. What earlier evaluations erred is in the
    drift before it, which the network and the sampler may enlarge by :data:`STEP_GROWTH`. The allowed error of the
    score becomes one of the output through ``score_gain``; between recorded timesteps it is interpolated.
    """
    recorded, table = golden.steps, trajectory.table
    allowed, _ = step_limits(golden, limits, recipe)
    order = np.argsort(recorded.timesteps)
    sizes = np.array([_rms(output) for output in recorded.outputs])
    errors = sizes * [_output_error(golden, table.prediction, k, float(a)) for k, a in enumerate(allowed)]
    w = trajectory.guidance_scale
    errors = errors * (1.0 if w == 1.0 else abs(w) + abs(1 - w))
    moves = np.abs(np.diagonal(table.outputs, -1))
    if table.clipped is not None:
        moves = moves + np.abs(np.diagonal(table.clipped, -1) * table.denoised_from_output)
    own = moves * np.interp(table.timesteps, recorded.timesteps[order], errors[order])
    latents = np.maximum([*(_rms(x) for x in trajectory.inputs), _rms(trajectory.final)], np.finfo(np.float64).tiny)
    before = STEP_GROWTH * np.asarray(drift[:-1]) * latents[:-1]
    return np.array([ROUNDING, *(ROUNDING + (before + own) / latents[1:])])


def _output_error(golden: Golden, prediction: Prediction, k: int, allowed: float) -> float:
    """The output's relative error that is an error ``allowed`` of the score; ``allowed`` itself where alpha is 0."""
    alpha, sigma = float(golden.steps.alphas[k]), float(golden.steps.sigmas[k])
    if alpha == 0:
        return allowed
    inputs, output = golden.steps.inputs[k], golden.steps.outputs[k]
    size = _rms(score(prediction, alpha, sigma, inputs, output))
    return float(allowed * size / (prediction.score_gain(alpha, sigma) * max(_rms(output), np.finfo(np.float64).tiny)))


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
