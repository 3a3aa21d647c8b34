"""A whole pipeline about to be exported, put together from its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lehr.export.autoencoders.folder import Autoencoder
from lehr.export.pipelines.families import Kind, TextPart, context_width
from lehr.export.source import Source
from lehr.export.stages import StageSource
from lehr.runtime.errors import InvalidInput
from lehr.runtime.pipeline_spec import PipelineSpec, TokenizerSpec
from lehr.runtime.spec import ModelSpec

Options = Mapping[str, bool | int | float | str]

PACK = 2  # latent cells along one side of a token, where the denoiser counts tokens (FLUX)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSource:
    """Everything that one bundle of a pipeline holds.

    Attributes:
        denoiser: the network that runs at every step; its spec may have been completed from the pipeline.
        stages: the others, in the order in which they are exported.
        tokenizers: content of ``tokenizer.json`` by stage.
        spec: how they make a picture.
        left_out: components of the source that are not exported.
    """

    denoiser: Source
    stages: tuple[StageSource, ...]
    tokenizers: Mapping[str, bytes]
    spec: PipelineSpec
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text encoder and its tokenizer, read."""

    encoder: StageSource
    tokenizer: bytes
    spec: TokenizerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The parts of a pipeline, read from wherever they are."""

    denoiser: Source
    kind: Kind
    class_name: str
    text: Mapping[str, Text]
    autoencoder: Autoencoder
    options: Options = field(default_factory=dict)
    left_out: Sequence[str] = ()


def assemble(found: Found, *, structure_only: bool) -> PipelineSource:
    """Hold the parts against each other and make one source of them.

    Raises:
        InvalidInput: parts that do not belong together.
    """
    vae, denoiser = found.autoencoder, found.denoiser.spec
    _check_latent(denoiser, vae)
    _check_text(denoiser, found.kind.text, found.text)
    halves = (vae.decoder, vae.encoder)
    stages = [*(text.encoder for text in found.text.values()), *(half for half in halves if half is not None)]
    if structure_only:
        stages = [replace(stage, weights=None) for stage in stages]
    if found.kind.steps is not None:
        denoiser = replace(denoiser, sampling=replace(denoiser.sampling, num_inference_steps=found.kind.steps))
    return PipelineSource(
        denoiser=replace(found.denoiser, spec=denoiser),
        stages=tuple(stages),
        tokenizers={name: text.tokenizer for name, text in found.text.items()},
        spec=PipelineSpec(
            family=found.kind.family,
            class_name=found.class_name,
            tokenizers={name: text.spec for name, text in found.text.items()},
            latent=vae.latent,
            options=found.options,
        ),
        left_out=tuple(found.left_out),
    )


def latent_size(denoiser: ModelSpec) -> int:
    """Latent cells along one side of a usual picture."""
    sizes = denoiser.default_sizes()
    if "image_tokens" in sizes:
        return PACK * math.isqrt(sizes["image_tokens"])
    return denoiser.sample_shape(1)[-1]


def _check_latent(denoiser: ModelSpec, vae: Autoencoder) -> None:
    shape = denoiser.sample_shape(1)
    expected = vae.latent.channels * (PACK**2 if len(shape) == 3 else 1)
    channels = shape[-1] if len(shape) == 3 else shape[1]
    if channels != expected:
        raise InvalidInput(
            f"the denoiser works on {channels} channels, the autoencoder ({vae.decoder.origin}) has latents that make "
            f"{expected}. They do not belong together; name another with --vae, or export the denoiser alone with "
            "--denoiser-only."
        )


def _check_text(denoiser: ModelSpec, parts: Sequence[TextPart], text: Mapping[str, Text]) -> None:
    """The features that stand side by side must be as wide as what the denoiser takes."""
    used = [part for part in parts if part.context and part.stage in text]
    widths = [text[part.stage].encoder.spec.outputs[0].shape[-1] for part in used]
    wanted, width = context_width(denoiser), sum(size for size in widths if isinstance(size, int))
    if used and wanted is not None and width != wanted:
        names = ", ".join(part.stage for part in used)
        raise InvalidInput(
            f"the denoiser takes text of {wanted} channels, {names} give {width}. They do not belong together; name "
            "other encoders with --text-encoder, or export the denoiser alone with --denoiser-only."
        )
