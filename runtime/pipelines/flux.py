"""FLUX.1 (Black Forest Labs 2024), after ``FluxPipeline``.

CLIP's pooled features and T5's tokens, none of them masked; the latent in tokens of 2 x 2 cells with their positions;
the guidance scale as an input where the network was distilled with one. Guidance by two evaluations ("true" guidance)
acts beside it, with a negative prompt and a scale above 1.
"""

from __future__ import annotations

import math

import numpy as np

from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.guidance import embedded_scale, embedding_names
from lehr.runtime.pipelines.family import Array, Conditions, Drawing, Family, latent_of, rounded_up
from lehr.runtime.pipelines.text import TextEncoders
from lehr.runtime.spec import Dim

PATCH = 2  # latent cells along one side of a token


class Flux(Family):
    """Draws tokens of 2 x 2 latent cells."""

    guidance_scale = 3.5
    strength = 0.6

    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        texts, num = drawing.prompts + drawing.subtracted, drawing.num
        pooled = encoders("text_encoder", texts)["pooler_output"]
        text = encoders("text_encoder_2", texts)["last_hidden_state"]
        size = PATCH * self.factor
        given = {
            "encoder_hidden_states": text[:num],
            "pooled_projections": pooled[:num],
            "img_ids": _positions(drawing.height // size, drawing.width // size, self._axes()),
            "txt_ids": np.zeros((text.shape[1], self._axes()), dtype=np.float32),
        }
        if not drawing.guided:
            return Conditions(given=given)
        if embedding_names(self.model):
            given |= embedded_scale(self.model, drawing.scale, num)
        return Conditions(
            given=given, without={"encoder_hidden_states": text[num:], "pooled_projections": pooled[num:]}
        )

    def _axes(self) -> int:
        axes = next((t.shape[-1] for t in self.model.conditions if t.name == "img_ids"), None)
        if not isinstance(axes, int):
            raise BundleError(f"{self.model.name} takes no positions 'img_ids'; it is no FLUX denoiser.")
        return axes

    def told_scale(self) -> bool:
        return True  # "schnell" takes none, and is guided by none

    # ------------------------------------------------------------------------------------------ tokens and cells

    def to_sample(self, latents: Array) -> Array:
        """(N, C, H, W) -> (N, H W / 4, 4 C); a token's numbers are ordered channel, row, column."""
        n, c, h, w = latents.shape
        cells = latents.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).transpose(0, 2, 4, 1, 3, 5)
        return np.ascontiguousarray(cells.reshape(n, (h // PATCH) * (w // PATCH), c * PATCH**2))

    def to_latents(self, samples: Array, height: int, width: int) -> Array:
        n, channels = len(samples), latent_of(self.spec).channels
        cells = samples.reshape(n, height // PATCH, width // PATCH, channels, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
        return np.ascontiguousarray(cells.reshape(n, channels, height, width))

    def kept_steps(self, num_inference_steps: int, strength: float) -> int:
        return rounded_up(num_inference_steps, strength)

    # ---------------------------------------------------------------------------------------------------- sizes

    def sizes(self, height: int, width: int) -> dict[str, int]:
        size = PATCH * self.factor
        return {"image_tokens": (height // size) * (width // size)}

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        size, tokens = PATCH * self.factor, self.model.dim("image_tokens")
        drawn = (height // size) * (width // size)
        if not tokens.min <= drawn <= tokens.max:
            raise InvalidInput(
                f"{self.model.name} draws pictures of {tokens.min} to {tokens.max} tokens of {size} x {size} pixels, "
                f"{height} x {width} has {drawn}."
            )

    def _side(self, axis: int) -> Dim:
        """A square of the usual number of tokens; a long side may take the tokens that a short one leaves."""
        tokens = self.model.dim("image_tokens")
        usual = math.isqrt(tokens.default) * PATCH
        return Dim(name="side", default=usual, min=PATCH, max=tokens.max * PATCH, multiple=PATCH)


def _positions(height: int, width: int, axes: int) -> Array:
    """(height width, axes): 0, row and column of every token."""
    ids = np.zeros((height, width, axes), dtype=np.float32)
    ids[..., 1] += np.arange(height, dtype=np.float32)[:, None]
    ids[..., 2] += np.arange(width, dtype=np.float32)[None, :]
    return ids.reshape(height * width, axes)


FAMILY = Flux
