"""Stable Diffusion 1 and 2: our names are those of the original single file, without its prefix."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

MAX_LEVELS = 6  # resolutions that the tables know; published models have 3 or 4

_RESNET = (  # ours, diffusers'
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("cond_proj", "time_embedding.cond_proj"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)


def _leaves(ours: str, theirs: str) -> Rule:
    return Rule(f"{ours}.{{leaf}}", (f"{theirs}.{{leaf}}",))


def _resnet(ours: str, theirs: str) -> list[Rule]:
    return [_leaves(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESNET]


def _transformer(ours: str, theirs: str) -> Rule:
    """The inside of a transformer has one naming."""
    return Rule(f"{ours}.{{rest}}", (f"{theirs}.{{rest}}",))


def diffusers_rules(num_res_blocks: int) -> tuple[Rule, ...]:
    """Rules for a folder whose ``layers_per_block`` is ``num_res_blocks``, which decides how blocks are numbered."""
    rules = [_leaves(ours, theirs) for ours, theirs in _ENDS]
    for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        make = _resnet if "resnets" in part else lambda ours, theirs: [_transformer(ours, theirs)]
        rules += make(f"middle_block.{i}", f"mid_block.{part}")
    stride = num_res_blocks + 1
    for level in range(MAX_LEVELS):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for j in range(num_res_blocks):
            block = f"input_blocks.{1 + stride * level + j}"
            rules += [
                *_resnet(f"{block}.0", f"{down}.resnets.{j}"),
                _transformer(f"{block}.1", f"{down}.attentions.{j}"),
            ]
        rules.append(_leaves(f"input_blocks.{stride * (level + 1)}.0.op", f"{down}.downsamplers.0.conv"))
        for j in range(stride):
            block = f"output_blocks.{stride * level + j}"
            rules += [
                *_resnet(f"{block}.0", f"{up}.resnets.{j}"),
                _leaves(f"{block}.1.conv", f"{up}.upsamplers.0.conv"),  # where the level has no transformer
                _leaves(f"{block}.2.conv", f"{up}.upsamplers.0.conv"),
                _transformer(f"{block}.1", f"{up}.attentions.{j}"),
            ]
    return tuple(rules)


DIFFUSERS = diffusers_rules(num_res_blocks=2)  # all released models
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL = (Rule("{rest}", ("model.diffusion_model.{rest}",)),)
ORIGINAL_IGNORED = (
    "first_stage_model.{rest}",  # the autoencoder
    "cond_stage_model.{rest}",  # the text encoder
    "model_ema.{rest}",
    "{leaf}",  # betas, alphas_cumprod and what follows from them
)

MARKER = ("input_blocks.0.0.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
READS = ("`UNet2DConditionModel` folder", "Stable Diffusion 1 and 2 file")  # beside our own layout
