"""Tiny pipelines of diffusers with random weights, one for each class that an export reads, written as folders.

The fixture ``tiny_pipeline`` in ``tests/conftest.py`` makes each once per session::

    def test_…(tiny_pipeline):
        folder = tiny_pipeline("StableDiffusionPipeline")

Every module is wide enough to have all parts of a published one and small enough to be made in about a second. A
latent is 4 times smaller than its picture on each side, a sample is 8 × 8 latent cells, 32 × 32 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

WIDTH = 32  # of a text encoder's tokens
LATENT_SIZE, FACTOR = 8, 4
WORDS = ("a", "photo", "of", "the", "cat", "dog", "red", "house", "sea", "blue", "night", "tree")

# ----------------------------------------------------------------------------------------------- tokenizers


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level pairs as CLIP's: every byte, every byte at a word's end, the words above, the two special tokens.

    As in CLIP's own vocabulary, "!" is number 0 and "<|endoftext|>" the last.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in visible]
    letters += [chr(256 + i) for i in range(256 - len(visible))]  # GPT-2's stand-ins for bytes that are not printed
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            if left + right not in tokens:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


CLIP_TOKENS = len(_clip_vocabulary()[0])


def clip_tokenizer(*, pad_token: str = "<|endoftext|>") -> Any:
    vocabulary, merges = _clip_vocabulary()
    return transformers.CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), pad_token=pad_token, model_max_length=77
    )


T5_TOKENS = 128


def t5_tokenizer(max_length: int) -> Any:
    """Unigrams: the special tokens, the words above, letters, and unused tokens up to a round number."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    pieces += [(chr(letter), -6.0) for letter in range(ord("a"), ord("z") + 1)]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(T5_TOKENS - len(pieces) - 1, -1, -1)]
    extra = sum(piece.startswith("<extra_id_") for piece, _ in pieces)
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=extra, model_max_length=max_length)


# ------------------------------------------------------------------------------------------------- encoders


def clip_config(
    *, width: int = WIDTH, layers: int = 3, act: str = "quick_gelu", projection: int = WIDTH, pad: int | None = None
) -> Any:
    """As published: ``eos_token_id`` 2 means that pooling looks for the highest id."""
    return transformers.CLIPTextConfig(
        vocab_size=CLIP_TOKENS,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1 if pad is None else pad,
    )


def clip_encoder(**options: Any) -> Any:
    return _stirred(transformers.CLIPTextModel(clip_config(**options)))


def clip_encoder_with_projection(**options: Any) -> Any:
    return _stirred(transformers.CLIPTextModelWithProjection(clip_config(**options)))


def t5_encoder(width: int = WIDTH) -> Any:
    config = transformers.T5Config(
        vocab_size=T5_TOKENS,
        d_model=width,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return _stirred(transformers.T5EncoderModel(config))


# --------------------------------------------------------------------------------------- autoencoder, denoisers


def autoencoder(channels: int = 4, **options: Any) -> Any:
    return _stirred(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=channels,
            sample_size=LATENT_SIZE * FACTOR,
            **options,
        )
    )


def unet(in_channels: int = 4, **options: Any) -> Any:
    settings = {
        "sample_size": LATENT_SIZE,
        "in_channels": in_channels,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    return _stirred(diffusers.UNet2DConditionModel(**(settings | options)))


def _sdxl_unet(in_channels: int = 4, *, time_ids: int = 6, pooled: int = WIDTH, context: int = 2 * WIDTH) -> Any:
    return unet(
        in_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=context,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled + time_ids * 8,
    )


def _sd3_transformer() -> Any:
    return _stirred(
        diffusers.SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=2 * WIDTH + 8,  # wider than both CLIP encoders together, as SD3's
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        )
    )


def _flux_transformer(*, guidance: bool) -> Any:
    return _stirred(
        diffusers.FluxTransformer2DModel(
            in_channels=16,  # four latent channels, packed two by two
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
    )


def _pixart_transformer(**options: Any) -> Any:
    return _stirred(
        diffusers.PixArtTransformer2DModel(
            sample_size=LATENT_SIZE,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=12,  # a third of all channels for each part of the size conditioning
            num_attention_heads=4,
            cross_attention_dim=48,
            caption_channels=WIDTH,
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            **options,
        )
    )


def _dit_transformer() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_embeds_ada_norm=10,
        norm_elementwise_affine=False,
    )
    # diffusers keeps the tables of labels and times in every block; the published model repeats one.
    _stirred(transformer)
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return transformer


def _stirred(module: Any) -> Any:
    """The module with noise on every tensor: fresh ones start with zeros and ones, which hide mistakes."""
    generator = torch.Generator().manual_seed(sum(p.numel() for p in module.parameters()))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return module.eval()


# ------------------------------------------------------------------------------------------------ schedulers

_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**_SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


def _euler(**options: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(**_SD_BETAS, steps_offset=1, **options)


# ------------------------------------------------------------------------------------------------- pipelines


def _stable_diffusion(kind: Any, *, unet_module: Any = None, scheduler: Any = None, act: str = "quick_gelu") -> Any:
    return kind(
        vae=autoencoder(),
        text_encoder=clip_encoder(act=act),
        tokenizer=clip_tokenizer(),
        unet=unet() if unet_module is None else unet_module,
        scheduler=_ddim() if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_2() -> Any:
    module = unet(use_linear_projection=True)
    scheduler = _ddim(prediction_type="v_prediction")
    return _stable_diffusion(diffusers.StableDiffusionPipeline, unet_module=module, scheduler=scheduler, act="gelu")


def _inpaint() -> Any:
    return _stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet_module=unet(9))


def _latent_consistency() -> Any:
    scheduler = diffusers.LCMScheduler(**_SD_BETAS, clip_sample=False, set_alpha_to_one=True)
    return _stable_diffusion(
        diffusers.LatentConsistencyModelPipeline, unet_module=unet(time_cond_proj_dim=16), scheduler=scheduler
    )


def _sdxl(kind: Any, *, unet_module: Any = None, scheduler: Any = None) -> Any:
    return kind(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder_with_projection(layers=4, act="gelu", pad=1),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=_sdxl_unet() if unet_module is None else unet_module,
        scheduler=_euler() if scheduler is None else scheduler,
        add_watermarker=False,
    )


def _sdxl_turbo() -> Any:
    return _sdxl(
        diffusers.StableDiffusionXLPipeline,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**_SD_BETAS, timestep_spacing="trailing"),
    )


def _sdxl_inpaint() -> Any:
    return _sdxl(diffusers.StableDiffusionXLInpaintPipeline, unet_module=_sdxl_unet(9))


def _sdxl_refiner() -> Any:
    """Only the second text encoder, whose pooled width (1280 in every SDXL model) tells five ids from six."""
    encoder = clip_encoder_with_projection(act="gelu", projection=1280, pad=1)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=encoder,
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=_sdxl_unet(time_ids=5, pooled=1280, context=WIDTH),
        scheduler=_euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _sd3(*, t5: bool) -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=_sd3_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(
            16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=clip_encoder_with_projection(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder_with_projection(layers=4, act="gelu", pad=1),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=t5_encoder(2 * WIDTH + 8) if t5 else None,
        tokenizer_3=t5_tokenizer(512) if t5 else None,
    )


def _flux(*, dev: bool) -> Any:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, max_shift=1.15, base_shift=0.5
        ),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(512 if dev else 256),
        transformer=_flux_transformer(guidance=dev),
    )


def _pixart(kind: Any, max_length: int, **options: Any) -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", num_train_timesteps=1000)
    return kind(
        tokenizer=t5_tokenizer(max_length),
        text_encoder=t5_encoder(),
        vae=autoencoder(**({"scaling_factor": 0.13025} if kind is diffusers.PixArtSigmaPipeline else {})),
        transformer=_pixart_transformer(**options),
        scheduler=scheduler,
    )


LABELS = {i: f"{word}, thing {i}" for i, word in enumerate(WORDS[:10])}


def _dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=_dit_transformer(),
        vae=autoencoder(),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        id2label=LABELS,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "StableDiffusionPipeline": lambda: _stable_diffusion(diffusers.StableDiffusionPipeline),
    "StableDiffusionPipeline 2": _stable_diffusion_2,
    "StableDiffusionImg2ImgPipeline": lambda: _stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline),
    "StableDiffusionInpaintPipeline": _inpaint,
    "LatentConsistencyModelPipeline": _latent_consistency,
    "StableDiffusionXLPipeline": lambda: _sdxl(diffusers.StableDiffusionXLPipeline),
    "StableDiffusionXLPipeline turbo": _sdxl_turbo,
    "StableDiffusionXLImg2ImgPipeline refiner": _sdxl_refiner,
    "StableDiffusionXLInpaintPipeline": _sdxl_inpaint,
    "StableDiffusion3Pipeline": lambda: _sd3(t5=True),
    "StableDiffusion3Pipeline without t5": lambda: _sd3(t5=False),
    "FluxPipeline dev": lambda: _flux(dev=True),
    "FluxPipeline schnell": lambda: _flux(dev=False),
    "PixArtAlphaPipeline": lambda: _pixart(diffusers.PixArtAlphaPipeline, 120),
    "PixArtAlphaPipeline sized": lambda: _pixart(diffusers.PixArtAlphaPipeline, 120, use_additional_conditions=True),
    "PixArtSigmaPipeline": lambda: _pixart(diffusers.PixArtSigmaPipeline, 300, use_additional_conditions=False),
    "DiTPipeline": _dit,
}


def pipeline(name: str) -> Any:
    """The pipeline ``name`` of :data:`MAKERS` as diffusers' own object, its weights the same at every call."""
    torch.manual_seed(0)
    made = MAKERS[name]()
    made.set_progress_bar_config(disable=True)
    return made


def make(name: str, folder: Path) -> Path:
    """Write the pipeline ``name`` of :data:`MAKERS` into ``folder`` as ``save_pretrained`` does; return ``folder``."""
    pipeline(name).save_pretrained(folder)
    if name == "DiTPipeline":  # whose published folders hold the names of classes, which save_pretrained leaves out
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": LABELS}))
    return folder
