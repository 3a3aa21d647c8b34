"""Lehr's own emoji model: a small text encoder's tokens with their mask and its pooled features.

The network is a PixArt and is fed like one, but that prompts are taken as they are typed, without the cleaning of
captions which that model was trained behind, and that the pooled features are an input, too. It is a rectified flow,
so img2img counts steps as diffusers' flow pipelines do.
"""

from __future__ import annotations

from lehr.runtime.pipelines.family import Array, Conditions, Drawing, rounded_up
from lehr.runtime.pipelines.pixart_alpha import PixArtAlpha
from lehr.runtime.pipelines.text import Encoded, TextEncoders


class Emoji(PixArtAlpha):
    """A caption as it is."""

    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        encoded = encoders("text_encoder", drawing.prompts + drawing.subtracted, masked=True)
        given, without = encoded.split(drawing.num)
        return Conditions(given=self._text(given), without=self._text(without) if drawing.guided else {})

    @staticmethod
    def _text(encoded: Encoded) -> dict[str, Array]:
        return PixArtAlpha._text(encoded) | {"pooled_projections": encoded["text_embeds"]}

    def kept_steps(self, num_inference_steps: int, strength: float) -> int:
        return rounded_up(num_inference_steps, strength)


FAMILY = Emoji
