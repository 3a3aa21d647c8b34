"""What a traced table says of itself, what is refused and why, and how schedulers are loaded."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
schedulers = importlib.import_module("diffusers.schedulers")

from lehr.export.schedulers import dynamic_shift, load_scheduler, trace_scheduler  # noqa: E402 - after the skips
from lehr.runtime.errors import InvalidInput, LehrError, UnknownName, UnsupportedScheduler  # noqa: E402
from lehr.runtime.prediction import PredictionKind  # noqa: E402
from lehr.runtime.solver_table import Clip, DynamicThreshold, LearnedVariance, SolverTable  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers constructs with numpy as of old

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

# ------------------------------------------------------------------------------------------------- what it says


def test_the_input_lies_on_the_path_that_the_table_names() -> None:
    x_0, eps = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 4))
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler", "EDMEulerScheduler"):
        table = trace_scheduler(getattr(schedulers, name)(), 8)
        scale = table.prediction.input_scale(table.alphas, table.sigmas)
        for i in range(8):
            x_t = table.alphas[i] * x_0 + table.sigmas[i] * eps
            on_sample, on_output = table.prediction.denoised_coefficients(table.alphas[i], table.sigmas[i])
            exact = (x_0 - on_sample * x_t) / on_output  # the output of a perfect network
            denoised = table.denoised_from_input[i] * scale[i] * x_t + table.denoised_from_output[i] * exact
            assert np.abs(denoised - x_0).max() < 1e-5 * np.abs(x_0).max()


@pytest.mark.parametrize(
    "name,options,kind,sign",
    [
        ("DDIMScheduler", {}, PredictionKind.EPSILON, 1),
        ("DDIMScheduler", {"prediction_type": "sample"}, PredictionKind.SAMPLE, 1),
        ("UniPCMultistepScheduler", FLOW, PredictionKind.FLOW_PREDICTION, 1),
        ("FlowMatchEulerDiscreteScheduler", {}, PredictionKind.FLOW_PREDICTION, 1),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, PredictionKind.FLOW_PREDICTION, -1),
        ("EDMEulerScheduler", {}, PredictionKind.EDM, 1),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, PredictionKind.EDM, -1),
        ("IPNDMScheduler", {}, PredictionKind.V_PREDICTION, 1),
    ],
)  # fmt: skip
def test_the_table_names_the_prediction(name: str, options: dict[str, Any], kind: PredictionKind, sign: int) -> None:
    prediction = trace_scheduler(getattr(schedulers, name)(**options), 5).prediction

    assert (prediction.kind, prediction.sign) == (kind, sign)


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler"]
)
def test_timesteps_and_the_starting_scale_are_the_schedulers(name: str) -> None:
    scheduler = getattr(schedulers, name)()
    table = trace_scheduler(scheduler, 4)
    scheduler.set_timesteps(4)

    assert table.timesteps.tolist() == [float(t) for t in scheduler.timesteps]
    assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-12)


def test_clipping_thresholding_and_learned_variance_become_operations() -> None:
    make = schedulers.DDPMScheduler

    assert trace_scheduler(make(clip_sample_range=0.7), 5).clip == Clip(limit=0.7)
    thresholded = trace_scheduler(make(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=3.0), 5)
    assert thresholded.clip == DynamicThreshold(ratio=0.9, max_value=3.0)
    assert trace_scheduler(make(clip_sample=False), 5).clip is None
    assert trace_scheduler(make(variance_type="learned_range"), 5).variance is LearnedVariance.LOG_RANGE
    assert trace_scheduler(make(variance_type="learned"), 5).variance is LearnedVariance.DIRECT
    solver = schedulers.DPMSolverMultistepScheduler(variance_type="learned_range")
    assert trace_scheduler(solver, 5).variance is LearnedVariance.UNUSED


def test_a_traced_table_survives_saving() -> None:
    make = schedulers.DDPMScheduler
    table = trace_scheduler(make(variance_type="learned_range", thresholding=True), 5)
    with np.load(io.BytesIO(table.to_bytes())) as arrays:
        again = SolverTable.from_arrays(dict(arrays))

    assert again.to_bytes() == table.to_bytes()
    assert again.options["config"]["_class_name"] == "DDPMScheduler"
    assert again.options["config"]["thresholding"] is True


def test_tracing_leaves_the_scheduler_as_it_was() -> None:
    scheduler = schedulers.UniPCMultistepScheduler()
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps.clone()
    trace_scheduler(scheduler, 12)

    assert torch.equal(scheduler.timesteps, timesteps)
    assert scheduler.step_index is None
    assert scheduler.model_outputs == [None, None]


def test_tracing_twice_gives_the_same_table() -> None:
    scheduler = schedulers.EulerAncestralDiscreteScheduler()

    assert trace_scheduler(scheduler, 6).to_bytes() == trace_scheduler(scheduler, 6).to_bytes()


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "name,arguments,reason",
    [
        ("ScoreSdeVeScheduler", {}, "norm"),
        ("KarrasVeScheduler", {}, "edm_stochastic"),
        ("RePaintScheduler", {}, "back in time"),
        ("AmusedScheduler", {"mask_token_id": 0}, "discrete tokens"),
        ("VQDiffusionScheduler", {"num_vec_classes": 8}, "discrete tokens"),
        ("PiflowScheduler", {}, "grid of velocities"),
        ("HeliosDMDScheduler", {}, "its own pipeline"),
        ("FlowMatchLCMScheduler", {"scale_factors": [1.0, 2.0]}, "scale_factors"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type given as sample"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "not finite in diffusers"),
        ("LCMScheduler", {"rescale_betas_zero_snr": True}, "not finite in diffusers"),
        ("TCDScheduler", {"rescale_betas_zero_snr": True}, "not finite in diffusers"),
    ],
)
def test_what_cannot_be_a_table_is_refused_by_name_with_the_reason(
    name: str, arguments: dict[str, Any], reason: str
) -> None:
    kind = getattr(schedulers, name, None) or getattr(importlib.import_module("diffusers.schedulers.deprecated"), name)

    with pytest.raises(UnsupportedScheduler, match=reason) as caught:
        trace_scheduler(kind(**arguments), 10)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name,steps,reason", [("IPNDMScheduler", 1, "returns zero"), ("PNDMScheduler", 3, "PNDMScheduler")]
)
def test_numbers_of_steps_that_are_broken_in_diffusers_are_refused(name: str, steps: int, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        trace_scheduler(getattr(schedulers, name)(), steps)


def test_a_scheduler_that_is_not_linear_is_found_out() -> None:
    class Squashed(schedulers.DDIMScheduler):  # type: ignore[misc, name-defined]
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            return (torch.tanh(super().step(model_output, timestep, sample, return_dict=False)[0]),)

    with pytest.raises(UnsupportedScheduler, match=r"Squashed.*is not linear"):
        trace_scheduler(Squashed(clip_sample=False), 4)


def test_a_scheduler_that_clips_its_sample_is_refused() -> None:
    class Clamped(schedulers.DDIMScheduler):  # type: ignore[misc, name-defined]
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            return (super().step(model_output, timestep, sample, return_dict=False)[0].clamp(-3, 3),)

    with pytest.raises(UnsupportedScheduler, match="clips something other than the x_0 estimate"):
        trace_scheduler(Clamped(clip_sample=False), 4)


def test_a_scheduler_of_unknown_kind_is_refused() -> None:
    class Own(diffusers.SchedulerMixin, diffusers.ConfigMixin):  # type: ignore[misc, name-defined]
        @diffusers.configuration_utils.register_to_config
        def __init__(self) -> None: ...

        def set_timesteps(self, num_inference_steps: int) -> None:
            self.timesteps = torch.arange(num_inference_steps)

        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            return (sample - model_output,)

    with pytest.raises(UnsupportedScheduler, match="Own is no scheduler class known"):
        trace_scheduler(Own(), 4)
    with pytest.raises(InvalidInput, match="expected a diffusers scheduler, got str"):
        trace_scheduler("ddim", 4)


@pytest.mark.parametrize(
    "arguments,reason",
    [
        ({}, "how many steps"),
        ({"num_inference_steps": 0}, "must be 1 to"),
        ({"num_inference_steps": -3}, "must be 1 to"),
        ({"num_inference_steps": 2.5}, "must be 1 to"),
        ({"num_inference_steps": 2000}, "cannot be larger"),
        ({"num_inference_steps": 5, "timesteps": [900, 500]}, "has 2 entries"),
        ({"timesteps": []}, "empty"),
        ({"timesteps": [1, 5, 9]}, "descending"),
        ({"num_inference_steps": 5, "sigmas": [3.0, 2.0, 1.0, 0.5, 0.1]}, "takes no sigmas"),
        ({"num_inference_steps": 5, "mu": 1.0}, "takes no mu"),
        ({"num_inference_steps": 5, "step_options": {"eta": 1.0}}, "step has no option 'eta'"),
        ({"num_inference_steps": 5, "step_options": {"generator": 1}}, "step has no option 'generator'"),
        ({"num_inference_steps": 5, "schedule_options": {"strength": 1.0}}, "set_timesteps has no option 'strength'"),
    ],
)
def test_arguments_that_the_scheduler_does_not_take_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        trace_scheduler(schedulers.DDPMScheduler(), **arguments)


def test_dynamic_shifting_needs_mu_and_computes_it() -> None:
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    with pytest.raises(InvalidInput, match="mu must be given"):
        trace_scheduler(scheduler, 4)
    assert dynamic_shift(scheduler, 256) == pytest.approx(0.5)
    assert dynamic_shift(scheduler, 4096) == pytest.approx(1.15)
    table = trace_scheduler(scheduler, 4, mu=dynamic_shift(scheduler, 4096), sigmas=[1.0, 0.75, 0.5, 0.25])
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    assert table.timesteps == pytest.approx(scheduler.timesteps.numpy(), rel=1e-6)
    with pytest.raises(InvalidInput, match="must be positive"):
        dynamic_shift(scheduler, 0)
    with pytest.raises(InvalidInput, match="give mu itself"):
        dynamic_shift(schedulers.DDIMScheduler(), 256)


@pytest.mark.parametrize("sigmas", [[0.2, 0.5, 1.0], [1.0, 0.5, 0.5], [1.0, -0.5], [float("nan"), 0.5]])
def test_sigmas_that_do_not_decrease_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(InvalidInput, match="strictly decreasing"):
        trace_scheduler(schedulers.FlowMatchEulerDiscreteScheduler(), sigmas=sigmas)


# ------------------------------------------------------------------------------------------------------- loading


def test_a_scheduler_is_loaded_from_a_folder_a_pipeline_or_a_file(tmp_path: Path) -> None:
    schedulers.DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True).save_pretrained(
        tmp_path / "scheduler"
    )

    for source in (tmp_path, tmp_path / "scheduler", str(tmp_path / "scheduler" / "scheduler_config.json")):
        loaded = load_scheduler(source)
        assert type(loaded).__name__ == "DPMSolverMultistepScheduler"
        assert (loaded.config.solver_order, loaded.config.use_karras_sigmas) == (3, True)


@pytest.mark.parametrize(
    "text,error,reason",
    [
        ("{", InvalidInput, "is no JSON"),
        ("[" * 100_000, InvalidInput, "is no JSON"),
        ("[1]", InvalidInput, "does not name a scheduler"),
        ("{}", InvalidInput, "does not name a scheduler"),
        ('{"_class_name": "DDIMSchedular"}', UnknownName, "Did you mean 'DDIMScheduler'"),
        ('{"_class_name": "SchedulerMixin"}', UnknownName, "unknown scheduler"),
        ('{"_class_name": "DDIMScheduler", "beta_schedule": "quartic"}', InvalidInput, "quartic"),
        ('{"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}', InvalidInput, "not a configuration"),
    ],
)
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str, error: type[LehrError], reason: str) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(text)

    with pytest.raises(error, match=reason):
        load_scheduler(path)


def test_a_folder_without_a_scheduler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="found no scheduler"):
        load_scheduler(tmp_path)
