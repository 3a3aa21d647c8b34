"""Schedulers that no solver table can hold, and why."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lehr.runtime.errors import InvalidInput, UnsupportedScheduler

_TOKENS = "it works on discrete tokens, and a table on continuous samples"
_NORM = "its step size depends on the norm of the network's output, which is not linear"
REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "ScoreSdeVeScheduler": f"{_NORM}; use the sampler predictor_corrector, whose step sizes are fixed beforehand",
    "ScoreSdeVpScheduler": "it has no step(), only step_pred(); use the sampler euler_maruyama",
    "KarrasVeScheduler": "it perturbs the sample outside of step(); use the sampler edm_stochastic, the same method",
    "RePaintScheduler": "it goes back in time and mixes in a picture; inpaint with another sampler and a mask",
    "PiflowScheduler": "its network returns a grid of velocities per evaluation, and integrates them inside step()",
    "HeliosDMDScheduler": "its step() needs noise and schedules that only its own pipeline has",
    "RFD4ProteinaScheduler": "its step() masks residues, which is not one number per sample",
}

PLAIN = {"self", "model_output", "timestep", "sample"}
HANDLED = {"generator", "return_dict", "variance_noise", "pred_original_sample", "per_token_timesteps"}
WITHIN_STEP = {
    "UnCLIPScheduler": {"prev_timestep"},
    "CogVideoXDPMScheduler": {"old_pred_original_sample", "timestep_back"},
}


def is_a(scheduler: Any, name: str) -> bool:
    """Whether the scheduler's class, or one that it is derived from, has this name."""
    return any(parent.__name__ == name for parent in type(scheduler).__mro__)


def within_step(scheduler: Any) -> set[str]:
    """Arguments of ``step`` that the run fills in as the scheduler's own pipeline does."""
    return set().union(*(names for name, names in WITHIN_STEP.items() if is_a(scheduler, name)))


def check_supported(scheduler: Any) -> None:
    """Refuse what is known not to be a table.

    Raises:
        InvalidInput: this is no scheduler.
        UnsupportedScheduler: it is one that a table cannot hold; the message says why.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "config"):
        raise InvalidInput(f"expected a diffusers scheduler, got {name}; load one with load_scheduler(folder).")
    for refused, reason in REFUSED.items():
        if is_a(scheduler, refused):
            raise UnsupportedScheduler(f"{name} cannot become a solver table: {reason}.")
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        raise UnsupportedScheduler(f"{name} has no step() and set_timesteps(), so it cannot be run on basis vectors.")
    needs = [
        p.name for p in step_parameters(scheduler).values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    unknown = sorted(set(needs) - PLAIN - within_step(scheduler))
    if unknown:
        raise UnsupportedScheduler(f"{name} cannot become a solver table: its step() also needs {', '.join(unknown)}.")
    if getattr(scheduler, "_scale_factors", None):
        raise UnsupportedScheduler(
            f"{name} with scale_factors resizes the sample between steps; set scale_factors=None."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of diffusers' own code: dividing by a last sigma of 0, calling numpy as of old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def step_parameters(scheduler: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of ``scheduler.step``."""
    return inspect.signature(scheduler.step).parameters


def settings(scheduler: Any) -> str:
    """The options of a scheduler that are not its defaults, for messages."""
    defaults = {p.name: p.default for p in inspect.signature(type(scheduler).__init__).parameters.values()}
    changed = []
    for key, value in scheduler.config.items():
        if not key.startswith("_") and key in defaults and repr(value) != repr(defaults[key]):
            text = repr(value)
            changed.append(f"{key}={text if len(text) <= 60 else text[:57] + '...'}")
    return f"{type(scheduler).__name__}({', '.join(changed)})"
