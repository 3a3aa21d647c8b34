"""A sampler is a triangular matrix.

Every sampler in use is linear in the starting noise, the network's outputs and the injected noises, so for a
fixed schedule it is a table of coefficients (compare the unified views of Karras et al. 2022, arXiv:2206.00364,
and Zhou et al. 2023, "unified sampling framework"):

    input_i = a_i x_T + Σ_{j<i} b_ij F_j + Σ c_ij z_j        what the network sees at evaluation i
    x_final = the last row

F_j is the network's raw output at evaluation j and z_j the j-th injected noise. What is not linear is element-wise
and named (:mod:`lehr.runtime.table_ops`): clipping and thresholding of the x_0 estimate D_j enter as a second bank
d_ij beside b_ij, and a learned variance multiplies z_j.

Shape legend: N evaluations, M injected noises; the table has N + 1 rows, the last one is x_final.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.arrays import write_arrays
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.jsonlike import decode_json, encode_json
from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction
from lehr.runtime.recurrence import Kept, Recurrence
from lehr.runtime.recurrence_search import find_recurrence
from lehr.runtime.table_ops import Clip, DenoisedOp, DynamicThreshold, LearnedVariance, op_from_json, op_to_json

__all__ = ["MAX_EVALUATIONS", "Clip", "DynamicThreshold", "LearnedVariance", "SolverTable", "TableWriter"]

Array = npt.NDArray[np.float64]
MAX_EVALUATIONS = 10_000


@dataclass(frozen=True, kw_only=True)
class SolverTable:
    """A sampler with its schedule, as coefficients; arrays are float64 and read-only.

    Attributes:
        sampler: its name, for people.
        prediction: what F is; a table fits models of this prediction only.
        timesteps: (N,) what the network is told at each evaluation.
        alphas, sigmas: (N,) the path at each evaluation.
        start: (N + 1,) a_i, on x_T.
        outputs: (N + 1, N) b_ij, on F_j; zero for j >= i.
        noises: (N + 1, M) c_ij, on z_j.
        clipped: (N + 1, N) d_ij, on ``clip(D_j)``; None where nothing is clipped.
        clip: the operation behind ``clipped``: clipping or dynamic thresholding.
        variance: what the network's extra channels do to the injected noise; None where the network has none. With
            it the network returns twice the sample's channels, the prediction first, and z_j is scaled by what it
            returned at the evaluation before the first row that uses z_j.
        variance_slopes: (M,) the slope of :attr:`LearnedVariance.LOG_RANGE` for each noise.
        denoised_from_input, denoised_from_output: (N,) D_i = from_input * input_i + from_output * F_i.
        init_noise_sigma: x_T is unit noise times this.
        options: how the table was made.
    """

    sampler: str
    prediction: Prediction
    timesteps: Array
    alphas: Array
    sigmas: Array
    start: Array
    outputs: Array
    noises: Array
    clipped: Array | None = None
    clip: DenoisedOp | None = None
    variance: LearnedVariance | None = None
    variance_slopes: Array | None = None
    denoised_from_input: Array
    denoised_from_output: Array
    init_noise_sigma: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.timesteps)
        if not 1 <= n <= MAX_EVALUATIONS:
            raise InvalidInput(f"a solver table needs 1 to {MAX_EVALUATIONS} evaluations, got {n}")
        if not (math.isfinite(self.init_noise_sigma) and self.init_noise_sigma > 0):
            raise InvalidInput(f"init_noise_sigma must be positive, got {self.init_noise_sigma}")
        if (self.clip is None) != (self.clipped is None):
            raise InvalidInput("a solver table's clip operation and its coefficients come together")
        if (self.variance is LearnedVariance.LOG_RANGE) != (self.variance_slopes is not None):
            raise InvalidInput("a solver table has variance slopes exactly where its variance is a learned log range")
        noises = self.noises.shape[-1:]
        expected = {"start": (n + 1,), "outputs": (n + 1, n), "clipped": (n + 1, n), "variance_slopes": noises}
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, np.ndarray):
                continue
            shape = (n + 1, *noises) if item.name == "noises" else expected.get(item.name, (n,))
            if value.dtype != np.float64 or value.shape != shape:
                raise InvalidInput(
                    f"table field {item.name!r} is {value.dtype} {value.shape}, expected float64 {shape}"
                )
            if not np.all(np.isfinite(value)):
                raise InvalidInput(f"table field {item.name!r} holds values that are not finite")
            value.flags.writeable = False
        for bank in (self.outputs, self.clipped):
            if bank is not None and np.any(np.triu(bank)):
                raise InvalidInput("a row may use only the outputs of earlier evaluations (lower triangular)")
        if self.variance not in (None, LearnedVariance.UNUSED) and np.any(self.noises[0]):
            raise InvalidInput("the first row cannot use a noise of learned variance: nothing is evaluated before it")

    # ------------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        """The number of network evaluations N."""
        return len(self.timesteps)

    @property
    def num_noises(self) -> int:
        return int(self.noises.shape[1])

    @property
    def coefficients(self) -> Array:
        """(N + 1, 1 + N [+ N] + M): all banks side by side in the order x_T, F, clip(D), z."""
        banks = [self.start[:, None], self.outputs, self.noises]
        if self.clipped is not None:
            banks.insert(2, self.clipped)
        coefficients: Array = np.concatenate(banks, axis=1)
        return coefficients

    def gains(self) -> Array:
        """(N,) error gains: to first order an error δF_i moves the final sample by gains[i] * δF_i.

        This is the direct effect, the last row; the effect through later evaluations depends on the network.
        """
        gains: Array = self.outputs[-1].copy()
        if self.clipped is not None:
            gains += self.clipped[-1] * self.denoised_from_output
        return gains

    @cached_property
    def _recurrence(self) -> Recurrence | None:
        with np.errstate(divide="ignore", invalid="ignore"):  # a quantity that a table has not is left out below
            scale = self.prediction.input_scale(self.alphas, self.sigmas)
            on_input, on_output = self.denoised_from_input, self.denoised_from_output
            kept = {
                Kept.OUTPUT: (np.zeros(len(self)), np.ones(len(self))),
                Kept.DENOISED: (on_input, on_output),
                Kept.NOISE: (
                    (1 / scale - self.alphas * on_input) / self.sigmas,
                    -self.alphas * on_output / self.sigmas,
                ),
            }
        banks = 1 if self.clipped is None else 2
        return find_recurrence(self.coefficients, len(self), banks, kept, starting_scale=self.init_noise_sigma)

    def recurrence(self) -> Recurrence | None:
        """The sparse form that needs only a few earlier inputs and outputs, or None where there is none.

        Found numerically; reproduces every row to 1e-12 of its largest coefficient.
        """
        return self._recurrence

    def describe(self) -> str:
        """One paragraph for people: sampler, evaluations, noises, memory of the loop, largest gain."""
        form = self.recurrence()
        memory = f"recurrence of {form.depth}" if form else "dense (keeps every output)"
        gains = np.abs(self.gains())
        clip = f", x_0 {self.clip}" if self.clip else ""
        if self.variance is not None:
            clip += f", learned variance ({self.variance.value})"
        return (
            f"{self.sampler}: {len(self)} evaluations from timestep {self.timesteps[0]:g} to {self.timesteps[-1]:g}, "
            f"{self.num_noises} injected noises, {memory}{clip}; largest error gain {gains.max():.3g} "
            f"at evaluation {int(gains.argmax())}"
        )

    # ---------------------------------------------------------------------------------------------- save, load

    def to_bytes(self) -> bytes:
        """An npz without pickles, deterministic: equal tables give equal bytes.

        Raises:
            InvalidInput: ``options`` holds something that is no JSON.
        """
        meta = {
            "sampler": self.sampler,
            "prediction": self.prediction.to_json(),
            "clip": op_to_json(self.clip),
            "variance": None if self.variance is None else self.variance.value,
            "init_noise_sigma": self.init_noise_sigma,
            "options": dict(self.options),
        }
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}
        arrays["meta"] = np.frombuffer(encode_json(meta, f"table {self.sampler!r}"), dtype=np.uint8)
        buffer = io.BytesIO()
        write_arrays(buffer, arrays)
        return buffer.getvalue()

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> SolverTable:
        """Rebuild a table from the arrays of :meth:`to_bytes`.

        Raises:
            BundleError: a field is missing, of another shape, or not a table at all.
        """
        try:
            meta = decode_json(arrays["meta"].tobytes())
            banks = {name: np.array(value) for name, value in arrays.items() if name != "meta"}
            return cls(
                **banks,
                sampler=str(meta["sampler"]),
                prediction=Prediction.from_json(meta["prediction"]),
                clip=op_from_json(meta["clip"]),
                variance=None if meta["variance"] is None else LearnedVariance(meta["variance"]),
                init_noise_sigma=float(meta["init_noise_sigma"]),
                options=dict(meta["options"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, InvalidInput) as e:
            raise BundleError(f"the solver table is damaged: {e}. Make it again with lehr export.") from e


# ------------------------------------------------------------------------------------------------- writing one


class TableWriter:
    """Write a sampler as a table by running it on basis vectors.

    A solver is then the textbook loop: it holds x as a vector of coefficients, asks :meth:`denoise` for D and
    :meth:`noise` for fresh noise, combines them linearly, and hands the result to :meth:`finish`.
    """

    def __init__(self, sampler: str, path: Path, prediction: Prediction, *, max_evaluations: int, max_noises: int = 0):
        self._sampler, self._path, self._prediction = sampler, path, prediction
        self._evaluations, self._noises = 0, 0
        self._capacity = (max_evaluations, max_noises)
        self._basis: Array = np.eye(1 + max_evaluations + max_noises)
        self._rows: list[Array] = []
        self._points: list[tuple[float, float, float, float, float]] = []

    @property
    def x_T(self) -> Array:
        """The starting sample as a vector."""
        return self._vector(0)

    def denoise(self, x: Array, timestep: float) -> Array:
        """Evaluate the network at x and return D(x) as a vector; one row of the table."""
        alpha, sigma = (float(value) for value in self._path.alpha_sigma(timestep))
        scale = float(self._prediction.input_scale(alpha, sigma))
        on_sample, on_output = self._prediction.denoised_coefficients(alpha, sigma)
        self._rows.append(scale * x)
        self._points.append((timestep, alpha, sigma, on_sample / scale, on_output))
        self._evaluations += 1
        denoised: Array = on_sample * x + on_output * self._vector(self._evaluations)
        return denoised

    def noise(self) -> Array:
        """A fresh unit noise as a vector."""
        self._noises += 1
        return self._vector(self._capacity[0] + self._noises)

    def _vector(self, index: int) -> Array:
        vector: Array = self._basis[index]
        return vector

    def finish(self, x: Array, *, init_noise_sigma: float, options: Mapping[str, Any]) -> SolverTable:
        """The table whose final sample is ``x``."""
        n, first_noise = self._evaluations, 1 + self._capacity[0]
        table = np.array([*self._rows, x])
        points = np.array(self._points).T
        return SolverTable(
            sampler=self._sampler,
            prediction=self._prediction,
            timesteps=points[0].copy(),
            alphas=points[1].copy(),
            sigmas=points[2].copy(),
            denoised_from_input=points[3].copy(),
            denoised_from_output=points[4].copy(),
            start=table[:, 0].copy(),
            outputs=table[:, 1 : 1 + n].copy(),
            noises=table[:, first_noise : first_noise + self._noises].copy(),
            init_noise_sigma=init_noise_sigma,
            options=options,
        )
