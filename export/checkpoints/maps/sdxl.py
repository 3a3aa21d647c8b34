"""SDXL: our names are those of the original single file, without its prefix."""

from __future__ import annotations

from lehr.export.checkpoints.maps import latent_unet
from lehr.export.checkpoints.rules import Rule


def diffusers_rules(num_res_blocks: int) -> tuple[Rule, ...]:
    """Rules for a folder whose ``layers_per_block`` is ``num_res_blocks``."""
    return (
        Rule("label_emb.0.0.{leaf}", ("add_embedding.linear_1.{leaf}",)),
        Rule("label_emb.0.2.{leaf}", ("add_embedding.linear_2.{leaf}",)),
        *latent_unet.diffusers_rules(num_res_blocks),
    )


DIFFUSERS = diffusers_rules(num_res_blocks=2)  # all released models
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL = latent_unet.ORIGINAL
ORIGINAL_IGNORED = (
    "first_stage_model.{rest}",  # the autoencoder
    "conditioner.{rest}",  # the text encoders
    "model_ema.{rest}",
    "denoiser.{rest}",  # noise levels
)

MARKER = ("label_emb.0.0.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
READS = ("`UNet2DConditionModel` folder", "SDXL file")  # beside our own layout
