"""ControlNets of latent U-Nets: diffusers' ``ControlNetModel`` and the authors' files."""

from __future__ import annotations

from lehr.export.checkpoints.maps import sdxl
from lehr.export.checkpoints.rules import Rule

_ENCODER = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")


def folder_rules(num_res_blocks: int, hint_convolutions: int, residuals: int) -> tuple[Rule, ...]:
    """Rules for a folder.

    Args:
        num_res_blocks: its ``layers_per_block``.
        hint_convolutions: of the picture's encoder, the first and the last one included.
        residuals: of the skip connections.
    """

    def leaves(ours: str, theirs: str) -> Rule:
        return Rule(f"{ours}.{{leaf}}", (f"{theirs}.{{leaf}}",))

    inner = [f"blocks.{k}" for k in range(hint_convolutions - 2)]
    hint = ["conv_in", *inner, "conv_out"]
    return (
        *(leaves(f"input_hint_block.{2 * k}", f"controlnet_cond_embedding.{name}") for k, name in enumerate(hint)),
        *(leaves(f"zero_convs.{k}.0", f"controlnet_down_blocks.{k}") for k in range(residuals)),
        leaves("middle_block_out.0", "controlnet_mid_block"),
        *(
            Rule(f"unet.{rule.ours}", rule.theirs, rule.transform)
            for rule in sdxl.diffusers_rules(num_res_blocks)
            if rule.ours.startswith(_ENCODER)
        ),
    )


DIFFUSERS = folder_rules(num_res_blocks=2, hint_convolutions=8, residuals=12)  # all released ones for SD 1 and 2
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL = (
    *(Rule(f"unet.{part}{{rest}}", (f"control_model.{part}{{rest}}",)) for part in _ENCODER),
    Rule("{rest}", ("control_model.{rest}",)),
)
ORIGINAL_IGNORED = (
    "model.{rest}",  # the U-Net that it was trained beside
    "first_stage_model.{rest}",
    "cond_stage_model.{rest}",
    "{leaf}",  # betas, alphas_cumprod and what follows from them
)

MARKER = ("zero_convs.0.0.weight", "input_hint_block.0.weight")
READS = ("`ControlNetModel` folder", "ControlNet file")  # beside our own layout
