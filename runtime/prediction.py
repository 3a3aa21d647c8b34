"""What the network outputs, turned once into the x_0 estimate D and from there into the score.

Every prediction is linear in the network's output F at a given point of the path, so a prediction is two
numbers: D = on_sample * x_t + on_output * F. With x_t = alpha_t x_0 + sigma_t eps (Kingma et al. 2021;
Salimans & Ho 2022, arXiv:2202.00512, appendix D; Karras et al. 2022, arXiv:2206.00364, equation 7):

    epsilon          D = (x_t - sigma F) / alpha
    sample           D = F
    v_prediction     F = alpha eps - sigma x_0    D = (alpha x_t - sigma F) / (alpha² + sigma²)
    flow_prediction  F = eps - x_0                D = (x_t - sigma F) / (alpha + sigma)
    score            F = (alpha D - x_t) / sigma²
    edm              D = c_skip x_t + c_out F(c_in x_t), alpha = 1
    velocity         F = alpha' x_0 + sigma' eps    D = (sigma F - sigma' x_t) / (alpha' sigma - alpha sigma')

The last is d x_t / dt (Ma et al. 2024, arXiv:2401.08740, equation 2) in the path's own time t; at a point
(alpha, sigma) of the path it is two numbers like the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Interpolant, Value, path_from_json


class PredictionKind(str, Enum):
    """What the network outputs F; the equations stand at the top of this file."""

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V_PREDICTION = "v_prediction"
    FLOW_PREDICTION = "flow_prediction"
    SCORE = "score"
    EDM = "edm"
    VELOCITY = "velocity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A prediction kind.

    Attributes:
        sigma_data: the data's standard deviation, used by ``edm`` alone.
        interpolant: the path whose time derivative the network outputs, for ``velocity`` alone.
        sign: -1 where the network outputs -F: a flow towards the data (Mochi), or EDM's F as a v prediction.
    """

    kind: PredictionKind
    sigma_data: float = 0.5
    interpolant: Interpolant | None = None
    sign: int = 1

    def __post_init__(self) -> None:
        if self.sign not in {-1, 1}:
            raise InvalidInput(f"the sign of a prediction is 1 or -1, got {self.sign}")
        if (self.kind is PredictionKind.VELOCITY) != (self.interpolant is not None):
            raise InvalidInput("the prediction 'velocity' and an interpolant, whose velocity it is, come together")
        if self.sigma_data <= 0:
            raise InvalidInput(f"sigma_data must be positive, got {self.sigma_data}")

    def input_scale(self, alpha: Value, sigma: Value) -> Value:
        """c_in: what x_t is multiplied by before the network sees it; 1 for all but ``edm``."""
        if self.kind is PredictionKind.EDM:
            c_in: Value = 1.0 / (sigma**2 + self.sigma_data**2) ** 0.5
            return c_in
        return alpha * 0.0 + 1.0

    def denoised_coefficients(self, alpha: Value, sigma: Value) -> tuple[Value, Value]:
        """(on_sample, on_output) of D = on_sample * x_t + on_output * F; x_t before ``input_scale``."""
        on_sample, on_output = self._positive_coefficients(alpha, sigma)
        return on_sample, self.sign * on_output

    def _positive_coefficients(self, alpha: Value, sigma: Value) -> tuple[Value, Value]:
        kind = self.kind
        if kind is PredictionKind.EPSILON:
            return 1.0 / alpha, -sigma / alpha
        if kind is PredictionKind.SAMPLE:
            return alpha * 0.0, alpha * 0.0 + 1.0
        if kind is PredictionKind.V_PREDICTION:
            total = alpha**2 + sigma**2
            return alpha / total, -sigma / total
        if kind is PredictionKind.FLOW_PREDICTION:
            return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
        if kind is PredictionKind.SCORE:
            return 1.0 / alpha, sigma**2 / alpha
        if self.interpolant is not None:
            return self.interpolant.denoised_from_velocity(alpha, sigma)
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5

    def score_gain(self, alpha: Value, sigma: Value) -> Value:
        """|d score / d F|: multiplies an error of the output into an error of the score."""
        on_output = self.denoised_coefficients(alpha, sigma)[1]
        return abs(alpha * on_output) / sigma**2

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"kind": self.kind.value}
        if self.kind is PredictionKind.EDM:
            data["sigma_data"] = self.sigma_data
        if self.interpolant is not None:
            data["interpolant"] = self.interpolant.to_json()
        if self.sign != 1:
            data["sign"] = self.sign
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prediction:
        path = path_from_json(data["interpolant"]) if "interpolant" in data else None
        if path is not None and not isinstance(path, Interpolant):
            raise InvalidInput(f"a velocity's path must be an interpolant, got {data['interpolant']!r}")
        return cls(
            kind=PredictionKind(data["kind"]),
            sigma_data=float(data.get("sigma_data", 0.5)),
            interpolant=path,
            sign=int(data.get("sign", 1)),
        )


EPSILON = Prediction(kind=PredictionKind.EPSILON)
SAMPLE = Prediction(kind=PredictionKind.SAMPLE)
V_PREDICTION = Prediction(kind=PredictionKind.V_PREDICTION)
FLOW_PREDICTION = Prediction(kind=PredictionKind.FLOW_PREDICTION)
SCORE = Prediction(kind=PredictionKind.SCORE)
