"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206), after ``StableDiffusion3Pipeline``.

The last hidden states but one of both CLIP encoders side by side, filled with zeros up to T5's channels, and after
them T5's tokens; both pooled features side by side. A pipeline without T5 has zeros in the place of its tokens.
"""

from __future__ import annotations

import numpy as np

from lehr.runtime.errors import BundleError
from lehr.runtime.pipelines.family import Array, Conditions, Drawing, Family, rounded_up
from lehr.runtime.pipelines.text import TextEncoders

_CLIPS, _T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
_TOKENS_WITHOUT_T5 = 256  # max_sequence_length of the pipeline


class StableDiffusion3(Family):
    """Three text encoders, of which T5 may be missing."""

    guidance_scale = 7.0
    strength = 0.6

    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        texts, num = drawing.prompts + drawing.subtracted, drawing.num
        clips = [encoders(stage, texts) for stage in _CLIPS]
        hidden = np.concatenate([clip["penultimate_hidden_state"] for clip in clips], axis=-1)
        pooled = np.concatenate([clip["text_embeds"] for clip in clips], axis=-1)
        t5 = self._t5(texts, encoders)
        missing = t5.shape[-1] - hidden.shape[-1]
        if missing < 0:
            raise BundleError(f"{self.model.name} takes {t5.shape[-1]} channels, its CLIP encoders have more already.")
        text = np.concatenate([np.pad(hidden, ((0, 0), (0, 0), (0, missing))), t5], axis=1)
        return Conditions(
            given={"encoder_hidden_states": text[:num], "pooled_projections": pooled[:num]},
            without={"encoder_hidden_states": text[num:], "pooled_projections": pooled[num:]} if drawing.guided else {},
        )

    def _t5(self, texts: tuple[str, ...], encoders: TextEncoders) -> Array:
        if encoders.has(_T5):
            return encoders(_T5, texts)["last_hidden_state"]
        channels = next(t.shape[-1] for t in self.model.conditions if t.name == "encoder_hidden_states")
        if not isinstance(channels, int):
            raise BundleError(f"{self.model.name} does not say how many channels its text has.")
        return np.zeros((len(texts), _TOKENS_WITHOUT_T5, channels), dtype=np.float32)

    def kept_steps(self, num_inference_steps: int, strength: float) -> int:
        return rounded_up(num_inference_steps, strength)


FAMILY = StableDiffusion3
