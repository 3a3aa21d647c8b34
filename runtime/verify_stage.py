"""A stage's engine held against its golden data, by the denoiser's rules (:mod:`lehr.runtime.verify`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import recipe_of
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.parity import relative_error
from lehr.runtime.recipe import Recipe
from lehr.runtime.stage_golden import StageGolden, read_stage_golden
from lehr.runtime.stages import StageFunction, load_stage
from lehr.runtime.verify import FLOOR_FACTOR, FP32_REL_ERROR, Level, Verdict, precision_problem, value_problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far an engine may be off: ``factor`` times eager's own error in its format, and ``least`` in any case."""

    factor: float = FLOOR_FACTOR
    least: float = FP32_REL_ERROR


DEFAULT = Tolerance()


def verify_stage(bundle: Bundle, record: EngineRecord, tolerance: Tolerance = DEFAULT) -> Verdict:
    """Measure L0 and L1 of a stage's engine; a stage runs once, so there is no L2.

    Raises:
        BundleError: no golden data, damaged files, or an engine of another machine.
        UnknownName: a recipe that neither the stage was calibrated for nor Lehr knows.
        InvalidInput: an engine of the denoiser.
    """
    if record.stage is None:
        raise InvalidInput(f"{record.folder} is an engine of the denoiser, not of a stage.")
    golden = read_stage_golden(bundle, record.stage)
    unreached = Level(passed=None, reason="not reached: L0 failed")
    measures: dict[str, Any] = {"achieved_precision": dict(record.achieved_precision)}
    try:
        outputs = load_stage(bundle, record)(golden.inputs)
    except RunFailed as e:
        return Verdict(
            engine=record.folder,
            levels={"L0": Level(passed=False, reason=str(e), measures=measures), "L1": unreached},
        )
    problems = [f"{problem} in {name!r}" for name, value in outputs.items() if (problem := value_problem(value))]
    if wrong := precision_problem(record):
        problems.append(wrong)
    if problems:
        l0 = Level(passed=False, reason=problems[0], measures=measures)
        return Verdict(engine=record.folder, levels={"L0": l0, "L1": unreached})
    l0 = Level(passed=True, reason="shapes, finiteness and precision as specified", measures=measures)
    errors = {name: relative_error(golden.outputs[name], value) for name, value in outputs.items()}
    worst, limit = worst_output(errors, golden, recipe_of(bundle, record.recipe, record.stage), tolerance)
    return Verdict(
        engine=record.folder,
        levels={
            "L0": l0,
            "L1": Level(
                passed=errors[worst] <= limit,
                reason=f"{worst} {errors[worst]:.2e}, limit {limit:.2e}",
                measures={"max_rel_error": errors[worst], "limit": limit, "rel_error": errors},
            ),
        },
    )


def stage_errors(stage: StageFunction, golden: StageGolden) -> dict[str, float]:
    """The relative error of every output on the golden inputs; raises RunFailed."""
    outputs = stage(golden.inputs)
    return {name: relative_error(expected, outputs[name]) for name, expected in golden.outputs.items()}


def worst_output(
    errors: Mapping[str, float], golden: StageGolden, recipe: Recipe, tolerance: Tolerance = DEFAULT
) -> tuple[str, float]:
    """The output that is nearest to its limit or furthest beyond it, and that limit."""
    limits = {name: stage_limit(golden, recipe, name, tolerance) for name in errors}
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    return worst, limits[worst]


def stage_limit(golden: StageGolden, recipe: Recipe, output: str, tolerance: Tolerance = DEFAULT) -> float:
    """The largest relative error that an engine of ``recipe`` may show in one output.

    Where eager overflows in fp16, an engine keeps in fp32 what does, and may err as much as eager does in bf16. What a
    quantised recipe may lose it states itself: eager PyTorch has no such formats to measure.
    """
    if recipe.rel_error is not None:
        return recipe.rel_error
    floor = golden.floors.get(recipe.name)
    if floor is not None:
        return max(tolerance.factor * floor[output], tolerance.least)
    if recipe.name == "fp16" and "bf16" in golden.floors:
        return max(golden.floors["bf16"][output], tolerance.least)
    return tolerance.least
