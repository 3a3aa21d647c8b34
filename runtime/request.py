"""What to draw, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance.setting import Guidance
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import BATCH
from lehr.runtime.start import Known, check_strength

Array = npt.NDArray[Any]

STRENGTH = 0.8  # of img2img, diffusers' default; inpainting redraws the unknown region whole, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to draw. None stands for the model's own default.

    Attributes:
        num: how many samples; by default one a seed, one a label, or one.
        seed: with the sample's number it determines the noise, whatever the batch.
        seeds: a seed for each sample instead; ``seeds=[k]`` draws what sample 0 of ``seed=k`` is.
        sampler: a native sampler, or "scheduler", the model's own, whose tables were stored at export; by default that
            one where there are tables, else what suits the model.
        eta: share of injected noise, for samplers that take it; by default the sampler's own.
        guidance_scale: of guidance; the same as ``Guidance(scale=…)``.
        guidance: how guidance acts, beyond its scale.
        classifier_scale: of classifier guidance, for pipelines with a classifier.
        class_labels: used in turn; by default all classes in turn.
        conditions: for models with other conditions than a class: name -> (num, …).
        unconditional: what guidance subtracts, for such models.
        table: a solver table; overrides sampler, steps and eta.
        batch: how many samples run at once.
        sizes: dimensions other than the batch, such as height and width.
        init: (C, H, W) or (num, C, H, W): start from this x_0 with noise on it (img2img), not from noise alone.
        strength: with ``init``, the share of the steps that is run, in (0, 1]; by default 0.8, with a mask 1.
        mask: with ``init``, 1 where it is redrawn and 0 where it is kept: (H, W), (C, H, W) or one a sample.
        known: how a mask's known region is held. With ``Known.INPUT`` and strength 1 the loop starts from noise alone.
        noisy: (num, C, H, W): x_t at ``table``'s first evaluation, from a loop that ended there.
        first_noise: number of the first injected noise; a loop that goes on from ``noisy`` counts on.
    """

    num: int | None = None
    seed: int = 0
    seeds: Sequence[int] = ()
    sampler: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    guidance: Guidance = field(default_factory=Guidance)
    classifier_scale: float = 1.0
    class_labels: Sequence[int] = ()
    conditions: Mapping[str, Array] = field(default_factory=dict)
    unconditional: Mapping[str, Array] = field(default_factory=dict)
    table: SolverTable | None = None
    batch: int = 16
    sizes: Mapping[str, int] = field(default_factory=dict)
    init: Array | None = None
    strength: float | None = None
    mask: Array | None = None
    known: Known = Known.ESTIMATE
    noisy: Array | None = None
    first_noise: int = 0

    def __post_init__(self) -> None:
        if self.num is not None and self.num < 1:
            raise InvalidInput(f"the number of samples must be at least 1, got {self.num}.")
        if self.seeds and self.num not in (None, len(self.seeds)):
            raise InvalidInput(f"{len(self.seeds)} seeds were given for {self.num} samples; give one seed a sample.")
        if not 1 <= self.batch <= BATCH.max // 2:
            raise InvalidInput(f"the batch must be 1 to {BATCH.max // 2} (guidance doubles it), got {self.batch}.")
        if self.guidance_scale is not None and (self.guidance.scale is not None or self.guidance.schedule):
            raise InvalidInput("guidance_scale and the scale or schedule of guidance say the same; give one of them.")
        if not math.isfinite(self.classifier_scale):
            raise InvalidInput(f"the classifier's scale must be finite, got {self.classifier_scale}.")
        if self.strength is not None:
            check_strength(self.strength)
        if self.init is None and (self.strength is not None or self.mask is not None):
            raise InvalidInput("a strength or a mask needs a sample to start from; give init (--init).")
        if self.noisy is not None and (self.table is None or self.init is not None):
            raise InvalidInput("a noisy sample goes on with the table that begins at its timestep, and without init.")
        if self.first_noise < 0:
            raise InvalidInput(f"the number of the first injected noise is 0 or more, got {self.first_noise}.")

    @property
    def count(self) -> int:
        """How many samples are drawn."""
        return self.num or max(1, len(self.seeds), len(self.class_labels))

    @property
    def share(self) -> float:
        """The share of the schedule that is run: the strength, 1 without ``init``."""
        if self.init is None:
            return 1.0
        if self.strength is not None:
            return self.strength
        return STRENGTH if self.mask is None else 1.0
