"""Setting a scheduler's timesteps, and checking the arguments for it."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from lehr.export.schedulers.refusals import HANDLED, PLAIN, quiet, settings, step_parameters, within_step
from lehr.runtime.errors import InvalidInput, UnsupportedScheduler
from lehr.runtime.solver_table import MAX_EVALUATIONS

_OWN = {"num_inference_steps", "device", "timesteps", "sigmas", "mu"}


def prepare(
    scheduler: Any,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
    options: Mapping[str, Any],
) -> Any:
    """A copy of the scheduler with its timesteps set.

    Raises:
        InvalidInput: no schedule was asked for, two that disagree, or one that the scheduler does not take.
        UnsupportedScheduler: the schedule is broken in diffusers itself.
    """
    name = settings(scheduler)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    arguments: dict[str, Any] = dict(options)
    _check_known(name, "set_timesteps", options, set(accepted) - _OWN)
    given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    for key, value in given.items():
        if value is None:
            continue
        if key not in accepted:
            raise InvalidInput(f"{name} takes no {key}; its set_timesteps takes {', '.join(accepted)}.")
        arguments[key] = value if key == "mu" else list(value)  # type: ignore[arg-type]
    if bool(scheduler.config.get("use_dynamic_shifting")) and mu is None and "mu" in accepted:
        raise InvalidInput(
            f"{name} shifts its schedule with the picture's size, so mu must be given; "
            "dynamic_shift(scheduler, image_seq_len) computes it."
        )
    _check_count(name, num_inference_steps, timesteps, sigmas)
    if not (timesteps or sigmas):
        arguments["num_inference_steps"] = num_inference_steps
    elif accepted["num_inference_steps"].default is inspect.Parameter.empty:
        arguments["num_inference_steps"] = num_inference_steps or len(timesteps or sigmas or ()) - 1
    work = copy.deepcopy(scheduler)
    try:
        with quiet():
            work.set_timesteps(**arguments)
    except (AssertionError, TypeError, ValueError) as e:
        raise InvalidInput(f"{name} refuses this schedule: {e or type(e).__name__}") from e
    except (ArithmeticError, AttributeError, LookupError, RuntimeError) as e:
        raise UnsupportedScheduler(
            f"{name} fails in diffusers itself when its timesteps are set: {type(e).__name__}: {e}. "
            "Use another number of steps or another option."
        ) from e
    if not 1 <= len(work.timesteps) <= MAX_EVALUATIONS:
        raise InvalidInput(f"{name} has {len(work.timesteps)} timesteps here, expected 1 to {MAX_EVALUATIONS}.")
    return work


def _check_count(
    name: str, num_inference_steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> None:
    own = timesteps if timesteps is not None else sigmas
    if own is not None and len(own) == 0:
        raise InvalidInput(f"the schedule given for {name} is empty.")
    levels = [float(sigma) for sigma in sigmas or ()]
    if not all(math.isfinite(sigma) and sigma >= 0 for sigma in levels) or any(
        after >= before for before, after in itertools.pairwise(levels)
    ):
        raise InvalidInput(f"sigmas must be finite, not negative and strictly decreasing, got {levels}.")
    if num_inference_steps is None:
        if own is None:
            raise InvalidInput(f"how many steps? Give num_inference_steps, timesteps or sigmas for {name}.")
        return
    whole = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
    if not (whole and 1 <= num_inference_steps <= MAX_EVALUATIONS):
        raise InvalidInput(f"the number of steps must be 1 to {MAX_EVALUATIONS}, got {num_inference_steps}.")
    if own is not None and len(own) not in {num_inference_steps, num_inference_steps + 1}:
        raise InvalidInput(
            f"{num_inference_steps} steps were asked for, but the schedule given has {len(own)} entries."
        )


def _check_known(name: str, method: str, options: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise InvalidInput(
            f"{name}: {method} has no option {unknown[0]!r}; "
            f"it has {', '.join(sorted(known)) or 'none beside the usual'}."
        )
    for key, value in options.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise InvalidInput(f"{name}: option {key!r} must be a number, a string or a boolean, got {value!r}.")


def step_arguments(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments of ``step``.

    Raises:
        InvalidInput: ``step`` has no such argument, or it is one that the loop provides.
    """
    ours = PLAIN | HANDLED | within_step(scheduler)
    _check_known(settings(scheduler), "step", options, set(step_parameters(scheduler)) - ours)
    return dict(options)


def describe_options(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
    schedule_options: Mapping[str, Any] | None,
    step_options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """How the table was made, as JSON: the scheduler's whole configuration and the arguments."""
    given = {
        "timesteps": None if timesteps is None else [float(t) for t in timesteps],
        "sigmas": None if sigmas is None else [float(s) for s in sigmas],
        "mu": mu,
        "schedule_options": dict(schedule_options or {}) or None,
        "step_options": dict(step_options or {}) or None,
    }
    return {
        "num_inference_steps": num_inference_steps,
        "config": {"_class_name": type(scheduler).__name__}
        | {k: _json(v) for k, v in scheduler.config.items() if k[0] != "_"},
        **{key: _json(value) for key, value in given.items() if value is not None},
    }


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if hasattr(value, "tolist"):
        return _json(value.tolist())
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return getattr(value, "__qualname__", type(value).__name__)


def dynamic_shift(scheduler: Any, image_seq_len: int) -> float:
    """``mu`` of a flow scheduler with ``use_dynamic_shifting``: linear in the number of image tokens (FLUX).

    Raises:
        InvalidInput: the scheduler has no such options, or the number is not positive.
    """
    config = scheduler.config
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    if any(config.get(name) is None for name in names):
        raise InvalidInput(f"{settings(scheduler)} has no {', '.join(names)}; give mu itself.")
    if image_seq_len < 1:
        raise InvalidInput(f"the number of image tokens must be positive, got {image_seq_len}.")
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (image_seq_len - config.base_image_seq_len))
