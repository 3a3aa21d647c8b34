"""SDXL (Podell et al. 2023, arXiv:2307.01952) and its refiner, after ``StableDiffusionXLPipeline`` and its img2img.

The last hidden states but one of both CLIP text encoders, side by side along their channels; the pooled and projected
features of the second; and the micro-conditioning of section 2.2. The refiner has the second encoder alone and an
aesthetic score in place of the target size.
"""

from __future__ import annotations

import numpy as np

from lehr.runtime.errors import BundleError
from lehr.runtime.pipelines.family import Array, Conditions, Drawing, Family, rows
from lehr.runtime.pipelines.text import TextEncoders

_ENCODERS = ("text_encoder", "text_encoder_2")
_BASE_IDS, _REFINER_IDS = 6, 5


class StableDiffusionXL(Family):
    """Base models and refiners, which differ in their text encoders and in one number."""

    guidance_scale = 5.0
    strength = 0.3

    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        # Without a word on what to subtract the base model was trained to see nothing at all, not an empty text.
        zeros = drawing.negative is None and self.flag("force_zeros_for_empty_prompt", default=True)
        texts = drawing.prompts + (() if zeros else drawing.subtracted)
        hidden, pooled = self._encode(texts, encoders)
        num, guided = drawing.num, drawing.guided
        ids, other_ids = self._time_ids(drawing)
        given = {"encoder_hidden_states": hidden[:num], "text_embeds": pooled[:num], "time_ids": ids}
        if not guided:
            return Conditions(given=given)
        return Conditions(
            given=given,
            without={
                "encoder_hidden_states": np.zeros_like(hidden[:num]) if zeros else hidden[num:],
                "text_embeds": np.zeros_like(pooled[:num]) if zeros else pooled[num:],
                "time_ids": other_ids,
            },
        )

    def _encode(self, texts: tuple[str, ...], encoders: TextEncoders) -> tuple[Array, Array]:
        found = [encoders(stage, texts) for stage in _ENCODERS if encoders.has(stage)]
        if not found:
            raise BundleError(f"the pipeline has none of the text encoders {', '.join(_ENCODERS)}.")
        hidden = np.concatenate([encoded["penultimate_hidden_state"] for encoded in found], axis=-1)
        return hidden, found[-1]["text_embeds"]

    def _time_ids(self, drawing: Drawing) -> tuple[Array, Array]:
        micro, size = drawing.micro, (drawing.height, drawing.width)
        original, target = micro.original_size or size, micro.target_size or size
        if self.flag("requires_aesthetics_score", default=self._ids() == _REFINER_IDS):
            crop = micro.negative_crop or (0, 0)
            ids: tuple[float, ...] = (*original, *micro.crop, micro.aesthetic_score)
            others: tuple[float, ...] = (
                *(micro.negative_original_size or original),
                *crop,
                micro.negative_aesthetic_score,
            )
        else:
            ids = others = (*original, *micro.crop, *target)
            if micro.negative_original_size is not None and micro.negative_target_size is not None:
                crop = micro.negative_crop or (0, 0)
                others = (*micro.negative_original_size, *crop, *micro.negative_target_size)
        if len(ids) != self._ids():
            raise BundleError(
                f"{self.model.name} takes {self._ids()} numbers of micro-conditioning, its pipeline makes {len(ids)}: "
                "requires_aesthetics_score says the wrong thing. Export the model again."
            )
        return rows(ids, drawing.num), rows(others, drawing.num)

    def _ids(self) -> int:
        sizes = [tensor.shape[-1] for tensor in self.model.conditions if tensor.name == "time_ids"]
        return sizes[0] if sizes and isinstance(sizes[0], int) else _BASE_IDS


FAMILY = StableDiffusionXL
