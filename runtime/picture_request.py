"""What picture to draw with all stages of a pipeline, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from lehr.runtime.controlnet import Steering
from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance.setting import Guidance
from lehr.runtime.pipelines.family import MicroConditions
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.start import check_strength

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRequest:
    """What picture to draw. None stands for the pipeline's own default.

    Attributes:
        prompts: one for all pictures, or several, used in turn; "" is allowed.
        negative_prompts: what guidance subtracts, in the same way; nothing said is not the same as "" to SDXL.
        class_labels: for pipelines that draw classes: numbers or names, used in turn.
        num: how many pictures; by default one a prompt, one a label or one a seed.
        seed: with the picture's number it determines all noise, whatever the batch.
        seeds: a seed for each picture instead.
        height, width: in pixels; by default those of ``init``, else the model's own.
        sampler: a native sampler, or "scheduler", the model's own.
        num_inference_steps: of the schedule; img2img runs the last of them.
        eta: share of injected noise, for samplers that take it.
        guidance_scale: 1 and below is no guidance, as in diffusers.
        true_guidance_scale: for networks that are told their guidance scale: of guidance by two evaluations besides,
            which needs negative prompts; 1 is none.
        guidance: how guidance acts beyond its scale.
        micro: SDXL's micro-conditioning.
        init: (3, H, W) or (num, 3, H, W) in [0, 1]: what img2img starts from and inpainting keeps.
        mask: (H, W) or (num, H, W), at least 0.5 where it is redrawn.
        strength: with ``init``, the share of the steps that is run, in (0, 1]; with a mask by default 1.
        controls: what each ControlNet of the bundle is given, in their order; where there are none, no ControlNet acts.
        table: a solver table; overrides sampler, steps and eta.
        batch: how many latents are drawn at once.
        tile: latent cells along the side of a tile that is decoded at once; 0 decodes whole, None decides by size.
    """

    prompts: Sequence[str] = ()
    negative_prompts: Sequence[str] | None = None
    class_labels: Sequence[int | str] = ()
    num: int | None = None
    seed: int = 0
    seeds: Sequence[int] = ()
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    true_guidance_scale: float = 1.0
    guidance: Guidance = field(default_factory=Guidance)
    micro: MicroConditions = field(default_factory=MicroConditions)
    init: Array | None = None
    mask: Array | None = None
    strength: float | None = None
    controls: Sequence[Steering] = ()
    table: SolverTable | None = None
    batch: int = 4
    tile: int | None = None

    def __post_init__(self) -> None:
        for name, texts in (("prompts", self.prompts), ("negative_prompts", self.negative_prompts)):
            if isinstance(texts, str):
                raise InvalidInput(f"{name} is one text, expected a sequence of texts: {name}=[{texts!r}].")
        if self.negative_prompts is not None and not self.negative_prompts:
            raise InvalidInput("negative_prompts holds no text; leave it out to say nothing.")
        if self.init is None and (self.strength is not None or self.mask is not None):
            raise InvalidInput("a strength or a mask needs a picture to start from; give init (--init).")
        if self.strength is not None:
            check_strength(self.strength)
        if self.num is not None and self.num < 1:
            raise InvalidInput(f"the number of pictures must be at least 1, got {self.num}.")
        given = {"prompts": self.prompts, "negative prompts": self.negative_prompts or (), "labels": self.class_labels}
        for what, items in given.items():
            if len(items) > self.count:
                raise InvalidInput(f"{len(items)} {what} were given for {self.count} pictures; ask for more (--num).")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and size < 1:
                raise InvalidInput(f"the {name} must be at least 1 pixel, got {size}.")
        if self.tile is not None and self.tile < 0:
            raise InvalidInput(f"a tile has a positive number of latent cells, or 0 for the whole, got {self.tile}.")

    @property
    def count(self) -> int:
        """How many pictures are drawn."""
        return self.num or max(1, len(self.seeds), len(self.prompts), len(self.class_labels))
