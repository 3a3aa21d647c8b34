"""PixArt-α (Chen et al. 2023, arXiv:2310.00426) and -Σ (arXiv:2403.04692), after ``PixArtAlphaPipeline``.

T5's tokens of the cleaned caption with their mask; for models that were trained at many sizes the picture's size and
aspect ratio besides. The size is drawn as it is asked for, without the bins of ``use_resolution_binning``.
"""

from __future__ import annotations

import numpy as np

from lehr.runtime.pipelines.caption import clean
from lehr.runtime.pipelines.family import Array, Conditions, Drawing, Family, rows
from lehr.runtime.pipelines.text import Encoded, TextEncoders


class PixArtAlpha(Family):
    """T5 with its mask."""

    guidance_scale = 4.5

    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        texts = tuple(clean(text) for text in drawing.prompts + drawing.subtracted)
        given, without = encoders("text_encoder", texts, masked=True).split(drawing.num)
        conditions = self._text(given)
        taken = {tensor.name for tensor in self.model.conditions}
        if "resolution" in taken:
            conditions["resolution"] = rows((drawing.height, drawing.width), drawing.num)
        if "aspect_ratio" in taken:
            conditions["aspect_ratio"] = rows((drawing.height / drawing.width,), drawing.num)
        return Conditions(given=conditions, without=self._text(without) if drawing.guided else {})

    @staticmethod
    def _text(encoded: Encoded) -> dict[str, Array]:
        return {
            "encoder_hidden_states": encoded["last_hidden_state"],
            "encoder_attention_mask": encoded.mask.astype(np.int64),
        }


FAMILY = PixArtAlpha
