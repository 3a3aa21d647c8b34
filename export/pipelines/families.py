"""Which pipelines can be exported whole, as data: diffusers' classes, and what each takes from its text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lehr.export.encoders.maps import Known
from lehr.export.encoders.outputs import TextOutput
from lehr.runtime.pipeline_spec import LatentSpec
from lehr.runtime.spec import ModelSpec

CONTEXT = "encoder_hidden_states"  # the denoiser's input that text goes to

_SD = LatentSpec(channels=4, factor=8, scaling_factor=0.18215)
_XL = LatentSpec(channels=4, factor=8, scaling_factor=0.13025)
_SD3 = LatentSpec(channels=16, factor=8, scaling_factor=1.5305, shift_factor=0.0609)
_FLUX = LatentSpec(channels=16, factor=8, scaling_factor=0.3611, shift_factor=0.1159)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """One text encoder of a pipeline.

    Attributes:
        stage, tokenizer: diffusers' names of the two components.
        output: what the pipeline takes.
        max_length: tokens that the pipeline pads a prompt to; None for what the tokenizer says.
        context: whether the features are channels of ``encoder_hidden_states``; those of several stand side by side.
        required: whether the pipeline's class needs it.
    """

    stage: str
    tokenizer: str
    output: TextOutput
    max_length: int | None = None
    context: bool = True
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One family of pipelines.

    Attributes:
        family: its file in ``lehr.runtime.pipelines``.
        class_name: the diffusers class that single files are taken for.
        latent: what it does to a latent, where no folder says it.
        text: its text encoders, in diffusers' order.
        steps: number of steps that its class draws with, where the denoiser does not say it.
    """

    family: str
    class_name: str
    latent: LatentSpec
    text: tuple[TextPart, ...] = ()
    steps: int | None = None


_CLIP = TextPart(stage="text_encoder", tokenizer="tokenizer", output=TextOutput.LAST_HIDDEN_STATE)
_SECOND = TextPart(stage="text_encoder_2", tokenizer="tokenizer_2", output=TextOutput.PENULTIMATE_HIDDEN_STATE)


def _t5(stage: str, tokenizer: str, tokens: int, *, required: bool = True) -> TextPart:
    output = TextOutput.LAST_HIDDEN_STATE
    return TextPart(stage=stage, tokenizer=tokenizer, output=output, max_length=tokens, required=required)


def _first(output: TextOutput, *, context: bool = True, required: bool = True) -> TextPart:
    return TextPart(stage="text_encoder", tokenizer="tokenizer", output=output, context=context, required=required)


STABLE_DIFFUSION = Kind(family="stable_diffusion", class_name="StableDiffusionPipeline", latent=_SD, text=(_CLIP,))
LATENT_CONSISTENCY = Kind(
    family="latent_consistency", class_name="LatentConsistencyModelPipeline", latent=_SD, text=(_CLIP,), steps=4
)
SDXL = Kind(
    family="stable_diffusion_xl",
    class_name="StableDiffusionXLPipeline",
    latent=_XL,
    text=(_first(TextOutput.PENULTIMATE_HIDDEN_STATE, required=False), _SECOND),  # the refiner has the second alone
)
SD3 = Kind(
    family="stable_diffusion_3",
    class_name="StableDiffusion3Pipeline",
    latent=_SD3,
    text=(
        _first(TextOutput.PENULTIMATE_HIDDEN_STATE, context=False),
        TextPart(
            stage="text_encoder_2",
            tokenizer="tokenizer_2",
            output=TextOutput.PENULTIMATE_HIDDEN_STATE,
            context=False,
        ),
        _t5("text_encoder_3", "tokenizer_3", 256, required=False),
    ),
)
# The distilled model without a guidance input was trained with 256 tokens of T5, the other one with 512.
FLUX_DEV, FLUX_SCHNELL = (
    Kind(
        family="flux",
        class_name="FluxPipeline",
        latent=_FLUX,
        text=(_first(TextOutput.POOLER_OUTPUT, context=False), _t5("text_encoder_2", "tokenizer_2", tokens)),
    )
    for tokens in (512, 256)
)
PIXART_ALPHA = Kind(
    family="pixart_alpha", class_name="PixArtAlphaPipeline", latent=_SD, text=(_t5("text_encoder", "tokenizer", 120),)
)
PIXART_SIGMA = Kind(
    family="pixart_alpha", class_name="PixArtSigmaPipeline", latent=_XL, text=(_t5("text_encoder", "tokenizer", 300),)
)
DIT = Kind(family="dit", class_name="DiTPipeline", latent=_SD)

CLASSES: Mapping[str, Kind] = MappingProxyType(
    {
        "DiTPipeline": DIT,
        "FluxImg2ImgPipeline": FLUX_DEV,
        "FluxInpaintPipeline": FLUX_DEV,
        "FluxPipeline": FLUX_DEV,
        "LatentConsistencyModelImg2ImgPipeline": LATENT_CONSISTENCY,
        "LatentConsistencyModelPipeline": LATENT_CONSISTENCY,
        "PixArtAlphaPipeline": PIXART_ALPHA,
        "PixArtSigmaPipeline": PIXART_SIGMA,
        "StableDiffusion3Img2ImgPipeline": SD3,
        "StableDiffusion3InpaintPipeline": SD3,
        "StableDiffusion3Pipeline": SD3,
        "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
        "StableDiffusionInpaintPipeline": STABLE_DIFFUSION,
        "StableDiffusionPipeline": STABLE_DIFFUSION,
        "StableDiffusionXLImg2ImgPipeline": SDXL,
        "StableDiffusionXLInpaintPipeline": SDXL,
        "StableDiffusionXLPipeline": SDXL,
    }
)


def refine(kind: Kind, denoiser: ModelSpec) -> Kind:
    """``kind`` as its denoiser needs it, where the class alone does not tell."""
    guided = any(tensor.name == "guidance" for tensor in denoiser.conditions)
    return FLUX_SCHNELL if kind.family == "flux" and not guided else kind


def of_denoiser(denoiser: ModelSpec) -> Kind | None:
    """The family of pipelines that a denoiser out of a single file belongs to; None for one that draws pixels."""
    inputs = {tensor.name for tensor in denoiser.conditions}
    families = {
        "dit": DIT,
        "flux": FLUX_DEV,
        "latent_unet": LATENT_CONSISTENCY if "timestep_cond" in inputs else STABLE_DIFFUSION,
        "mmdit": SD3,
        "pixart": PIXART_ALPHA,
        "sdxl": SDXL,
    }
    return families.get(denoiser.family)


def known_encoders(kind: Kind, denoiser: ModelSpec) -> Mapping[str, Known]:
    """The published text encoder behind each stage; single files do not say their architecture.

    The width of the denoiser's text tells Stable Diffusion 2 from 1, and SDXL's refiner from its base.
    """
    width = context_width(denoiser)
    if kind in (STABLE_DIFFUSION, LATENT_CONSISTENCY):
        return {"text_encoder": Known.OPENCLIP_H if width == _OPENCLIP_H_WIDTH else Known.CLIP_L}
    if kind is SDXL:
        first = {} if width == _OPENCLIP_G_WIDTH else {"text_encoder": Known.CLIP_L}
        return {**first, "text_encoder_2": Known.OPENCLIP_G}
    if kind is SD3:
        return {
            "text_encoder": Known.CLIP_L_PROJECTED,
            "text_encoder_2": Known.OPENCLIP_G,
            "text_encoder_3": Known.T5_XXL,
        }
    if kind.family == "flux":
        return {"text_encoder": Known.CLIP_L, "text_encoder_2": Known.T5_XXL}
    return {part.stage: Known.T5_XXL for part in kind.text}


_OPENCLIP_H_WIDTH, _OPENCLIP_G_WIDTH = 1024, 1280


def context_width(denoiser: ModelSpec) -> int | None:
    """Channels of the text that a denoiser takes; None for one that takes none, or any."""
    found = next((tensor.shape[-1] for tensor in denoiser.conditions if tensor.name == CONTEXT), None)
    return found if isinstance(found, int) else None
