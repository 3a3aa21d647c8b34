"""The times of a flow model's own scheduler, for any number of steps and any size of the picture.

SD3 and FLUX shift their times towards noise, FLUX by as much as the picture has tokens, so a table that was traced at
export holds for one size only. What the scheduler does is a formula (Esser et al. 2024, arXiv:2403.03206, equation
23; ``lehr.runtime.schedules.Flow``), so its numbers travel instead, among a pipeline's options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import LinearFlow
from lehr.runtime.schedules import Flow
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import ModelSpec

Options = Mapping[str, bool | int | float | str]

_SHIFT, _END = "flow_shift", "flow_end"  # k, and the last time before the shift; 0 stands for one over the steps
_BASE_TOKENS, _MAX_TOKENS = "flow_base_tokens", "flow_max_tokens"
_BASE_SHIFT, _MAX_SHIFT = "flow_base_shift", "flow_max_shift"  # log k at that many tokens
_NEUTRAL = {  # options of the scheduler that would change its times in other ways -> what they must be
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def flow_options(scheduler: Mapping[str, Any], *, family: str) -> dict[str, bool | int | float | str]:
    """What a pipeline's options hold of its ``scheduler_config.json``; empty for any but a plain flow-match Euler.

    Args:
        scheduler: the configuration.
        family: of the pipeline; FLUX's gives its scheduler the times 1, 1 - 1/N, … itself.
    """
    plain = all(scheduler.get(name) in (neutral, None) for name, neutral in _NEUTRAL.items())
    if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or not plain:
        return {}
    smallest = 1 / int(scheduler.get("num_train_timesteps", 1000))
    given = family == "flux" and not scheduler.get("use_flow_sigmas")
    if scheduler.get("use_dynamic_shifting"):
        return {
            _END: 0.0 if given else smallest,
            _BASE_TOKENS: int(scheduler.get("base_image_seq_len", 256)),
            _MAX_TOKENS: int(scheduler.get("max_image_seq_len", 4096)),
            _BASE_SHIFT: float(scheduler.get("base_shift", 0.5)),
            _MAX_SHIFT: float(scheduler.get("max_shift", 1.15)),
        }
    shift = float(scheduler.get("shift", 1.0))
    # Left to itself the scheduler spaces its times down to the smallest one already shifted, and shifts them again.
    return {_SHIFT: shift, _END: 0.0 if given else shift * smallest / (1 + (shift - 1) * smallest)}


def own_table(model: ModelSpec, options: Options, tokens: int, num_inference_steps: int | None) -> SolverTable | None:
    """The table of the model's own flow scheduler; None where the options do not hold it.

    Args:
        model: the denoiser's spec.
        options: of its pipeline.
        tokens: of the picture, 2 x 2 latent cells each.
        num_inference_steps: None is the model's own number.

    Raises:
        InvalidInput: a number of steps that no schedule takes, or options that are no schedule.
    """
    if _END not in options or not isinstance(model.path, LinearFlow):
        return None
    end = _number(options, _END) or None
    if _SHIFT in options:
        flow = Flow(shift=_number(options, _SHIFT), end=end)
    else:
        base_shift, max_shift = _number(options, _BASE_SHIFT), _number(options, _MAX_SHIFT)
        base, largest = int(_number(options, _BASE_TOKENS)), int(_number(options, _MAX_TOKENS))
        if base >= largest:
            raise InvalidInput(f"{_BASE_TOKENS} must be below {_MAX_TOKENS}, got {base} and {largest}.")
        slope = (max_shift - base_shift) / (largest - base)
        flow = Flow(shift=math.exp(base_shift + slope * (tokens - base)), end=end)
    steps = model.sampling.num_inference_steps if num_inference_steps is None else num_inference_steps
    return solver_table("flow_euler", model.path, model.prediction, steps, spacing=flow)


def _number(options: Options, name: str) -> float:
    value = options.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInput(f"pipeline option {name!r} is {value!r}, expected a number; export the model again.")
    return float(value)
