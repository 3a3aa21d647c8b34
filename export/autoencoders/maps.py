"""Where an autoencoder's tensors stand in files of other projects; our names are diffusers'."""

from __future__ import annotations

from lehr.export.checkpoints.mapped import Layout
from lehr.export.checkpoints.rules import Rule, Transform

ENCODER = ("encoder.{rest}", "quant_conv.{rest}")
DECODER = ("decoder.{rest}", "post_quant_conv.{rest}")
TRAINING = ("loss.{rest}", "model_ema.{rest}")  # of the discriminator and of averaged weights

PREFIXES = ("first_stage_model.", "vae.")  # what files with several parts of a pipeline put before the names

_ATTENTION = (  # ours, that of folders written before diffusers renamed its attention layers, the authors'
    ("to_q", "query", "q"),
    ("to_k", "key", "k"),
    ("to_v", "value", "v"),
    ("to_out.0", "proj_attn", "proj_out"),
)


def kl_layouts(levels: int, other: tuple[str, ...]) -> tuple[Layout, ...]:
    """The layouts of ``kl``: diffusers' folder, the same before its renaming, and CompVis' file.

    Args:
        levels: resolutions, which the authors' decoder counts from the picture and diffusers' from the latent.
        other: names of the half that is not read, ``ENCODER`` or ``DECODER``.
    """
    ignored = (*other, *TRAINING)
    return (
        Layout("diffusers", (), ignored),
        Layout("diffusers", _renamed(), ignored),
        Layout("original", original_rules(levels), ignored),
    )


def _renamed() -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{part}.mid_block.attentions.0.{ours}.{{leaf}}", (f"{part}.mid_block.attentions.0.{old}.{{leaf}}",))
        for part in ("encoder", "decoder")
        for ours, old, _ in _ATTENTION
    )


def original_rules(levels: int) -> tuple[Rule, ...]:
    """CompVis' names (Rombach et al. 2022), which FLUX's ``ae.safetensors`` keeps."""
    rules: list[Rule] = []
    for part in ("encoder", "decoder"):
        middle = f"{part}.mid_block"
        for ours, _, theirs in _ATTENTION:
            names = f"{middle}.attentions.0.{ours}", f"{part}.mid.attn_1.{theirs}"
            rules += [
                Rule(f"{names[0]}.weight", (f"{names[1]}.weight",), Transform.MATRIX),
                Rule(f"{names[0]}.bias", (f"{names[1]}.bias",)),
            ]
        rules += [
            Rule(f"{middle}.attentions.0.group_norm.{{leaf}}", (f"{part}.mid.attn_1.norm.{{leaf}}",)),
            Rule(f"{middle}.resnets.0.{{rest}}", (f"{part}.mid.block_1.{{rest}}",)),
            Rule(f"{middle}.resnets.1.{{rest}}", (f"{part}.mid.block_2.{{rest}}",)),
            Rule(f"{part}.conv_norm_out.{{leaf}}", (f"{part}.norm_out.{{leaf}}",)),
        ]
    rules += [
        Rule(
            "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.{leaf}",
            ("encoder.down.{i}.block.{j}.nin_shortcut.{leaf}",),
        ),
        Rule("encoder.down_blocks.{i}.resnets.{j}.{rest}", ("encoder.down.{i}.block.{j}.{rest}",)),
        Rule("encoder.down_blocks.{i}.downsamplers.0.{rest}", ("encoder.down.{i}.downsample.{rest}",)),
    ]
    for level in range(levels):
        ours, theirs = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        rules += [
            Rule(f"{ours}.resnets.{{j}}.conv_shortcut.{{leaf}}", (f"{theirs}.block.{{j}}.nin_shortcut.{{leaf}}",)),
            Rule(f"{ours}.resnets.{{j}}.{{rest}}", (f"{theirs}.block.{{j}}.{{rest}}",)),
            Rule(f"{ours}.upsamplers.0.{{rest}}", (f"{theirs}.upsample.{{rest}}",)),
        ]
    return tuple(rules)


def tiny_layouts(layers: int, other: tuple[str, ...]) -> tuple[Layout, ...]:
    """The layouts of ``tiny``: diffusers' folder, and the authors' numbered file of a decoder.

    Args:
        layers: that a file may have.
        other: names of the half that is not read, ``ENCODER`` or ``DECODER``.
    """
    # The authors' decoder begins with the bound on the latent, a layer without weights; ours does it in ``forward``.
    numbered = tuple(Rule(f"decoder.layers.{i}.{{rest}}", (f"{i + 1}.{{rest}}",)) for i in range(layers))
    return (Layout("diffusers", (), other), Layout("original", numbered))
