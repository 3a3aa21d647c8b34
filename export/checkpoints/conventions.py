"""What a pipeline's ``scheduler_config.json`` says about a denoiser: its prediction and its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from lehr.export.checkpoints.config import read_json
from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import EDM, VE, VP, BetaSchedule, LinearFlow, Path
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, SAMPLE, SCORE, V_PREDICTION, Prediction, PredictionKind
from lehr.runtime.spec import ModelSpec

INDEX = "model_index.json"
COMPONENTS = ("transformer", "unet")  # what pipelines call their denoiser
FLOW_SHIFT = "flow_shift"  # in a spec's notes: how the scheduler shifts its times towards noise

_DISCRETE = {"epsilon": EPSILON, "sample": SAMPLE, "v_prediction": V_PREDICTION}
_EDM = {"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """A path, a prediction, and what else a person may want to know."""

    path: Path
    prediction: Prediction
    notes: Mapping[str, str] = field(default_factory=dict)

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """``spec`` with these conventions; a flow fed with s in [0, 1] keeps its numbering (FLUX)."""
        path = self.path
        if isinstance(path, LinearFlow) and isinstance(spec.path, LinearFlow):
            path = spec.path
        return replace(spec, path=path, prediction=self.prediction, notes={**spec.notes, **self.notes})


def denoiser_folder(folder: FilePath) -> FilePath:
    """The denoiser's folder inside a pipeline's.

    Raises:
        InvalidInput: the pipeline has no denoiser, or two.
    """
    read_json(folder / INDEX)
    found = [folder / name for name in COMPONENTS if (folder / name / "config.json").is_file()]
    if len(found) != 1:
        raise InvalidInput(
            f"{folder} is a pipeline with {len(found) or 'no'} denoisers; expected one of the folders "
            f"{' and '.join(COMPONENTS)} with a config.json. Name the component's folder instead."
        )
    return found[0]


def conventions_of(component: FilePath) -> Conventions | None:
    """What the scheduler of the pipeline around a component's folder says; None outside of a pipeline.

    Raises:
        InvalidInput: a damaged file, or a scheduler whose conventions no path of ours has.
    """
    pipeline = component.absolute().parent
    file = pipeline / "scheduler" / "scheduler_config.json"
    if not ((pipeline / INDEX).is_file() and file.is_file()):
        return None
    try:
        return conventions(read_json(file))
    except (TypeError, ValueError) as e:
        raise InvalidInput(f"{file} is not what diffusers writes: {e}. Download it again.") from e
    except InvalidInput as e:
        raise InvalidInput(
            f"{file}: {e} Copy {component.name} out of the pipeline to export it with the conventions of its class."
        ) from e


def conventions(config: Mapping[str, Any]) -> Conventions:
    """A scheduler's configuration as path and prediction.

    Raises:
        InvalidInput: there is no such path.
    """
    name, kind = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    steps = int(config.get("num_train_timesteps", 1000))
    if name.startswith("FlowMatch") or kind == "flow_prediction" or config.get("use_flow_sigmas"):
        return Conventions(
            path=LinearFlow(num_train_timesteps=steps), prediction=FLOW_PREDICTION, notes=_flow_shift(config)
        )
    if name == "ScoreSdeVeScheduler":
        ve = VE(sigma_min=float(config.get("sigma_min", 0.01)), sigma_max=float(config.get("sigma_max", 1348.0)))
        return Conventions(path=ve, prediction=SCORE)
    if name in _EDM and kind in ("epsilon", "v_prediction"):
        edm = EDM(sigma_min=float(config.get("sigma_min", 0.002)), sigma_max=float(config.get("sigma_max", 80.0)))
        data = float(config.get("sigma_data", 0.5))
        sign = 1 if kind == "epsilon" else -1
        return Conventions(path=edm, prediction=Prediction(kind=PredictionKind.EDM, sigma_data=data, sign=sign))
    if config.get("timestep_type") == "continuous" and kind == "v_prediction":  # Stable Video Diffusion
        path = EDM(sigma_min=float(config.get("sigma_min", 0.002)), sigma_max=float(config.get("sigma_max", 700.0)))
        return Conventions(path=path, prediction=Prediction(kind=PredictionKind.EDM, sigma_data=1.0, sign=-1))
    if "beta_schedule" not in config or kind not in _DISCRETE:
        raise InvalidInput(f"{name or 'the scheduler'} with prediction_type {kind!r} has no path that is known here.")
    if config.get("trained_betas") is not None:
        raise InvalidInput("trained_betas are a path of their own, which is not known here.")
    known = [schedule.value for schedule in BetaSchedule]
    if config["beta_schedule"] not in known:
        raise InvalidInput(f"beta_schedule {config['beta_schedule']!r} is not known; known: {', '.join(known)}.")
    return Conventions(
        path=VP(
            schedule=BetaSchedule(config["beta_schedule"]),
            beta_start=float(config.get("beta_start", 1e-4)),
            beta_end=float(config.get("beta_end", 0.02)),
            num_train_timesteps=steps,
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        ),
        prediction=_DISCRETE[kind],
    )


def _flow_shift(config: Mapping[str, Any]) -> dict[str, str]:
    if config.get("use_dynamic_shifting"):
        return {FLOW_SHIFT: "dynamic"}
    shift = config.get("shift", config.get("flow_shift"))
    return {} if shift is None else {FLOW_SHIFT: f"{float(shift):g}"}
