"""What the files of this folder have in common: a family of pipelines as an object with a few overridable answers.

Shape legend: N pictures, C latent channels, H W height and width of the latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.guidance import embedding_names
from lehr.runtime.pipeline_spec import LatentSpec, PipelineSpec
from lehr.runtime.pipelines.flow_schedule import own_table
from lehr.runtime.pipelines.text import TextEncoders
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import Dim, ModelSpec

Array = npt.NDArray[Any]

FLOW_SHIFT, DYNAMIC = "flow_shift", "dynamic"  # a note of the denoiser: its scheduler depends on the picture's size
_TOKEN = 2  # latent cells along one side of a token, by which flow schedulers count


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroConditions:
    """SDXL's micro-conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2), in pixels.

    None stands for the size that is drawn, and in what guidance subtracts for the size that the prompt has.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)  # top, left
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0  # of the refiner
    negative_aesthetic_score: float = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What is to be drawn, worked out: one entry a picture.

    Attributes:
        prompts: texts.
        negative: what guidance subtracts; None where nothing was said.
        labels: classes.
        guided: whether the network is evaluated without its condition, too.
        height, width: pixels.
        scale: of a guidance that the network is told, for networks that take one.
        micro: SDXL's.
    """

    prompts: tuple[str, ...]
    negative: tuple[str, ...] | None
    labels: tuple[int, ...]
    guided: bool
    height: int
    width: int
    scale: float
    micro: MicroConditions = field(default_factory=MicroConditions)

    @property
    def num(self) -> int:
        return max(len(self.prompts), len(self.labels))

    @property
    def subtracted(self) -> tuple[str, ...]:
        """The negative prompts, empty texts where there are none; nothing at all without guidance."""
        if not self.guided:
            return ()
        return self.negative if self.negative is not None else ("",) * self.num


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Feeds of the denoiser by name, a row a picture; ``without`` is what guidance subtracts."""

    given: Mapping[str, Array]
    without: Mapping[str, Array] = field(default_factory=dict)


class Family(ABC):
    """The conventions of one diffusers pipeline.

    Attributes:
        guidance_scale: by default.
        strength: of img2img, by default.
        prompted: whether it is asked in words.
    """

    guidance_scale: ClassVar[float] = 7.5
    strength: ClassVar[float] = 0.8
    prompted: ClassVar[bool] = True

    def __init__(self, spec: PipelineSpec, model: ModelSpec) -> None:
        self.spec, self.model = spec, model

    # ----------------------------------------------------------------------------------------- to be overridden

    @abstractmethod
    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        """What the denoiser is fed beside the sample and the timestep."""

    def class_numbers(self, labels: Sequence[int | str]) -> tuple[int, ...]:
        """Classes by number or name, for a family that is asked in classes; raises InvalidInput for an unknown one."""
        return ()

    def to_sample(self, latents: Array) -> Array:
        """(N, C, H, W) as the denoiser takes it."""
        return latents

    def to_latents(self, samples: Array, height: int, width: int) -> Array:
        """What the denoiser's loop returned as (N, C, H, W); ``height`` and ``width`` are the latent's."""
        return samples

    def kept_steps(self, num_inference_steps: int, strength: float) -> int:
        """How many of the last steps img2img runs."""
        return min(int(num_inference_steps * strength), num_inference_steps)

    # -------------------------------------------------------------------------------------------------- options

    def default_guidance_scale(self) -> float:
        """What the pipeline was made for, else what the class has by default."""
        if "guidance_scale" in self.spec.options:
            return self.number("guidance_scale", 0.0)
        of_model = self.model.sampling.guidance_scale
        return self.guidance_scale if of_model == 1.0 else of_model

    def number(self, option: str, default: float) -> float:
        value = self.spec.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BundleError(f"pipeline option {option!r} is {value!r}, expected a number. Export the model again.")
        return float(value)

    def flag(self, option: str, *, default: bool) -> bool:
        value = self.spec.options.get(option, default)
        if not isinstance(value, bool):
            raise BundleError(f"pipeline option {option!r} is {value!r}, expected a boolean. Export the model again.")
        return value

    def told_scale(self) -> bool:
        """Whether the guidance scale is an input of the network (distilled), if it is anything at all."""
        return bool(embedding_names(self.model))

    # ---------------------------------------------------------------------------------------------------- sizes

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 1 if self.spec.latent is None else self.spec.latent.factor

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels, where the caller names none."""
        found = []
        for axis, name in ((-2, "default_height"), (-1, "default_width")):
            cells = self._side(axis).default
            found.append(int(self.number(name, cells * self.factor)))
        return found[0], found[1]

    def check_size(self, height: int, width: int) -> None:
        """Raise InvalidInput unless the denoiser and the decoder can draw this many pixels."""
        for axis, what, pixels in ((-2, "height", height), (-1, "width", width)):
            side = self._side(axis)
            unit = self.factor * side.multiple
            low, high = (-(-side.min // side.multiple)) * unit, side.max // side.multiple * unit
            if low <= pixels <= high and pixels % unit == 0:
                continue
            below = min(max(pixels // unit * unit, low), high)
            above = min(below + unit, high)
            nearest = f"{below}" if below == above or pixels <= low else f"{below} or {above}"
            raise InvalidInput(
                f"{self.model.name} draws pictures whose {what} is a multiple of {unit} from {low} to {high} pixels, "
                f"got {pixels}; nearest: {nearest}."
            )

    def sizes(self, height: int, width: int) -> dict[str, int]:
        """The denoiser's dimensions for a picture of so many pixels."""
        cells = {"height": height // self.factor, "width": width // self.factor}
        return {name: size for name, size in cells.items() if name in self.model.sample.shape}

    def _side(self, axis: int) -> Dim:
        """What one side of the latent may be, in cells."""
        size = self.model.sample.shape[axis]
        if isinstance(size, str):
            return self.model.dim(size)
        return Dim(name="side", default=size, min=size, max=size)

    # ------------------------------------------------------------------------------------------------- schedule

    def table(self, height: int, width: int, num_inference_steps: int | None) -> SolverTable | None:
        """The model's own schedule where it is a formula of the picture's size; None where tables hold it.

        Raises:
            InvalidInput: the schedule depends on the size, and is known for another size only.
        """
        size = _TOKEN * self.factor
        tokens = (height // size) * (width // size)
        table = own_table(self.model, self.spec.options, tokens, num_inference_steps)
        if table is None and self.model.notes.get(FLOW_SHIFT) == DYNAMIC:
            usual = self.default_size()
            if (usual[0] // size) * (usual[1] // size) != tokens:
                raise InvalidInput(
                    f"{self.model.name}'s scheduler depends on the picture's size, and its table is for "
                    f"{usual[0]} x {usual[1]} pixels, not for {height} x {width}. Draw that size, or name a native "
                    "sampler (--sampler, lehr list samplers)."
                )
        return table


def latent_of(spec: PipelineSpec) -> LatentSpec:
    """The pipeline's latent; raises BundleError for a pipeline of pixels."""
    if spec.latent is None:
        raise BundleError(f"{spec.class_name} has no latent, and its family {spec.family!r} needs one.")
    return spec.latent


def rows(value: Any, num: int) -> Array:
    """One row of numbers for every picture, as float32."""
    return np.tile(np.asarray(value, dtype=np.float32), (num, 1))


def rounded_up(num_inference_steps: int, strength: float) -> int:
    """The steps that flow pipelines keep in img2img: they round the steps left out down, not those kept."""
    return num_inference_steps - int(max(num_inference_steps - num_inference_steps * strength, 0))
