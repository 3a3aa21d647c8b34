"""ControlNets of FLUX.1 (``FluxControlNetModel``, InstantX 2024): a shorter FLUX that steers the whole one.

It sees the sample and a picture's latent, both in tokens, and after each of its blocks a linear layer that was zero
when training began makes a residual. FLUX has more blocks, so each residual is added behind several of them. Module
names are FLUX's, under ``flux``, and diffusers' for what is added.

Shape legend: as in ``flux``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lehr.export.backbones._controlnet import steered
from lehr.export.backbones.flux import Flux
from lehr.export.backbones.flux import Params as FluxParams
from lehr.runtime.errors import InvalidInput
from lehr.runtime.spec import ModelSpec, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec

DOUBLE, SINGLE = "controlnet_block_samples_{}", "controlnet_single_block_samples_{}"  # diffusers' names, numbered


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one ControlNet: that of a FLUX with fewer blocks."""

    flux: FluxParams

    def __post_init__(self) -> None:
        if self.flux.depth + self.flux.depth_single_blocks < 1:
            raise ValueError("a ControlNet needs at least one block")


def residuals(p: FluxParams) -> tuple[TensorSpec, ...]:
    """What a ControlNet of this architecture makes: a residual a block, double-stream blocks first."""
    names = [DOUBLE.format(k) for k in range(p.depth)] + [SINGLE.format(k) for k in range(p.depth_single_blocks)]
    shape = ("batch", "image_tokens", p.hidden_size)
    return tuple(TensorSpec(name=name, shape=shape, varies=Varies.SAMPLE) for name in names)


class FluxControl(nn.Module):
    """(x_t, t, text, pooled text, guidance, picture) -> residuals."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = params.flux
        self.params = params
        self.flux = Flux(p)
        del self.flux.final_layer
        self.controlnet_x_embedder = nn.Linear(p.in_channels, p.hidden_size)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(p.hidden_size, p.hidden_size) for _ in range(p.depth))
        self.controlnet_single_blocks = nn.ModuleList(
            nn.Linear(p.hidden_size, p.hidden_size) for _ in range(p.depth_single_blocks)
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        controlnet_cond: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Find the residuals.

        Args:
            hidden_states: (B, L, in_channels) x_t.
            timestep: (B,) float, 0 … 1.
            encoder_hidden_states: (B, M, context_in_dim), T5's features.
            pooled_projections: (B, vec_in_dim), CLIP's pooled features.
            img_ids: (L, axes) float, position of each picture token.
            txt_ids: (M, axes) float, zeros.
            guidance: (B,) float, for ControlNets that are told the scale.
            controlnet_cond: (B, L, in_channels), the picture's latent, 2 x 2 cells a token.

        Returns:
            What :func:`residuals` describes, (B, L, D) each.
        """
        flux = self.flux
        img, txt, vec, pe = flux.embed(
            hidden_states, timestep, encoder_hidden_states, pooled_projections, img_ids, txt_ids, guidance
        )
        img, found = img + self.controlnet_x_embedder(controlnet_cond), []
        for block, out in zip(flux.double_blocks, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, vec, pe)
            found.append(out(img))
        x, split = torch.cat([txt, img], dim=1), txt.shape[1]  # (B, N, D)
        for block, out in zip(flux.single_blocks, self.controlnet_single_blocks, strict=True):
            x = block(x, vec, pe)
            found.append(out(x[:, split:]))
        return tuple(found)


def stage_spec(name: str, params: Params, denoiser: ModelSpec) -> StageSpec:
    """A ControlNet as a stage beside its denoiser, whose sizes it shares; raises InvalidInput for another's."""
    known = {tensor.name: tensor for tensor in denoiser.inputs}
    if params.flux.guidance_embed and "guidance" not in known:
        raise InvalidInput(f"the ControlNet is told a guidance scale, which {denoiser.name} does not take.")
    names = ["encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"]
    names += ["guidance"] if params.flux.guidance_embed else []
    picture = TensorSpec(
        name="controlnet_cond", shape=("batch", "image_tokens", params.flux.in_channels), varies=Varies.PROMPT
    )
    return StageSpec(
        name=name,
        kind=StageKind.CONTROL,
        family="flux_controlnet",
        inputs=(denoiser.sample, denoiser.timestep, *(known[name] for name in names), picture),
        outputs=residuals(params.flux),
        dims=denoiser.dims,
    )


def controlled(module: Flux, spec: ModelSpec, params: Params) -> tuple[Flux, ModelSpec]:
    """A FLUX that takes a ControlNet's residuals, and its spec; it shares the parameters of ``module``."""
    tensors = residuals(params.flux)
    names, depth = [tensor.name for tensor in tensors], params.flux.depth
    made = steered(module, {"residuals": names[:depth], "single_residuals": names[depth:]})
    return made, replace(spec, inputs=(*spec.inputs, *tensors))
