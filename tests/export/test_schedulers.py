"""Traced tables against the diffusers schedulers themselves, with a network in the loop that is not linear."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import os
import platform
import random
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
schedulers = importlib.import_module("diffusers.schedulers")

from lehr.export.schedulers import trace_scheduler  # noqa: E402 - after the skips
from lehr.runtime import host  # noqa: E402
from lehr.runtime.errors import LehrError  # noqa: E402
from lehr.runtime.loop import Step, sample  # noqa: E402
from lehr.runtime.solver_table import SolverTable  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers deprecates its own options
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # division by a final sigma of 0
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning"),
]

SHAPE = (2, 3, 4, 5)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "scheduler_grid.json"


# ------------------------------------------------------------------------------------------- running diffusers


def network(x: np.ndarray, timestep: float, extra: bool) -> np.ndarray:
    """Not linear, with neighbours and channels coupled, in the dtype of its input.

    Gentle, because a steep network tells how schedulers amplify rounding, not whether two of them are equal.
    """
    one = x.dtype.type
    phase = one((0.37 * timestep + 0.2) % 6.28)
    output = one(0.8) * np.tanh(one(0.4) * x + one(0.2) * np.roll(x, 1, axis=-1))
    output += one(0.5) * np.sin(one(0.3) * x[:, ::-1] + phase)
    return np.concatenate([output, one(0.5) + one(0.4) * np.tanh(x)], axis=1) if extra else output


class Brownian:
    """Noise over overlapping intervals from independent pieces, numbered as they are needed, noisiest first."""

    def __init__(self, noises: list[np.ndarray] | None) -> None:
        self.noises, self.asked, self.pieces = noises, [], {}

    def __call__(self, sigma: Any, sigma_next: Any) -> Any:
        low, high = sorted((float(sigma), float(sigma_next)))
        self.asked.append((low, high))
        if self.noises is None:
            return torch.zeros(SHAPE)
        parts = [(b - a, self.noises[k]) for (a, b), k in self.pieces.items() if low <= a and b <= high]
        return torch.from_numpy(sum(np.sqrt(length / (high - low)).astype(z.dtype) * z for length, z in parts))

    def known(self, other: Brownian) -> Brownian:
        ends = sorted({end for interval in other.asked for end in interval})
        for low, high in other.asked:
            for piece in sorted(itertools.pairwise(ends), reverse=True):
                if low <= piece[0] and piece[1] <= high:
                    self.pieces.setdefault(piece, len(self.pieces))
        return self


@contextmanager
def noise_from(scheduler: Any, noises: list[np.ndarray]) -> Iterator[None]:
    """``randn_tensor`` of the scheduler's module returns the noises in turn."""
    modules = [importlib.import_module(kind.__module__) for kind in type(scheduler).__mro__[:-1]]
    modules = [module for module in modules if hasattr(module, "randn_tensor")]
    before = [module.randn_tensor for module in modules]
    queue = iter(noises)

    def randn_tensor(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Any:
        noise = torch.from_numpy(next(queue)).to(dtype or torch.float32)
        return noise if noise.shape == tuple(shape) else torch.zeros(shape, dtype=noise.dtype)

    for module in modules:
        module.randn_tensor = randn_tensor
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.randn_tensor = original


def run_diffusers(
    prepared: Any, x_T: np.ndarray, noises: list[np.ndarray], step_options: dict[str, Any], extra: bool
) -> np.ndarray:
    """The scheduler's own loop, as its pipeline has it."""
    scheduler = copy.deepcopy(prepared)
    name = type(scheduler).__name__
    if hasattr(scheduler, "noise_sampler"):
        counting = copy.deepcopy(prepared)
        counting.noise_sampler = Brownian(None)
        _loop(counting, name, x_T, step_options, extra)
        scheduler.noise_sampler = Brownian(noises).known(counting.noise_sampler)
    with noise_from(scheduler, noises):
        return _loop(scheduler, name, x_T, step_options, extra)


def _loop(scheduler: Any, name: str, x_T: np.ndarray, step_options: dict[str, Any], extra: bool) -> np.ndarray:
    x, before = torch.from_numpy(x_T), None
    timesteps = scheduler.timesteps[:-1] if name in {"SCMScheduler", "DDPMWuerstchenScheduler"} else scheduler.timesteps
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            ratio = t.expand(len(x)) if name == "DDPMWuerstchenScheduler" else t
            model_input = scheduler.scale_model_input(x, ratio) if hasattr(scheduler, "scale_model_input") else x
            output = torch.from_numpy(network(model_input.numpy(), float(t), extra))
            more = dict(step_options)
            if name == "UnCLIPScheduler":
                more["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
            if name == "CogVideoXDPMScheduler":
                result = scheduler.step(output, before, t, timesteps[i - 1] if i else None, x, return_dict=False)
                before = result[1]
            else:
                result = scheduler.step(output, ratio, x, return_dict=False, **more)
            x = result[0].to(torch.from_numpy(x_T).dtype)
    return x.numpy()


# -------------------------------------------------------------------------------------------- one configuration


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scheduler's options, its schedule, and the further arguments of ``step``."""

    name: str
    options: dict[str, Any]
    steps: int
    schedule: dict[str, Any] = field(default_factory=dict)
    step_options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = {**self.options, **self.schedule, **self.step_options}
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in parts.items())}) at {self.steps} steps"

    def make(self) -> Any:
        options = {
            key: FUNCTIONS.get(value, value) if key == "tau_func" else value for key, value in self.options.items()
        }
        return scheduler_class(self.name)(**options)

    def trace(self, scheduler: Any) -> SolverTable:
        own = {key: self.schedule[key] for key in ("timesteps", "sigmas", "mu") if key in self.schedule}
        rest = {key: value for key, value in self.schedule.items() if key not in own}
        steps = None if "timesteps" in own or "sigmas" in own else self.steps
        return trace_scheduler(scheduler, steps, **own, schedule_options=rest, step_options=self.step_options)

    def prepared(self, scheduler: Any) -> Any:
        scheduler = copy.deepcopy(scheduler)
        own = "timesteps" in self.schedule or "sigmas" in self.schedule
        scheduler.set_timesteps(**({} if own else {"num_inference_steps": self.steps}), **self.schedule)
        return scheduler


FUNCTIONS = {"always": lambda t: 1.0, "late": lambda t: 0.6 if t < 500 else 0.0}


def scheduler_class(name: str) -> Any:
    """A class of diffusers, also where the package that it was written with is not installed."""
    try:
        importlib.import_module("torchsde")
    except ImportError:
        if name in {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}:
            sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # only its noise, replaced here, needs it
            importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    if name == "DPMSolverSDEScheduler":
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    if name == "CosineDPMSolverMultistepScheduler":
        module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
        return module.CosineDPMSolverMultistepScheduler
    return getattr(schedulers, name)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-30))


@dataclass(frozen=True)
class Outcome:
    kind: str  # equal, refused, invalid, different
    detail: str = ""
    error: float = 0.0
    error_64: float = 0.0
    gap: float = 0.0

    @property
    def share(self) -> float:
        """The larger error as a share of what is allowed."""
        return max(self.error, self.error_64) / max(2e-6, 2 * self.gap)


def compare(case: Case) -> Outcome:
    """Trace a configuration, and run the table and the scheduler on the same noise in both precisions."""
    try:
        scheduler = case.make()
    except (NotImplementedError, ValueError) as e:
        return Outcome("invalid", str(e))
    table: SolverTable | None = None
    reason = ""
    try:
        table = case.trace(scheduler)
    except LehrError as e:
        reason = str(e)
    generator = np.random.default_rng(7)
    noise = generator.standard_normal(SHAPE)
    drawn = [generator.standard_normal(SHAPE) for _ in range(2 * 60 if table is None else table.num_noises)]
    extra = table.variance is not None if table is not None else "learned" in str(case.options.get("variance_type"))
    results: dict[Any, np.ndarray] = {}
    try:
        prepared = case.prepared(scheduler)
        scale = float(getattr(prepared, "init_noise_sigma", 1.0))
        for kind in (np.float32, np.float64):
            x_T = (noise * scale).astype(kind)
            results[kind] = run_diffusers(prepared, x_T, [z.astype(kind) for z in drawn], case.step_options, extra)
    except BREAKS as e:
        if table is None:
            return Outcome("refused", f"{type(e).__name__} in diffusers: {reason}")
        return Outcome("different", f"traced, but diffusers raises {type(e).__name__}: {e}")
    if not all(np.all(np.isfinite(result)) for result in results.values()):
        return Outcome("refused" if table is None else "different", f"not finite in diffusers: {reason}")
    if table is None:
        kind = "different" if any(result.any() for result in results.values()) else "refused"
        return Outcome(kind, f"refused, but diffusers runs it: {reason}")
    gap = relative(results[np.float32], results[np.float64])
    errors = []
    for kind in (np.float32, np.float64):
        x_T = (noise * scale).astype(kind)
        injected = [z.astype(kind) for z in drawn]
        actual = sample(lambda x, t: network(x, t, extra), table, x_T, injected=injected)
        errors.append(relative(actual, results[kind]))
    outcome = Outcome("equal", table.describe(), *errors, gap)
    return outcome if outcome.share <= 1 else replace(outcome, kind="different")


BREAKS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


# ----------------------------------------------------------------------------------------------------- the grid

# fmt: off
BETAS = {"beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"]}
SPACINGS = {"timestep_spacing": ["linspace", "leading", "trailing"], "steps_offset": [0, 1]}
TWO = {"prediction_type": ["epsilon", "v_prediction"]}
THREE = {"prediction_type": ["epsilon", "sample", "v_prediction"]}
FOUR = {"prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"]}
SIGMAS = {"sigmas": ["", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]}
THRESHOLD = {"thresholding": [False, True], "sample_max_value": [1.0, 2.5], "dynamic_thresholding_ratio": [0.995, 0.8]}
CLIP = {"clip_sample": [True, False], "clip_sample_range": [1.0, 0.7]}
NO_CLIP = {"clip_sample": [False, True], "clip_sample_range": [1.0, 0.7]}
ZERO = {"rescale_betas_zero_snr": [False, True]}
LAST = {"final_sigmas_type": ["zero", "sigma_min"]}
FLOW_SIGMAS = {"use_flow_sigmas": [False, True], "flow_shift": [1.0, 3.0]}
LOWER = {"lower_order_final": [True, False]}
SECOND = {"solver_order": [2, 1, 3], "solver_type": ["midpoint", "heun"], **LOWER}
ALPHA = {"set_alpha_to_one": [True, False]}
EULER = {"euler_at_final": [False, True]}
CUT = {"lambda_min_clipped": [-float("inf"), -5.1]}
VARIANCE = {"variance_type": [None, "learned_range"]}
EDM = {**TWO, "sigma_schedule": ["karras", "exponential"], **LAST}
STEPS = [1, 2, 3, 4, 5, 7, 10, 20, 33, 50]
DDPM = {
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    **THREE, **CLIP, **THRESHOLD, **BETAS, **SPACINGS, **ZERO,
}
DDIM = {
    **THREE, **CLIP, **THRESHOLD, **BETAS, **SPACINGS, **ZERO, **ALPHA, "eta": [0.0, 0.5, 1.0],
    "use_clipped_model_output": [False, True],
}
CONSISTENCY = {
    **THREE, **NO_CLIP, **THRESHOLD, **BETAS, **ZERO, **ALPHA, "original_inference_steps": [50, 100],
    "timestep_scaling": [10.0, 3.0],
}
FLOW = {
    "shift": [1.0, 3.0], "mu": [None, 0.9], "shift_terminal": [None, 0.1], **SIGMAS, "invert_sigmas": [False, True],
    "time_shift_type": ["exponential", "linear"], "sigmas_given": [None, "linear"],
}
COG = {
    **THREE, **BETAS, **ZERO, **ALPHA, "snr_shift_scale": [3.0, 1.0],
    "timestep_spacing": ["leading", "linspace", "trailing"],
}
INVERSE = {
    "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"], **FOUR, **SECOND, **SIGMAS,
    **FLOW_SIGMAS, **THRESHOLD, **BETAS, **VARIANCE,
}
AXES: dict[str, dict[str, list[Any]]] = {
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDIMInverseScheduler": {**THREE, **CLIP, **BETAS, "timestep_spacing": ["leading", "trailing"], **ALPHA},
    "CogVideoXDDIMScheduler": COG,
    "CogVideoXDPMScheduler": COG,
    "PNDMScheduler": {
        **TWO, "skip_prk_steps": [False, True], "set_alpha_to_one": [False, True], **BETAS,
        "timestep_spacing": ["leading", "linspace", "trailing"], "steps_offset": [0, 1],
    },
    "IPNDMScheduler": {},
    "EulerDiscreteScheduler": {
        **THREE, **SIGMAS, **SPACINGS, **BETAS, **LAST, **ZERO, "interpolation_type": ["linear", "log_linear"],
        "timestep_type": ["discrete", "continuous"], "s_churn": [0.0, 3.0], "s_noise": [1.0, 1.01],
        "sigmas_given": [None, "align your steps"],
    },
    "EulerAncestralDiscreteScheduler": {**TWO, **SPACINGS, **BETAS, **ZERO},
    "HeunDiscreteScheduler": {
        **THREE, **SIGMAS, **SPACINGS, "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "exp"],
        **NO_CLIP,
    },
    "LMSDiscreteScheduler": {**THREE, **SIGMAS, **SPACINGS, **BETAS, "order": [4, 2]},
    "KDPM2DiscreteScheduler": {**THREE, **SIGMAS, **SPACINGS, **BETAS},
    "KDPM2AncestralDiscreteScheduler": {**THREE, **SIGMAS, **SPACINGS, **BETAS},
    "DPMSolverSDEScheduler": {**TWO, **SIGMAS, **SPACINGS, **BETAS, "s_noise": [1.0, 0.9]},
    "DPMSolverMultistepScheduler": {
        **INVERSE, **LAST, **SPACINGS, **ZERO, **EULER, **CUT, "sigmas": [*SIGMAS["sigmas"], "use_lu_lambdas"],
        "timesteps_given": [None, "descending"],
    },
    "DPMSolverMultistepInverseScheduler": {**INVERSE, **SPACINGS, **EULER},
    "DPMSolverSinglestepScheduler": {**INVERSE, **LAST, **CUT},
    "DEISMultistepScheduler": {
        **FOUR, "solver_order": [2, 1, 3], **LOWER, **SIGMAS, **FLOW_SIGMAS, **THRESHOLD, **BETAS, **SPACINGS,
    },
    "UniPCMultistepScheduler": {
        **FOUR, "solver_order": [2, 1, 3, 4], "predict_x0": [True, False], "solver_type": ["bh2", "bh1"], **LOWER,
        "disable_corrector": [[], [0, 1]], **SIGMAS, **FLOW_SIGMAS, **LAST, **THRESHOLD, **BETAS, **SPACINGS, **ZERO,
    },
    "SASolverScheduler": {
        **FOUR, "predictor_order": [2, 1, 3, 4], "corrector_order": [2, 1, 3, 4],
        "algorithm_type": ["data_prediction", "noise_prediction"], "tau_func": [None, "always", "late"], **LOWER,
        **SIGMAS, **FLOW_SIGMAS, **THRESHOLD, **BETAS, **SPACINGS, **VARIANCE,
    },
    "LCMScheduler": CONSISTENCY,
    "TCDScheduler": {**CONSISTENCY, "eta": [0.3, 0.0, 1.0]},
    "UnCLIPScheduler": {
        "prediction_type": ["epsilon", "sample"], "variance_type": ["fixed_small_log", "learned_range"], **CLIP,
    },
    "DDPMWuerstchenScheduler": {"scaler": [1.0, 2.0, 0.5]},
    "SCMScheduler": {"sigma_data": [0.5, 1.0], "intermediate_timesteps": [None], "max_timesteps": [1.5708, 1.4]},
    "CMStochasticIterativeScheduler": {
        "num_train_timesteps": [40, 201], "clip_denoised": [True, False], "s_noise": [1.0, 0.9],
        "sigma_data": [0.5, 1.0],
    },
    "ConsistencyDecoderScheduler": {"sigma_data": [0.5, 1.0]},
    "EDMEulerScheduler": {**EDM, "sigma_data": [0.5, 1.0], "s_churn": [0.0, 5.0]},
    "EDMDPMSolverMultistepScheduler": {
        **EDM, **SECOND, "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"], **EULER, **THRESHOLD,
    },
    "CosineDPMSolverMultistepScheduler": {
        **EDM, "solver_order": [2, 1], "solver_type": ["midpoint", "heun"], **LOWER, **EULER,
    },
    "FlowMatchEulerDiscreteScheduler": {**FLOW, "stochastic_sampling": [False, True]},
    "FlowMatchHeunDiscreteScheduler": {"shift": [1.0, 3.0], "s_churn": [0.0, 4.0]},
    "FlowMatchLCMScheduler": FLOW,
    "FlowMapEulerDiscreteScheduler": {"shift": [1.0, 5.0]},
    "LTXEulerAncestralRFScheduler": {"eta": [1.0, 0.5, 0.0], "s_noise": [1.0, 0.9]},
    "MiniMaxH3Scheduler": {"shift": [12.0, 3.0]},
    "HeliosScheduler": {
        "stages": [1], "scheduler_type": ["unipc", "euler"], "shift": [1.0, 3.0], "solver_order": [2, 3],
        "solver_type": ["bh2", "bh1"],
    },
}
# fmt: on
IN_STEP = {
    "DDIMScheduler": {"eta", "use_clipped_model_output"},
    "DDIMParallelScheduler": {"eta", "use_clipped_model_output"},
    "TCDScheduler": {"eta"},
    "LMSDiscreteScheduler": {"order"},
    "DPMSolverSDEScheduler": {"s_noise"},
    "EulerDiscreteScheduler": {"s_churn", "s_noise"},
    "EDMEulerScheduler": {"s_churn"},
    "FlowMatchHeunDiscreteScheduler": {"s_churn"},
}
IN_SCHEDULE = {"SCMScheduler": {"intermediate_timesteps", "max_timesteps"}}


def case_of(name: str, chosen: dict[str, Any], steps: int) -> Case:
    """Sort options into the constructor's, set_timesteps' and step's."""
    options = dict(chosen)
    if options.pop("sigmas", ""):
        options[chosen["sigmas"]] = True
    schedule: dict[str, Any] = {key: options.pop(key) for key in list(options) if key in IN_SCHEDULE.get(name, ())}
    step_options = {key: options.pop(key) for key in list(options) if key in IN_STEP.get(name, ())}
    if (mu := options.pop("mu", None)) is not None:
        options["use_dynamic_shifting"], schedule["mu"] = True, mu
    if options.pop("sigmas_given", None) == "linear":
        schedule["sigmas"] = np.linspace(1, 1 / steps, steps).tolist()
    elif "sigmas_given" in chosen and chosen["sigmas_given"] == "align your steps":
        schedule["sigmas"] = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    if options.pop("timesteps_given", None):
        schedule["timesteps"] = np.linspace(990, 10, steps).round().astype(int).tolist()
    if name == "HeliosScheduler":
        options["stage_range"] = [0, 1]
    return Case(name=name, options=options, steps=steps, schedule=schedule, step_options=step_options)


def steps_for(name: str) -> list[int]:
    return {"ConsistencyDecoderScheduler": [2], "SCMScheduler": [1, 2, 4, 8]}.get(name, STEPS)


def one_at_a_time(name: str, steps: list[int]) -> list[Case]:
    """The defaults at these numbers of steps, and every single option changed."""
    axes = AXES[name]
    defaults = {key: values[0] for key, values in axes.items()}
    chosen = [defaults] + [{**defaults, key: value} for key, values in axes.items() for value in values[1:]]
    middle = 10 if 10 in steps else steps[-1]
    return [case_of(name, defaults, n) for n in steps] + [case_of(name, options, middle) for options in chosen[1:]]


def many_at_a_time(name: str, at_most: int) -> list[Case]:
    """The whole product of options where it is small, else a fixed random part of it; the steps take turns."""
    axes = AXES[name]
    keys, steps = list(axes), steps_for(name)
    chooser = random.Random(name)
    if np.prod([float(len(values)) for values in axes.values()]) <= at_most:
        chosen = [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes.values())]
    else:
        chosen = [{key: chooser.choice(values) for key, values in axes.items()} for _ in range(at_most)]
    return [case_of(name, sensible(options), chooser.choice(steps)) for options in chosen]


def sensible(chosen: dict[str, Any]) -> dict[str, Any]:
    """Fewer of the combinations that diffusers is known to refuse, so that a random part holds more of the others."""
    options = dict(chosen)
    if options.get("prediction_type") == "flow_prediction":  # only of x_0 solvers over a flow's sigmas
        in_x_0 = {"dpmsolver": "dpmsolver++", "sde-dpmsolver": "sde-dpmsolver++", "noise_prediction": "data_prediction"}
        options["use_flow_sigmas"] = True
        if "predict_x0" in options:
            options["predict_x0"] = True
        if "algorithm_type" in options:
            options["algorithm_type"] = in_x_0.get(options["algorithm_type"], options["algorithm_type"])
    if options.get("timesteps_given") or options.get("sigmas_given") == "align your steps":
        options["sigmas"] = ""
    return options


def judge(cases: list[Case]) -> dict[str, Any]:
    """Compare all, and count; ``different`` lists what is not as it must be."""
    outcomes = [(case, compare(case)) for case in cases]
    equal = [outcome for _, outcome in outcomes if outcome.kind == "equal"]
    return {
        "configurations": len(cases),
        **{kind: sum(outcome.kind == kind for _, outcome in outcomes) for kind in ("equal", "refused", "invalid")},
        "largest_float32_error": max((outcome.error for outcome in equal), default=0.0),
        "largest_float64_error": max((outcome.error_64 for outcome in equal), default=0.0),
        "largest_gap_of_the_scheduler": max((outcome.gap for outcome in equal), default=0.0),
        "largest_share_of_tolerance": max((outcome.share for outcome in equal), default=0.0),
        "without_recurrence": sum("dense" in outcome.detail for outcome in equal),
        "reasons": sorted({outcome.detail for _, outcome in outcomes if outcome.kind == "refused"}),
        "different": [
            f"{case}: float32 {o.error:.1e}, float64 {o.error_64:.1e}, gap {o.gap:.1e}; {o.detail}"
            for case, o in outcomes
            if o.kind == "different"
        ],
    }


@pytest.mark.parametrize("name", [name for name in AXES if "Parallel" not in name])
def test_every_single_option_gives_a_table_equal_to_the_scheduler(name: str) -> None:
    slow = name.startswith(("LMS", "KDPM2"))  # diffusers integrates, or searches, every step of these
    result = judge(one_at_a_time(name, [1, 3, 10] if slow else [n for n in steps_for(name) if n not in (4, 7, 33)]))

    assert not result["different"], "\n".join(result["different"])
    assert result["equal"] >= 0.6 * result["configurations"]  # the rest is broken in diffusers itself
    assert result["without_recurrence"] == 0


@pytest.mark.long
def test_the_full_grid_of_options_gives_tables_equal_to_the_schedulers() -> None:
    names = (
        os.environ.get("LEHR_GRID_SCHEDULERS", "").split(",") if os.environ.get("LEHR_GRID_SCHEDULERS") else list(AXES)
    )
    results = {name: judge(one_at_a_time(name, steps_for(name)) + many_at_a_time(name, 150)) for name in names}
    if os.environ.get("LEHR_RECORD_RESULTS"):
        record(results)
    different = [text for result in results.values() for text in result["different"]]

    assert not different, "\n".join(different)


def record(results: dict[str, dict[str, Any]]) -> None:
    """Keep the counts of the last full grid beside the benchmarks; classes not run keep their last result."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"schedulers": {}}
    kept = {name: {k: v for k, v in result.items() if k != "reasons"} for name, result in results.items()}
    merged = {**before["schedulers"], **kept}
    numbers = ("configurations", "equal", "refused", "invalid", "without_recurrence")
    data = {
        "command": "LEHR_RECORD_RESULTS=1 python -m pytest -m long tests/export/test_schedulers.py",
        "what": "traced table against the scheduler on the same noise, a network that is not linear in the loop; "
        "equal: float32 and float64 both within max(2e-6, twice the scheduler's own float32-float64 gap); refused: "
        "diffusers itself fails or is not finite there; invalid: its constructor refuses the options",
        "environment": {
            "cpu": host.cpu_name(),
            "system": platform.system(),
            "python": platform.python_version(),
            "versions": {module.__name__: str(module.__version__) for module in (np, torch, diffusers)},
        },
        "total": {
            **{key: sum(result[key] for result in merged.values()) for key in numbers},
            "different": sum(len(result["different"]) for result in merged.values()),
        },
        "schedulers": merged,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    "options,steps",
    [
        # x_T is 2e4 times as large as the data: its first step loses the digits that the network's output brings
        (
            {
                "prediction_type": "v_prediction",
                "sigmas": "use_karras_sigmas",
                "timestep_spacing": "trailing",
                "order": 2,
            },
            3,
        ),
        # four coefficients of alternating sign on estimates that agree
        ({"prediction_type": "sample", "sigmas": "use_beta_sigmas", "timestep_spacing": "leading", "order": 4}, 5),
    ],
)
def test_where_float32_would_lose_digits_the_loop_keeps_them(options: dict[str, Any], steps: int) -> None:
    betas = "squaredcos_cap_v2" if steps == 3 else "scaled_linear"
    case = case_of("LMSDiscreteScheduler", {**options, "beta_schedule": betas}, steps)
    outcome = compare(case)
    form = case.trace(case.make()).recurrence()

    assert outcome.kind == "equal", outcome
    assert outcome.share < 0.6
    assert form is not None
    assert form.wide


# ------------------------------------------------------------------------------------------------ the x_0 estimate


@pytest.mark.parametrize(
    "name,options",
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("DDPMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
        ("DDIMInverseScheduler", {"clip_sample": False}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("KDPM2DiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
        ("EDMEulerScheduler", {"sigma_data": 1.0}),
        ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction"}),
        ("SCMScheduler", {}),
        ("UnCLIPScheduler", {"clip_sample": False}),
    ],
)
def test_denoised_is_what_the_scheduler_calls_the_predicted_original_sample(name: str, options: dict[str, Any]) -> None:
    case = Case(name=name, options=options, steps=2 if name == "SCMScheduler" else 6)
    scheduler = case.make()
    table = case.trace(scheduler)
    seen: list[Step] = []
    noises = [np.random.default_rng(j).standard_normal(SHAPE) for j in range(table.num_noises)]
    x_T = np.random.default_rng(1).standard_normal(SHAPE) * table.init_noise_sigma
    sample(lambda x, t: network(x, t, extra=False), table, x_T, injected=noises, on_step=seen.append)
    prepared = case.prepared(scheduler)
    x, expected = torch.from_numpy(x_T), []
    with noise_from(prepared, noises):
        for i, t in enumerate(prepared.timesteps[: len(table)]):
            scaled = prepared.scale_model_input(x, t) if hasattr(prepared, "scale_model_input") else x
            output = torch.from_numpy(network(scaled.numpy(), float(t), extra=False))
            following = prepared.timesteps[i + 1] if i + 1 < len(prepared.timesteps) else None
            more = {"prev_timestep": following} if name == "UnCLIPScheduler" else {}
            result = prepared.step(output, t, x, return_dict=False, **more)
            x = result[0].double()
            expected.append(result[1].numpy())

    for step, original in zip(seen, expected, strict=True):
        assert relative(step.denoised, original) < 2e-5
