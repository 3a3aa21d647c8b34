"""SDXL (Podell et al. 2023, arXiv:2307.01952): the latent U-Net, larger, with a second, pooled condition.

The tokens of two text encoders are concatenated along their channels; the pooled text and the micro-conditioning
of section 2.2 (original size, crop, target size; for the refiner an aesthetic score) join the timestep's embedding.
Turbo (Sauer et al. 2023, arXiv:2311.17042) and Lightning (Lin et al. 2024, arXiv:2402.13929) are distilled into
the base architecture. The module names are those of the authors' release (``generative-models``).

Shape legend: as in ``latent_unet``; T numbers of micro-conditioning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lehr.export.backbones._layers import sinusoidal_embedding
from lehr.export.backbones.latent_unet import STABLE_DIFFUSION, TOKENS, LatentUNet, Projection, conditions
from lehr.export.backbones.latent_unet import Params as LatentParams
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import Path
from lehr.runtime.prediction import EPSILON, Prediction
from lehr.runtime.spec import BATCH, Dim, ModelSpec, TensorSpec, Varies

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(LatentParams):
    """Architecture of one SDXL U-Net; the defaults are the base model (table 1 of the paper).

    Attributes:
        pooled_dim: channels of the pooled text embedding.
        time_ids: how many numbers of micro-conditioning there are.
        time_id_dim: channels of the sinusoid of each of them.
    """

    channel_mult: tuple[int, ...] = (1, 2, 4)
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    middle_depth: int = 10
    num_head_channels: int | None = 64
    context_dim: int = 2048
    projection: Projection = Projection.LINEAR
    pooled_dim: int = 1280
    time_ids: int = 6
    time_id_dim: int = 256


# --------------------------------------------------------------------------------------------------- model


class SDXL(LatentUNet):
    """The denoiser F(x_t, t, text, pooled text, sizes)."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        joined = params.pooled_dim + params.time_ids * params.time_id_dim
        self.label_emb = nn.Sequential(  # the release nests the two layers in a sequence of one
            nn.Sequential(nn.Linear(joined, params.embedding), nn.SiLU(), nn.Linear(params.embedding, params.embedding))
        )
        self.time_id_dim = params.time_id_dim

    def embed_pooled(self, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
        """(B, pooled_dim) and (B, T) -> (B, E)."""
        b, count = time_ids.shape
        sizes = sinusoidal_embedding(time_ids.reshape(-1), self.time_id_dim).reshape(b, count * self.time_id_dim)
        return self.label_emb(torch.cat([text_embeds, sizes.to(text_embeds.dtype)], dim=-1))

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
        sample_cond: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, out_channels, H, W) x_t; H and W multiples of ``params.size_multiple``.
            timestep: (B,) float, 0 … 999.
            encoder_hidden_states: (B, S, context_dim), both text encoders' tokens, joined along the channels.
            text_embeds: (B, pooled_dim), the pooled embedding of the second text encoder.
            time_ids: (B, T) pixels: original height and width, crop top and left, and for the base model the
                target height and width, for the refiner an aesthetic score.
            timestep_cond: (B, guidance_dim) embedding of the guidance scale, exactly for models that have one.
            sample_cond: (B, condition_channels, H, W) what is joined to the sample, exactly for models that have it.
            residuals: a ControlNet's, see ``_controlnet.residuals``.

        Returns:
            (B, out_channels, H, W).
        """
        emb = self.embed(timestep, timestep_cond) + self.embed_pooled(text_embeds, time_ids)
        return self.denoise(sample, emb, encoder_hidden_states, sample_cond, residuals)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int, path: Path, prediction: Prediction) -> ModelSpec:
    """Inputs, outputs and conventions of an SDXL model trained at ``size`` x ``size`` latents."""
    side = {"default": size, "min": p.size_multiple, "max": 2 * size, "multiple": p.size_multiple}
    text, *others = conditions(p)
    return ModelSpec(
        name=name,
        family="sdxl",
        inputs=(
            TensorSpec(name="sample", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            text,
            TensorSpec(name="text_embeds", shape=("batch", p.pooled_dim), varies=Varies.PROMPT),
            TensorSpec(name="time_ids", shape=("batch", p.time_ids), varies=Varies.PROMPT),
            *others,
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side), TOKENS),
        path=path,
        prediction=prediction,
    )


def _preset(name: str, p: Params, *, size: int) -> Preset:
    return Preset(params=p, build=SDXL, spec=spec(name, p, size=size, path=STABLE_DIFFUSION, prediction=EPSILON))


_REFINER = Params(
    model_channels=384,
    channel_mult=(1, 2, 4, 4),
    transformer_depth=(0, 4, 4, 0),
    middle_depth=4,
    context_dim=1280,
    time_ids=5,
)

PRESETS = {
    "sdxl-base": _preset("sdxl-base", Params(), size=128),
    "sdxl-inpainting": _preset("sdxl-inpainting", Params(in_channels=9), size=128),
    "sdxl-refiner": _preset("sdxl-refiner", _REFINER, size=128),
    "sdxl-turbo": _preset("sdxl-turbo", Params(), size=64),  # 1 to 4 steps
    "sdxl-lightning": _preset("sdxl-lightning", Params(), size=128),  # the checkpoints for 2, 4 and 8 steps
    "lcm-sdxl": _preset("lcm-sdxl", Params(guidance_dim=256), size=128),
}
