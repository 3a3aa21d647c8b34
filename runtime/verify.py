"""``lehr verify``: hold an engine against the golden data in its bundle, without PyTorch.

Tolerances come from the model's own noise floor: how far eager moves when it is run in another format. An engine
in the format f may err ``FLOOR_FACTOR`` times as much as eager does in f; for fp32, whose eager error against
fp64 is tiny, absolute limits hold the rule away from zero. Eager has no quantised formats: their recipes state the loss
that they are allowed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import STEP, EngineRecord
from lehr.runtime.errors import RunFailed
from lehr.runtime.golden import Golden, Trajectory, read
from lehr.runtime.guidance import classifier_free
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.loop import Step, sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.parity import compare, relative_error, score
from lehr.runtime.prediction import Prediction

Array = npt.NDArray[Any]

FLOOR_FACTOR = 10.0  # another summation order costs about as much as eager's own rounding; a wrong weight far more
FP32_REL_ERROR = 1e-4  # of the score, where eager's own floor is smaller still
FP32_PSNR_DB = 60.0  # final sample; a fp32 engine that is further off computes something else


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One rung. ``passed`` None: not judged, and ``reason`` says why."""

    passed: bool | None
    reason: str
    measures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "reason": self.reason, **self.measures}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All rungs of one engine, of a stage L0 and L1. It passes only if those pass and nothing that was judged fails."""

    engine: str
    levels: Mapping[str, Level]

    @property
    def passed(self) -> bool:
        judged = {name: level.passed for name, level in self.levels.items()}
        return judged["L0"] is True and judged["L1"] is True and judged.get("L2") is not False

    def to_json(self) -> dict[str, Any]:
        levels = {name: level.to_json() for name, level in self.levels.items()}
        return {"passed": self.passed, "engine": self.engine, "levels": levels}


def verify(bundle: Bundle, record: EngineRecord) -> Verdict:
    """Measure L0 to L2.

    Raises:
        BundleError: no golden data, damaged files, or an engine of another machine.
    """
    golden = read(bundle)
    denoiser = load_denoiser(bundle, record)
    prepare(denoiser, golden)
    l0 = _structure(denoiser, record, golden)
    if not l0.passed:
        unreached = Level(passed=None, reason="not reached: L0 failed")
        return Verdict(engine=record.folder, levels={"L0": l0, "L1": unreached, "L2": unreached})
    return Verdict(
        engine=record.folder,
        levels={"L0": l0, "L1": _steps(denoiser, record, golden), "L2": _trajectories(denoiser, record, golden)},
    )


# ------------------------------------------------------------------------------------------------- measuring


def prepare(denoiser: Denoiser, golden: Golden) -> None:
    """Say which evaluations all of the golden data asks for.

    Said once for everything that follows, or the graphs of the two phases would take turns in memory.
    """
    timesteps = [*golden.steps.timesteps, *(t for loop in golden.trajectories for t in loop.table.timesteps)]
    sets = [golden.steps.conditions]
    for loop in golden.trajectories:
        sets += [loop.conditions, {**loop.conditions, **loop.unconditional}]
    denoiser.prepare(timesteps, golden.steps.inputs.shape[2:], sets)


def step_outputs(denoiser: Denoiser, golden: Golden) -> Iterator[Array]:
    """The engine's prediction on every recorded input, in the order of the recorded timesteps.

    Raises:
        RunFailed: the engine failed, or returned another shape than the spec's.
    """
    steps = golden.steps
    for inputs, timestep in zip(steps.inputs, steps.timesteps, strict=True):
        yield denoiser(inputs, float(timestep), steps.conditions)


def score_error(prediction: Prediction, golden: Golden, k: int, output: Array) -> float:
    """The score's relative error at recorded timestep ``k``; where alpha is 0, the output's if that is larger."""
    steps, alpha, sigma = golden.steps, float(golden.steps.alphas[k]), float(golden.steps.sigmas[k])
    reference = score(prediction, alpha, sigma, steps.inputs[k], steps.outputs[k])
    error = relative_error(reference, score(prediction, alpha, sigma, steps.inputs[k], output))
    return max(error, relative_error(steps.outputs[k], output) if alpha == 0 else 0.0)


def step_errors(denoiser: Denoiser, golden: Golden) -> list[float]:
    """:func:`score_error` at every recorded timestep."""
    outputs = step_outputs(denoiser, golden)
    return [score_error(denoiser.spec.prediction, golden, k, output) for k, output in enumerate(outputs)]


def replay(denoiser: Denoiser, trajectory: Trajectory) -> tuple[Array, list[float]]:
    """Run a recorded loop; return the final sample and the relative drift of every evaluation's input.

    On a GPU the drift comes from a loop on the host, and the sample from the loop that a pipeline runs, on the device.
    """
    network = classifier_free(denoiser, trajectory.conditions, trajectory.unconditional, trajectory.guidance_scale)
    drift: list[float] = []

    def on_step(step: Step) -> None:
        drift.append(relative_error(trajectory.inputs[step.index], step.sample))

    with denoiser.loop(trajectory.table.timesteps):
        final = sample(network, trajectory.table, trajectory.x_T, on_step=on_step)
    resident, table = denoiser.resident, trajectory.table
    if resident is not None and resident.runs(table):
        guided = trajectory.guidance_scale != 1.0
        final = resident.draw(
            table,
            trajectory.x_T,
            trajectory.conditions,
            trajectory.unconditional if guided else None,
            np.full(len(table), trajectory.guidance_scale) if guided else None,
            injected=lambda j: batch_normal(0, range(len(final)), final.shape[1:], stream=1 + j),
        )
    return final, drift


def value_problem(output: Array) -> str | None:
    """What no prediction can be: not finite, or one constant; None for one that is neither."""
    if not np.all(np.isfinite(output)):
        return "the engine returned values that are not finite"
    return "the engine returned one constant value" if np.ptp(output) == 0 else None


def precision_problem(record: EngineRecord) -> str | None:
    """How what the engine computes in differs from its recipe; None if it does not."""
    for plan, recipe in record.recipes.items():
        found = record.plans[plan].achieved_precision
        if recipe == "fp32" and set(found) - {"float", "double"}:
            where = "the engine" if plan == STEP else f"its {plan.partition('.')[2]} steps"
            return f"recipe fp32 but {where} computes in {sorted(found)}"
    return None


# ------------------------------------------------------------------------------------------------- the rungs


def _structure(denoiser: Denoiser, record: EngineRecord, golden: Golden) -> Level:
    """L0: signature and shapes as the spec says, outputs finite and not constant, precision as the recipe says."""
    steps = golden.steps
    measures: dict[str, Any] = {"achieved_precision": dict(record.achieved_precision)}
    if record.ends is not None:
        measures["ends"] = {plan: dict(record.plans[plan].achieved_precision) for plan in list(record.recipes)[1:]}
    try:
        output = denoiser(steps.inputs[0], float(steps.timesteps[0]), steps.conditions)
    except RunFailed as e:
        return Level(passed=False, reason=str(e), measures=measures)
    if problem := value_problem(output) or precision_problem(record):
        return Level(passed=False, reason=problem, measures=measures)
    return Level(passed=True, reason="shapes, finiteness and precision as specified", measures=measures)


def _steps(denoiser: Denoiser, record: EngineRecord, golden: Golden) -> Level:
    """L1: one evaluation at several timesteps."""
    steps, errors = golden.steps, step_errors(denoiser, golden)
    limit, worst = rel_error_limit(golden, record.recipe), max(errors)
    at = f"at timestep {steps.timesteps[int(np.argmax(errors))]:g}"
    return Level(
        passed=worst <= limit,
        reason=f"score error {worst:.2e} {at}, limit {limit:.2e}",
        measures={"max_rel_error": worst, "limit": limit, "rel_error": errors, "timesteps": steps.timesteps.tolist()},
    )


def _trajectories(denoiser: Denoiser, record: EngineRecord, golden: Golden) -> Level:
    """L2: whole loops on the recorded noise; the worst case of each measure, and the drift of each step."""
    if not golden.trajectories:
        return Level(passed=None, reason=f"golden data of tier {golden.tier.value!r} holds no loops")
    limit = psnr_limit(golden, record.recipe)
    cases = {}
    for trajectory in golden.trajectories:
        final, drift = replay(denoiser, trajectory)
        parity = compare(trajectory.final, final, denoiser.spec.value_range)
        cases[trajectory.name] = {**asdict(parity), "drift": drift}
    worst = min(cases, key=lambda name: float(cases[name]["psnr_db"]))
    measures = {key: value for key, value in cases[worst].items() if key != "drift"}
    return Level(
        passed=bool(measures["psnr_db"] >= limit),
        reason=f"final sample {measures['psnr_db']:.1f} dB ({worst}), limit {limit:.1f} dB",
        measures={**measures, "limit_psnr_db": limit, "cases": cases},
    )


# ------------------------------------------------------------------------------------------------- tolerances


def rel_error_limit(golden: Golden, recipe: str) -> float:
    """The largest score error an engine of ``recipe`` may show."""
    floor = golden.floors.get("fp64" if recipe == "fp32" else recipe)
    factor = 1.0 if floor is not None and floor.stated else FLOOR_FACTOR
    own = factor * max(floor.rel_error) if floor and floor.rel_error else 0.0
    return max(own, FP32_REL_ERROR)


def psnr_limit(golden: Golden, recipe: str) -> float:
    """The smallest PSNR of the final sample an engine of ``recipe`` may show, in dB."""
    floor = golden.floors.get("fp64" if recipe == "fp32" else recipe)
    if floor is None or floor.psnr_db is None:
        return FP32_PSNR_DB
    return min(FP32_PSNR_DB, floor.psnr_db - (0.0 if floor.stated else 20 * float(np.log10(FLOOR_FACTOR))))


def record_parity(bundle: Bundle, verdict: Verdict) -> None:
    """Keep the measured parity in the manifest; a bundle that cannot be written to stays as it is."""
    short = {
        name: {key: value for key, value in level.to_json().items() if not isinstance(value, (list, dict))}
        for name, level in verdict.levels.items()
    }
    if not os.access(bundle.root, os.W_OK):
        return
    with bundle.edit() as edit:
        edit.set_manifest(parity={**bundle.manifest.parity, verdict.engine: {"passed": verdict.passed, **short}})
