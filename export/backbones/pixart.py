"""PixArt-α: fast training of a text-to-image diffusion transformer (Chen et al. 2023, arXiv:2310.00426).

DiT with cross-attention to the tokens of T5 and adaLN-single: one MLP of the timestep makes the modulation of all
blocks, and each block adds a table of its own (section 2.3). The 1024-pixel models also embed the picture's size
and aspect ratio, as SDXL does. Module and parameter names are those of the authors' release.

Shape legend: B batch, C latent channels, H W latent height and width, p patch size, L = (H/p)(W/p) tokens,
M text tokens, D token channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lehr.export.backbones._layers import (
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    sincos_grid,
    sincos_positions,
    unpatchify,
)
from lehr.export.backbones.dit import Attention, CrossAttention
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, LinearFlow, Path
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, Prediction
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

MASKED = -10_000.0  # added to the scores of padding tokens; finite, so that a row of padding alone stays defined

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one PixArt-α.

    Attributes:
        base_size: tokens a side at the size the position table was made for; other sizes stretch over its range.
        position_scale: divides positions; 2 for the 1024-pixel models, whose range is that of 512 pixels.
        size_conditioning: whether resolution and aspect ratio are inputs.
        pooled_dim: channels of pooled text features that join the timestep in the modulation, as in SD3 (Esser et al.
            2024, arXiv:2403.03206); 0 for none, as in the released models.
        draft_dim: hidden channels of an MLP that draws a draft of the sample from the pooled text, which the tokens
            see beside x_t (predict and refine, Whang et al. 2022, arXiv:2112.02475); 0 for none. It depends on the
            prompt alone.
        learn_sigma: doubles the output channels (learned-range variance).
    """

    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    base_size: int = 16
    position_scale: float = 1.0
    size_conditioning: bool = False
    pooled_dim: int = 0
    draft_dim: int = 0
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % (12 if self.size_conditioning else 4):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions) and, with size "
                "conditioning, of 3 (height, width and aspect ratio share it)"
            )
        if self.draft_dim and not self.pooled_dim:
            raise ValueError(f"draft_dim {self.draft_dim} needs the pooled text; set pooled_dim")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


# -------------------------------------------------------------------------------------------------- layers


def positions(rows: int, columns: int, base_size: int, scale: float, *, like: Tensor) -> Tensor:
    """Sin-cos table, (1, rows * columns, D) for tokens (B, L, D): any grid covers positions 0 … base_size / scale."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    y, x = (
        sincos_positions(torch.arange(n, dtype=dtype, device=like.device) * base_size / n / scale, like.shape[-1] // 2)
        for n in (rows, columns)
    )
    return sincos_grid(y, x).to(like.dtype)


class CaptionEmbedder(nn.Module):
    """Text features (B, M, caption_channels) -> (B, M, D)."""

    def __init__(self, caption_channels: int, dim: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, dim, dim)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        return self.y_proj(encoder_hidden_states)


class Draft(nn.Module):
    """Pooled text (B, pooled_dim) -> a draft of the sample at the size of training, (B, C, S, S)."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        side = p.base_size * p.patch_size
        self.mlp = nn.Sequential(
            nn.Linear(p.pooled_dim, p.draft_dim), nn.SiLU(), nn.Linear(p.draft_dim, p.in_channels * side * side)
        )
        self.shape = (p.in_channels, side, side)

    def forward(self, pooled_projections: Tensor) -> Tensor:
        return self.mlp(pooled_projections).unflatten(1, self.shape)


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, S, S) -> (B, C, height, width); gathered, so that the sizes may vary in an exported graph."""
    rows, columns = (torch.arange(n, device=x.device) * x.shape[-1] // n for n in (height, width))
    return x.index_select(2, rows).index_select(3, columns)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention without a norm before it, MLP; modulated by a table added to ``t``."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        dim = p.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, p.num_heads)
        self.cross_attn = CrossAttention(dim, p.num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * p.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask_bias: Tensor) -> Tensor:
        """x (B, L, D), t (B, 6, D), y (B, M, D), mask_bias (B, 1, L, M)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + t).chunk(6, dim=1)
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa)
        x = x + self.cross_attn(x, y, mask_bias)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, L, D), t (B, D)."""
        shift, scale = (self.scale_shift_table + t.unsqueeze(1)).chunk(2, dim=1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


# --------------------------------------------------------------------------------------------------- model


class PixArt(nn.Module):
    """The denoiser F(x_t, t, text)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.x_embedder = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.t_embedder = TimestepEmbedder(p.hidden_size)
        if p.size_conditioning:
            self.csize_embedder = TimestepEmbedder(p.hidden_size // 3)
            self.ar_embedder = TimestepEmbedder(p.hidden_size // 3)
        if p.pooled_dim:
            self.pooled_embedder = nn.Sequential(
                nn.Linear(p.pooled_dim, p.hidden_size), nn.SiLU(), nn.Linear(p.hidden_size, p.hidden_size)
            )
        if p.draft_dim:
            self.draft = Draft(p)
            self.draft_embedder = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(p.hidden_size, 6 * p.hidden_size))
        self.y_embedder = CaptionEmbedder(p.caption_channels, p.hidden_size)
        self.blocks = nn.ModuleList(PixArtBlock(p) for _ in range(p.depth))
        self.final_layer = FinalLayer(p.hidden_size, p.patch_size, p.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, C, H, W) x_t; H and W multiples of the patch size.
            timestep: (B,) float, 0 … 999.
            encoder_hidden_states: (B, M, caption_channels), T5's features.
            encoder_attention_mask: (B, M) int64, 1 for text and 0 for padding.
            resolution: (B, 2) float, height and width of the picture in pixels; for size-conditioned models.
            aspect_ratio: (B, 1) float, height / width; for size-conditioned models.
            pooled_projections: (B, pooled_dim) pooled text features; for models that have them.

        Returns:
            (B, out_channels, H, W).
        """
        p = self.params
        rows, columns = hidden_states.shape[2] // p.patch_size, hidden_states.shape[3] // p.patch_size
        x = self.x_embedder(hidden_states)  # (B, L, D)
        x = x + positions(rows, columns, p.base_size, p.position_scale, like=x)
        t = self.t_embedder(timestep)  # (B, D)
        if p.size_conditioning:
            if resolution is None or aspect_ratio is None:
                raise ValueError("this model is conditioned on the picture's size; pass resolution and aspect_ratio")
            height, width = resolution.unbind(1)
            t = t + torch.cat(
                [self.csize_embedder(height), self.csize_embedder(width), self.ar_embedder(aspect_ratio[:, 0])], dim=1
            )
        if p.pooled_dim:
            if pooled_projections is None:
                raise ValueError("this model is conditioned on pooled text features; pass pooled_projections")
            t = t + self.pooled_embedder(pooled_projections)
            if p.draft_dim:
                draft = nearest(self.draft(pooled_projections), *hidden_states.shape[2:])
                x = x + self.draft_embedder(draft)
        modulation = self.t_block(t).unflatten(1, (6, p.hidden_size))
        y = self.y_embedder(encoder_hidden_states)
        mask_bias = ((1 - encoder_attention_mask.to(x.dtype)) * MASKED)[:, None, None, :]
        # A row a query, because not every engine's attention broadcasts a mask along the queries.
        mask_bias = mask_bias.expand(-1, -1, rows * columns, -1)
        for block in self.blocks:
            x = block(x, modulation, y, mask_bias)
        return unpatchify(self.final_layer(x, t), rows, columns, p.patch_size)


# ------------------------------------------------------------------------------------------------- presets


TEXT_TOKENS = Dim(name="text_tokens", default=120, max=512)  # the release pads T5 to 120 tokens


def spec(
    name: str,
    p: Params,
    *,
    size: int,
    text_tokens: Dim = TEXT_TOKENS,
    path: Path | None = None,
    prediction: Prediction = EPSILON,
    sampling: Sampling | None = None,
) -> ModelSpec:
    """Inputs, outputs and conventions of a PixArt-α trained at ``size`` x ``size`` latents, as released by default."""
    side = {"default": size, "min": p.patch_size, "max": 4 * size, "multiple": p.patch_size}
    sizes = [
        TensorSpec(name="resolution", shape=("batch", 2), varies=Varies.PROMPT),
        TensorSpec(name="aspect_ratio", shape=("batch", 1), varies=Varies.PROMPT),
    ]
    text = ("batch", "text_tokens")
    return ModelSpec(
        name=name,
        family="pixart",
        inputs=(
            TensorSpec(name="hidden_states", shape=("batch", p.in_channels, "height", "width"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="encoder_hidden_states", shape=(*text, p.caption_channels), varies=Varies.PROMPT),
            TensorSpec(name="encoder_attention_mask", dtype=DType.INT64, shape=text, varies=Varies.PROMPT),
            *(sizes if p.size_conditioning else []),
            *(
                [TensorSpec(name="pooled_projections", shape=("batch", p.pooled_dim), varies=Varies.PROMPT)]
                if p.pooled_dim
                else []
            ),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(
            BATCH,
            Dim(name="height", **side),
            Dim(name="width", **side),
            text_tokens,
        ),
        path=path or VP(),
        prediction=prediction,
        sampling=sampling or Sampling(),
    )


def _preset(name: str, p: Params, *, size: int) -> Preset:
    return Preset(params=p, build=PixArt, spec=spec(name, p, size=size))


EMOJI = Params(  # trained by lehr.export.reference.emoji, shipped
    hidden_size=256,
    depth=6,
    num_heads=4,
    caption_channels=192,
    base_size=8,
    pooled_dim=192,
    draft_dim=1408,
    learn_sigma=False,
)

PRESETS: dict[str, Preset] = {
    "pixart-xl-2-256": _preset("pixart-xl-2-256", Params(), size=32),
    "pixart-xl-2-512": _preset("pixart-xl-2-512", Params(base_size=32), size=64),
    "pixart-xl-2-1024": _preset(
        "pixart-xl-2-1024", Params(base_size=64, position_scale=2.0, size_conditioning=True), size=128
    ),
    "emoji": Preset(
        params=EMOJI,
        build=PixArt,
        spec=spec(
            "emoji",
            EMOJI,
            size=16,
            text_tokens=Dim(name="text_tokens", default=32, max=32),
            path=LinearFlow(),
            prediction=FLOW_PREDICTION,
            sampling=Sampling(guidance_scale=2.0),
        ),
    ),
}
