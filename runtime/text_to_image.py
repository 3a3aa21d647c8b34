"""Pictures from words: text encoders, the denoiser's loop and the decoder of a bundle, one after the other.

What the stages feed each other is a family's own (:mod:`lehr.runtime.pipelines`); this file knows the order, sizes,
img2img, inpainting, and what stays in memory.

Shape legend: N pictures, C latent channels, H W height and width in pixels, h w those of the latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.bundle import Bundle
from lehr.runtime.controlnet import controlled
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.guidance import PerEvaluation, embedding_names
from lehr.runtime.hoisted import Residency
from lehr.runtime.host import return_freed_memory
from lehr.runtime.latents import STEERED, Coder
from lehr.runtime.lora import Applied
from lehr.runtime.picture_request import PictureRequest
from lehr.runtime.pipeline import OnProgress, Pipeline, Request, open_denoiser
from lehr.runtime.pipeline_spec import PipelineSpec
from lehr.runtime.pipelines import family_of
from lehr.runtime.pipelines.family import Drawing, Family
from lehr.runtime.pipelines.text import TextEncoders
from lehr.runtime.requested_table import requested_table
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import ModelSpec
from lehr.runtime.stage import StageSpec
from lehr.runtime.stages import DENOISER, Stages, StageSet
from lehr.runtime.start import Known, begun_late
from lehr.runtime.stored_tables import SCHEDULER, StoredTables
from lehr.runtime.tokenizer import MAX_BYTES

__all__ = ["PictureRequest", "TextToImage"]

Array = npt.NDArray[Any]
Warn = Callable[[str], None]

JOINED = "sample_cond"  # the input that inpainting networks join to their sample: the mask and the masked latent


class TextToImage:
    """All stages of a pipeline. ``TextToImage.open("sd.lehr")(PictureRequest(prompts=["a red fox"]))``.

    Args:
        model: the denoiser's spec.
        spec: of the pipeline.
        stages: everything beside the denoiser; engines, or anything of that shape.
        open_denoiser: loads the denoiser.
        tables: of its own scheduler, by number of steps.
        read: content of a file that the spec names.
        residency: with ``PHASES`` the denoiser is opened for each call and let go after its loop, and large latents
            are decoded in tiles; with the others it stays.
        warn: told what of a prompt does not reach a text encoder; by default a ``UserWarning``.

    Raises:
        UnknownName: a family of pipelines that is not known here.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: PipelineSpec,
        stages: StageSet,
        *,
        open_denoiser: Callable[[], Denoiser],
        tables: Mapping[int, SolverTable] | None = None,
        read: Callable[[str], bytes],
        residency: Residency = Residency.AUTO,
        warn: Warn | None = None,
    ) -> None:
        self.model, self.spec, self.stages = model, spec, stages
        self._family: Family = family_of(spec, model)
        self._open, self._sparing = open_denoiser, residency is Residency.PHASES
        self._denoiser: Denoiser | None = None
        self._exchange: Callable[[Sequence[Applied]], None] | None = None
        self._tables: Mapping[int, SolverTable] = tables or {}
        self._encoders = TextEncoders(spec, stages, read, warn or _warned)
        self._coder = Coder(spec, model, stages, self._family)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        target: str = "cpu",
        recipe: str = "fp32",
        stage_recipes: Mapping[str, str] | None = None,
        low_memory: bool = False,
        loras: Sequence[Applied] = (),
        warn: Warn | None = None,
    ) -> TextToImage:
        """The pipeline of a bundle, by its engines for ``target``; engines are loaded when they are first needed.

        Args:
            path: the bundle.
            target: class of machine.
            recipe: of the denoiser, and of stages that were built in it; the others run in fp32.
            stage_recipes: by the name of the stage.
            low_memory: one stage in memory at a time, loaded when it is needed.
            loras: merged into the weights as they are loaded; engines on disk stay as they are.
            warn: see the class.

        Raises:
            BundleError: a damaged bundle, or one of a denoiser alone.
            UnknownName: ``stage_recipes`` names no stage of the bundle.
        """
        bundle = Bundle.open(path)
        spec = bundle.manifest.pipeline
        if spec is None:
            raise BundleError(
                f"{path} holds a denoiser and no pipeline around it, so it draws from arrays and not from words. "
                "Export the whole pipeline: lehr export FOLDER -o NAME.lehr"
            )
        residency = Residency.PHASES if low_memory else Residency.AUTO
        stages = Stages(
            bundle,
            target=target,
            recipes={DENOISER: recipe, **(stage_recipes or {})},
            residency=residency,
            loras=loras,
        )
        used = list(loras)

        def exchange(loras: Sequence[Applied]) -> None:
            used[:] = loras
            stages.use_loras(loras)

        pipeline = cls(
            bundle.manifest.model,
            spec,
            stages,
            open_denoiser=lambda: open_denoiser(path, target=target, recipe=recipe, residency=residency, loras=used),
            tables=StoredTables(bundle),
            read=lambda name: bundle.read_bytes(name, MAX_BYTES),
            residency=residency,
            warn=warn,
        )
        pipeline._exchange = exchange
        return pipeline

    def use_loras(self, loras: Sequence[Applied] = ()) -> None:
        """Exchange the LoRAs in the weights of all stages; without any, they are the model's own again, bit for bit.

        Raises:
            InvalidInput: a pipeline that was not opened from a bundle.
        """
        if self._exchange is None:
            raise InvalidInput("this pipeline was made of its parts; open it from its bundle to exchange LoRAs.")
        self._exchange(loras)
        self._denoiser = None

    # -------------------------------------------------------------------------------------------------- calling

    def __call__(
        self,
        request: PictureRequest,
        *,
        on_progress: OnProgress | None = None,
        per_evaluation: PerEvaluation | None = None,
    ) -> Array:
        """Draw pictures.

        Args:
            request: what to draw.
            on_progress: as :meth:`lehr.runtime.pipeline.Pipeline.__call__` takes it.
            per_evaluation: likewise, for networks with inputs that are made at every evaluation.

        Returns:
            (N, 3, H, W) float32 in [0, 1].

        Raises:
            InvalidInput: a request that the pipeline cannot meet.
            BundleError: a stage or an engine is missing.
            RunFailed: an engine failed, or drew values that are not finite.
        """
        latents = self.latents(request, on_progress=on_progress, per_evaluation=per_evaluation)
        return self.decode(latents, tile=request.tile)

    def latents(
        self,
        request: PictureRequest,
        *,
        on_progress: OnProgress | None = None,
        per_evaluation: PerEvaluation | None = None,
    ) -> Array:
        """The same up to the decoder: (N, C, h, w), what the loop returned, unpacked; raises as the call does."""
        height, width = self._size(request)
        drawing = self._drawing(request, height, width)
        found = self._family.conditions(drawing, self._encoders)
        init, mask, joined = self._start(request, height, width)
        self._let_go()
        conditions = {**found.given} if joined is None else {**found.given, JOINED: joined}
        asked = self._request(request, drawing, conditions, found.without, init, mask)
        pipeline = Pipeline(self._loaded(), tables=self._tables)
        table = pipeline.table(asked)

        def prepared(k: int, stage: StageSpec, picture: Array) -> Array:
            """What a ControlNet takes: the picture, or where it works on tokens (FLUX) the picture's latent."""
            if len(stage.inputs[-1].shape) == 4:
                return picture
            return self._family.to_sample(self._coder.encode(request, picture, height, width, stream=STEERED + k))

        with controlled(self.model, self.stages, request.controls, table, drawing.num, prepared) as steered:
            samples = pipeline(asked, on_progress=on_progress, per_evaluation=per_evaluation or steered)
        return self._family.to_latents(samples, height // self._family.factor, width // self._family.factor)

    def decode(self, latents: Array, *, tile: int | None = None) -> Array:
        """(N, C, h, w) latents as (N, 3, H, W) pictures in [0, 1]; ``tile`` as the request has it."""
        self._let_go()
        return self._coder.decode(latents, tile, sparing=self._sparing)

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of a picture for which neither is named."""
        return self._family.default_size()

    @property
    def prompted(self) -> bool:
        """Whether the pipeline is asked in words; else in classes."""
        return self._family.prompted

    def table(self, request: PictureRequest) -> SolverTable:
        """The whole schedule that a request is drawn with, of which img2img runs the last steps."""
        given = self._given(request, *self._size(request))
        steps = request.num_inference_steps
        asked = Request(sampler=request.sampler, num_inference_steps=steps, eta=request.eta, table=given)
        return requested_table(asked, self.model, self._tables)

    def evaluations(self, request: PictureRequest) -> int:
        """How often a request evaluates the denoiser in each of its batches."""
        table, strength = self.table(request), self._strength(request)
        if request.init is None or (self._joins and strength == 1.0):
            return len(table)
        return len(begun_late(table, self._share(request, strength)))

    # -------------------------------------------------------------------------------------------------- working out

    @property
    def _joins(self) -> bool:
        return any(tensor.name == JOINED for tensor in self.model.conditions)

    def _size(self, request: PictureRequest) -> tuple[int, int]:
        usual = self.default_size() if request.init is None else np.asarray(request.init).shape[-2:]
        height, width = request.height or usual[0], request.width or usual[1]
        self._family.check_size(height, width)
        return height, width

    def _drawing(self, request: PictureRequest, height: int, width: int) -> Drawing:
        num, chosen = request.count, self._family
        if chosen.prompted and request.class_labels:
            raise InvalidInput(f"{self.model.name} is asked in words, not in classes; give a prompt (--prompt).")
        if not chosen.prompted and (request.prompts or request.negative_prompts is not None):
            raise InvalidInput(f"{self.model.name} draws classes, not prompts; name them with --class-label.")
        if chosen.prompted and not request.prompts:
            raise InvalidInput(f"{self.model.name} needs a prompt (--prompt); an empty one is allowed.")
        scale = self._scale(request)
        return Drawing(
            prompts=_in_turn(request.prompts, num),
            negative=None if request.negative_prompts is None else _in_turn(request.negative_prompts, num),
            labels=chosen.class_numbers(_in_turn(request.class_labels or range(self.model.num_classes or 1), num)),
            guided=self._guided(request, scale),
            height=height,
            width=width,
            scale=scale,
            micro=request.micro,
        )

    def _scale(self, request: PictureRequest) -> float:
        if request.guidance_scale is not None:
            return request.guidance_scale
        return self._family.default_guidance_scale() if request.guidance.scale is None else request.guidance.scale

    def _guided(self, request: PictureRequest, scale: float) -> bool:
        """Whether the network is evaluated without its condition, too."""
        if not self._family.told_scale():
            if request.true_guidance_scale != 1.0:
                raise InvalidInput(
                    f"{self.model.name} is not told its guidance scale, so there is no second kind; use guidance_scale."
                )
            return scale > 1 or bool(request.guidance.schedule)
        return request.true_guidance_scale > 1 and request.negative_prompts is not None

    def _given(self, request: PictureRequest, height: int, width: int) -> SolverTable | None:
        """A table that depends on more than the denoiser and the steps; None for all others."""
        if request.table is not None or request.sampler not in (None, SCHEDULER):
            return request.table
        table = self._family.table(height, width, request.num_inference_steps)
        if table is not None and request.eta is not None:
            raise InvalidInput(f"{self.model.name}'s own scheduler injects no noise, so eta cannot change it.")
        return table

    def _request(
        self,
        request: PictureRequest,
        drawing: Drawing,
        conditions: Mapping[str, Array],
        without: Mapping[str, Array],
        init: Array | None,
        mask: Array | None,
    ) -> Request:
        """What the denoiser's pipeline is asked."""
        told = self._family.told_scale()
        scale = request.true_guidance_scale if told and drawing.guided else drawing.scale
        if not drawing.guided and not embedding_names(self.model):
            scale = 1.0
        table = self._given(request, drawing.height, drawing.width)
        asked = Request(
            num=drawing.num,
            seed=request.seed,
            seeds=request.seeds,
            sampler=request.sampler,
            num_inference_steps=request.num_inference_steps,
            eta=request.eta if table is None else None,
            guidance_scale=None if request.guidance.schedule else scale,
            guidance=replace(request.guidance, scale=None),
            conditions=conditions,
            unconditional=without,
            table=table,
            batch=request.batch,
            sizes=self._family.sizes(drawing.height, drawing.width),
        )
        if init is None:
            return asked
        share = self._share(request, self._strength(request))
        return replace(asked, init=init, strength=share, mask=mask, known=Known.INPUT)

    def _share(self, request: PictureRequest, strength: float) -> float:
        """The strength that makes the loop run as many steps as the family's pipeline would."""
        table = self.table(request)
        steps = table.options.get("num_inference_steps")
        steps = steps if isinstance(steps, int) and 1 <= steps <= len(table) + 1 else len(table)
        kept = self._family.kept_steps(steps, strength)
        if kept < 1:
            return strength  # refused where the steps are cut, with what to do
        return 1.0 if kept >= steps else (kept + 0.5) / steps

    def _strength(self, request: PictureRequest) -> float:
        if request.strength is not None:
            return request.strength
        return self._family.number("strength", self._family.strength) if request.mask is None else 1.0

    # ------------------------------------------------------------------------------------- img2img and inpainting

    def _start(
        self, request: PictureRequest, height: int, width: int
    ) -> tuple[Array | None, Array | None, Array | None]:
        """What the loop starts from, the mask of its known region, and what the network is fed of both.

        A network that was made for inpainting is fed the mask and what is kept, so its loop holds nothing; at full
        strength it starts from noise alone.
        """
        if request.init is None:
            if self._joins:
                raise InvalidInput(f"{self.model.name} was made for inpainting; give init and mask (--init, --mask).")
            return None, None, None
        cells = None if request.mask is None else self._coder.cells(request.mask, request.count, height, width)
        if self._joins:
            if cells is None:
                raise InvalidInput(f"{self.model.name} was made for inpainting; give a mask, too (--mask).")
            joined = self._coder.masked(request, request.init, cells, height, width)
            if self._strength(request) == 1.0:
                return None, None, joined
            cells = None
        else:
            joined = None
        latents = self._coder.encode(request, request.init, height, width)
        mask = None if cells is None else self._family.to_sample(np.broadcast_to(cells, latents.shape))
        return self._family.to_sample(latents), mask, joined

    def _let_go(self) -> None:
        """Between stages: what the last one took is free by now, and shall be free for others."""
        if self._sparing:
            return_freed_memory()

    def _loaded(self) -> Denoiser:
        denoiser = self._denoiser or self._open()
        if not self._sparing:
            self._denoiser = denoiser
        return denoiser


def _in_turn(items: Any, num: int) -> tuple[Any, ...]:
    return tuple(items[k % len(items)] for k in range(num)) if items else ()


def _warned(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)
