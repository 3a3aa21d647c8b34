"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv:2112.10752), after ``StableDiffusionPipeline``.

The last hidden states of one CLIP text encoder, filled up to its 77 tokens and without a mask.
"""

from __future__ import annotations

from lehr.runtime.pipelines.family import Conditions, Drawing, Family
from lehr.runtime.pipelines.text import TextEncoders


class StableDiffusion(Family):
    """One CLIP text encoder."""

    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        encoded = encoders("text_encoder", drawing.prompts + drawing.subtracted)
        given, without = encoded.split(drawing.num)
        name = "encoder_hidden_states"
        return Conditions(
            given={name: given["last_hidden_state"]},
            without={name: without["last_hidden_state"]} if drawing.guided else {},
        )


FAMILY = StableDiffusion
