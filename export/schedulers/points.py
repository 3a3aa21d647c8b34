"""Where a diffusers scheduler stands on the path at each evaluation, and what its network predicts.

diffusers keeps this in eight different ways. Each family of schedulers has one function here that reads
(alpha_t, sigma_t) such that the network's input is x_t = alpha_t x_0 + sigma_t eps, times the prediction's input
scale. A subclass belongs to its parent's family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lehr.export.schedulers.refusals import is_a
from lehr.runtime.errors import UnsupportedScheduler
from lehr.runtime.prediction import Prediction, PredictionKind

Point = tuple[float, float]  # (alpha, sigma)
Where = Callable[[Any, Any], Point]  # (scheduler, timestep) -> point


# ------------------------------------------------------------------------------------------- where, by family


def _discrete(scheduler: Any, timestep: Any) -> Point:
    """Variance preserving, at an integer training timestep."""
    return _from_alpha_bar(float(scheduler.alphas_cumprod[int(timestep)]))


def _discrete_inverse(scheduler: Any, timestep: Any) -> Point:
    """DDIM run backwards takes its input to be one step cleaner than the timestep says."""
    cleaner = int(timestep) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    cleaner = min(cleaner, scheduler.config.num_train_timesteps - 1)
    bar = scheduler.alphas_cumprod[cleaner] if cleaner >= 0 else scheduler.initial_alpha_cumprod
    return _from_alpha_bar(float(bar))


def _wuerstchen(scheduler: Any, timestep: Any) -> Point:
    """Variance preserving, in continuous time."""
    return _from_alpha_bar(float(scheduler._alpha_cumprod(timestep, timestep.device)))


def _ratio(scheduler: Any, timestep: Any) -> Point:
    """``sigmas`` holds sigma / alpha, or the flow's sigma with ``use_flow_sigmas``."""
    sigma = _sigma(scheduler, timestep)
    if scheduler.config.get("use_flow_sigmas"):
        return 1 - sigma, sigma
    return _from_ratio(sigma)


def _exploding(scheduler: Any, _timestep: Any) -> Point:
    """The sample is x_0 + r eps and ``scale_model_input`` makes it variance preserving."""
    sigmas = scheduler.sigmas
    if not getattr(scheduler, "state_in_first_order", True):
        middle = getattr(scheduler, "mid_point_sigma", None)
        if middle is not None:
            return _from_ratio(float(middle))
        sigmas = getattr(scheduler, "sigmas_interpol", sigmas)
        if sigmas is not scheduler.sigmas and hasattr(scheduler, "sigmas_down"):  # ancestral, one entry shorter
            return _from_ratio(float(sigmas[scheduler.step_index - 1]))
    return _from_ratio(float(sigmas[scheduler.step_index]))


def _edm(scheduler: Any, timestep: Any) -> Point:
    """Variance exploding with EDM's preconditioning inside."""
    return 1.0, _sigma(scheduler, timestep)


def _decoder(scheduler: Any, timestep: Any) -> Point:
    """The consistency decoder: EDM's preconditioning at the noise level of a variance preserving timestep."""
    alpha = float(scheduler.sqrt_alphas_cumprod[int(timestep)])
    return 1.0, float(scheduler.sqrt_one_minus_alphas_cumprod[int(timestep)]) / alpha


def _flow(scheduler: Any, timestep: Any) -> Point:
    """alpha = 1 - sigma; with ``invert_sigmas`` the scheduler counts from noise (0) to data (1)."""
    sigma = _sigma(scheduler, timestep)
    return (sigma, 1 - sigma) if scheduler.config.get("invert_sigmas") else (1 - sigma, sigma)


def _trigonometric(_scheduler: Any, timestep: Any) -> Point:
    """TrigFlow (sCM, Lu & Song 2024, arXiv:2410.11081): the timestep is an angle."""
    return math.cos(float(timestep)), math.sin(float(timestep))


def _ipndm(scheduler: Any, _timestep: Any) -> Point:
    """``betas`` is sigma, ``alphas`` its cosine."""
    return float(scheduler.alphas[scheduler.step_index]), float(scheduler.betas[scheduler.step_index])


def _sigma(scheduler: Any, timestep: Any) -> float:
    index = scheduler.step_index
    return float(scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index])


def _from_alpha_bar(bar: float) -> Point:
    return math.sqrt(bar), math.sqrt(1 - bar)


def _from_ratio(ratio: float) -> Point:
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha


# ---------------------------------------------------------------------------------------------------- families


def _as_predicted(prediction: Prediction, point: Point) -> float:
    return float(prediction.input_scale(*point))


def _preserving(_prediction: Prediction, point: Point) -> float:
    return point[0]


def _decoder_scale(prediction: Prediction, point: Point) -> float:
    return float(prediction.input_scale(*point)) * math.hypot(*point)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a scheduler class has in common with others.

    Attributes:
        where: the point of the path.
        scale: what the scheduler's ``scale_model_input`` multiplies its sample by at a point.
        kind: its prediction where the configuration does not name one.
        edm: the configured prediction_type names the sign of EDM's F, not a kind.
        ends_in_data: its last timestep is the end of the schedule, not an evaluation.
    """

    where: Where
    scale: Callable[[Prediction, Point], float] = _as_predicted
    kind: PredictionKind | None = None
    edm: bool = False
    ends_in_data: bool = False


_DISCRETE, _RATIO = Family(where=_discrete), Family(where=_ratio)
_EXPLODING = Family(where=_exploding, scale=_preserving)
_EDM = Family(where=_edm, kind=PredictionKind.EDM, edm=True)
_FLOW = Family(where=_flow, kind=PredictionKind.FLOW_PREDICTION)
_FAMILIES = {
    "DDPMScheduler": _DISCRETE,
    "DDPMParallelScheduler": _DISCRETE,
    "DDIMScheduler": _DISCRETE,
    "DDIMParallelScheduler": _DISCRETE,
    "CogVideoXDDIMScheduler": _DISCRETE,
    "CogVideoXDPMScheduler": _DISCRETE,
    "PNDMScheduler": _DISCRETE,
    "LCMScheduler": _DISCRETE,
    "TCDScheduler": _DISCRETE,
    "UnCLIPScheduler": _DISCRETE,
    "DDIMInverseScheduler": Family(where=_discrete_inverse),
    "DDPMWuerstchenScheduler": Family(where=_wuerstchen, kind=PredictionKind.EPSILON, ends_in_data=True),
    "DPMSolverMultistepScheduler": _RATIO,
    "DPMSolverMultistepInverseScheduler": _RATIO,
    "DPMSolverSinglestepScheduler": _RATIO,
    "UniPCMultistepScheduler": _RATIO,
    "DEISMultistepScheduler": _RATIO,
    "SASolverScheduler": _RATIO,
    "HeliosScheduler": _RATIO,
    "EulerDiscreteScheduler": _EXPLODING,
    "EulerAncestralDiscreteScheduler": _EXPLODING,
    "HeunDiscreteScheduler": _EXPLODING,
    "LMSDiscreteScheduler": _EXPLODING,
    "KDPM2DiscreteScheduler": _EXPLODING,
    "KDPM2AncestralDiscreteScheduler": _EXPLODING,
    "DPMSolverSDEScheduler": _EXPLODING,
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "CosineDPMSolverMultistepScheduler": _EDM,
    "CMStochasticIterativeScheduler": _EDM,
    "ConsistencyDecoderScheduler": Family(where=_decoder, scale=_decoder_scale, kind=PredictionKind.EDM, edm=True),
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "FlowMapEulerDiscreteScheduler": _FLOW,
    "LTXEulerAncestralRFScheduler": _FLOW,
    "MiniMaxH3Scheduler": _FLOW,
    "SCMScheduler": Family(where=_trigonometric, kind=PredictionKind.V_PREDICTION, ends_in_data=True),
    "IPNDMScheduler": Family(where=_ipndm, kind=PredictionKind.V_PREDICTION),
}
_KINDS = {
    "epsilon": PredictionKind.EPSILON,
    "sample": PredictionKind.SAMPLE,
    "original_sample": PredictionKind.SAMPLE,
    "v_prediction": PredictionKind.V_PREDICTION,
    "flow_prediction": PredictionKind.FLOW_PREDICTION,
}


def family_of(scheduler: Any) -> Family:
    """The family of a scheduler's class or of the nearest parent that has one.

    Raises:
        UnsupportedScheduler: none has.
    """
    for parent in type(scheduler).__mro__:
        if parent.__name__ in _FAMILIES:
            return _FAMILIES[parent.__name__]
    raise UnsupportedScheduler(
        f"{type(scheduler).__name__} is no scheduler class known here, nor derived from one, so its noise levels "
        f"cannot be read. Known: {', '.join(sorted(_FAMILIES))}."
    )


def prediction_of(scheduler: Any, family: Family) -> Prediction:
    """What the scheduler takes its network's output to be.

    Raises:
        UnsupportedScheduler: a prediction type that is none of ours.
    """
    config = scheduler.config
    named = config.get("prediction_type")
    if family.edm:
        sign = -1 if named == "v_prediction" else 1
        return Prediction(kind=PredictionKind.EDM, sigma_data=float(config.sigma_data), sign=sign)
    towards_data = bool(config.get("invert_sigmas")) or is_a(scheduler, "MiniMaxH3Scheduler")
    kind = family.kind or _KINDS.get(named)
    if kind is None:
        raise UnsupportedScheduler(
            f"{type(scheduler).__name__} has prediction_type {named!r}; expected one of {', '.join(_KINDS)}."
        )
    return Prediction(kind=kind, sign=-1 if towards_data else 1)
