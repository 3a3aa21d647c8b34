"""Hunyuan-DiT: a multi-resolution diffusion transformer for Chinese and English (Li et al. 2024, arXiv:2405.08748).

A transformer with the U-Net's long skips: each block of the second half reads the output of its mirror image in the
first, joined along the channels. Queries and keys are normalised and rotated by their row and column. Text enters
twice: the tokens of CLIP and of mT5, as one sequence, through cross-attention; mT5's once more, pooled, through the
timestep's embedding, which shifts the first norm of every block and modulates the last one. Padding tokens become
learned ones instead of being masked. Version 1.1 also embeds the sizes of the picture and a style; 1.2 does not.
Module and parameter names are those of the authors' release.

Shape legend: B batch, C latent channels, H W latent height and width, p patch size, L = (H/p)(W/p) tokens,
M text tokens, D token channels, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import Mlp, PatchEmbed, TimestepEmbedder, sinusoidal_embedding, unpatchify
from lehr.export.backbones.dit import FinalLayer
from lehr.export.backbones.flux import apply_rotary, rotary
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, BetaSchedule, Path
from lehr.runtime.prediction import V_PREDICTION
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

THETA = 10_000.0
POOL_HEADS = 8
META_SIZES = 6  # height and width of the original and of the target, top and left of the crop
FREQUENCIES = 256  # channels of the sinusoid of the timestep and of each size
Rotation = tuple[Tensor, Tensor]

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one Hunyuan-DiT.

    Attributes:
        clip_dim, t5_dim: channels of the two text encoders' features.
        clip_tokens, t5_tokens: their lengths, fixed because each position has a learned padding token.
        pooled_dim: channels of mT5's pooled features.
        size_conditioning: whether picture sizes (and the one style there is) are embedded; True up to version 1.1.
        base_size: tokens a side of the square that the positions of any picture are scaled to fit.
        learn_sigma: doubles the output channels (learned-range variance).
    """

    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_ratio: float = 4.3637
    clip_dim: int = 1024
    clip_tokens: int = 77
    t5_dim: int = 2048
    t5_tokens: int = 256
    pooled_dim: int = 1024
    size_conditioning: bool = False
    base_size: int = 32
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 x num_heads {self.num_heads} (rotations of "
                "channel pairs by row and by column)"
            )
        if self.t5_dim % POOL_HEADS:
            raise ValueError(f"t5_dim {self.t5_dim} must be a multiple of {POOL_HEADS}, the heads of the pooling")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def is_up(self, block: int) -> bool:
        """Whether a block has a long skip: those behind the middle one."""
        return block > self.depth // 2


# -------------------------------------------------------------------------------------------------- layers


def positions(rows: int, columns: int, base: int, *, like: Tensor) -> Tensor:
    """(L, 2), column and row of each token, scaled so that the longer side covers 0 … base and the other is centred.

    The release computes this outside of the network ("base512"), in whole tokens of the base.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)

    def axis(count: int, other: int) -> Tensor:
        one = torch.ones((), dtype=dtype, device=like.device)
        covered = torch.round(base * torch.minimum(one, one * count / other))
        start = torch.round((base - covered) / 2)
        return start + torch.arange(count, dtype=dtype, device=like.device) * covered / count

    y, x = axis(rows, columns), axis(columns, rows)
    grid = torch.stack([x[None, :].expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)
    return grid.reshape(rows * columns, 2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, D) -> (B, heads, L, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Self-attention over (B, L, D) with normalised and rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pe: Rotation) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.Wqkv(x).chunk(3, dim=-1))
        q, k = apply_rotary(self.q_norm(q), pe), apply_rotary(self.k_norm(k), pe)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of (B, L, D) to text (B, M, context_dim); text has no positions."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(context_dim, 2 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, pe: Rotation) -> Tensor:
        q = apply_rotary(self.q_norm(split_heads(self.q_proj(x), self.num_heads)), pe)
        k, v = (split_heads(part, self.num_heads) for part in self.kv_proj(context).chunk(2, dim=-1))
        return self.out_proj(F.scaled_dot_product_attention(q, self.k_norm(k), v).transpose(1, 2).flatten(2))


class HunyuanDiTBlock(nn.Module):
    """Long skip, where the block has one; self-attention behind a shifted norm; text; MLP."""

    def __init__(self, p: Params, *, skip: bool) -> None:
        super().__init__()
        dim = p.hidden_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn1 = SelfAttention(dim, p.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn2 = CrossAttention(dim, p.clip_dim, p.num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)  # before the text; the release numbers it behind the MLP's
        self.mlp = Mlp(dim, int(dim * p.mlp_ratio))
        self.default_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim))
        if skip:
            self.skip_norm = nn.LayerNorm(2 * dim, eps=1e-6)
            self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, c: Tensor, context: Tensor, pe: Rotation, skip: Tensor | None = None) -> Tensor:
        """x and skip (B, L, D), c (B, D), context (B, M, clip_dim)."""
        if skip is not None:
            x = self.skip_linear(self.skip_norm(torch.cat([x, skip], dim=-1)))
        x = x + self.attn1(self.norm1(x) + self.default_modulation(c).unsqueeze(1), pe)
        x = x + self.attn2(self.norm3(x), context, pe)
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """The tokens' mean attends to itself and to all of them: (B, M, t5_dim) -> (B, pooled_dim), as in CLIP's ResNet."""

    def __init__(self, tokens: int, dim: int, out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(tokens + 1, dim) / dim**0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (
            split_heads(linear(y), POOL_HEADS)
            for linear, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


# --------------------------------------------------------------------------------------------------- model


class HunyuanDiT(nn.Module):
    """The denoiser F(x_t, t, text of CLIP, text of mT5, sizes)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.text_embedding_padding = nn.Parameter(torch.randn(p.clip_tokens + p.t5_tokens, p.clip_dim))
        self.mlp_t5 = nn.Sequential(nn.Linear(p.t5_dim, 4 * p.t5_dim), nn.SiLU(), nn.Linear(4 * p.t5_dim, p.clip_dim))
        self.pooler = AttentionPool(p.t5_tokens, p.t5_dim, p.pooled_dim)
        extra = p.pooled_dim
        if p.size_conditioning:
            self.style_embedder = nn.Embedding(1, p.hidden_size)
            extra += META_SIZES * FREQUENCIES + p.hidden_size
        self.x_embedder = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.t_embedder = TimestepEmbedder(p.hidden_size, FREQUENCIES)
        self.extra_embedder = nn.Sequential(
            nn.Linear(extra, 4 * p.hidden_size), nn.SiLU(), nn.Linear(4 * p.hidden_size, p.hidden_size)
        )
        self.blocks = nn.ModuleList(HunyuanDiTBlock(p, skip=p.is_up(block)) for block in range(p.depth))
        self.final_layer = FinalLayer(p.hidden_size, p.patch_size, p.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embedding_mask: Tensor,
        encoder_hidden_states_t5: Tensor,
        text_embedding_mask_t5: Tensor,
        image_meta_size: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, C, H, W) x_t; H and W multiples of the patch size.
            timestep: (B,) float, 0 … 999.
            encoder_hidden_states: (B, clip_tokens, clip_dim), the bilingual CLIP's features.
            text_embedding_mask: (B, clip_tokens) int64, 1 for text and 0 for padding.
            encoder_hidden_states_t5: (B, t5_tokens, t5_dim), mT5's features.
            text_embedding_mask_t5: (B, t5_tokens) int64.
            image_meta_size: (B, 6) float: height and width of the original picture, of the target, top and left of
                the crop, in pixels; for size-conditioned models.

        Returns:
            (B, out_channels, H, W).
        """
        p = self.params
        if p.size_conditioning != (image_meta_size is not None):
            raise ValueError(f"this model {'needs' if p.size_conditioning else 'takes no'} image_meta_size")
        rows, columns = hidden_states.shape[2] // p.patch_size, hidden_states.shape[3] // p.patch_size
        x = self.x_embedder(hidden_states)  # (B, L, D)
        extra = [self.pooler(encoder_hidden_states_t5)]
        if image_meta_size is not None:
            sizes = sinusoidal_embedding(image_meta_size.flatten(), FREQUENCIES).unflatten(0, (-1, META_SIZES))
            style = self.style_embedder.weight.expand(x.shape[0], -1)  # the one there is
            extra += [sizes.flatten(1).to(x.dtype), style]
        c = self.t_embedder(timestep) + self.extra_embedder(torch.cat(extra, dim=1))  # (B, D)
        text = torch.cat([encoder_hidden_states, self.mlp_t5(encoder_hidden_states_t5)], dim=1)  # (B, M, clip_dim)
        mask = torch.cat([text_embedding_mask, text_embedding_mask_t5], dim=1).unsqueeze(2) > 0
        context = torch.where(mask, text, self.text_embedding_padding)
        ids = positions(rows, columns, p.base_size, like=x)
        axis = p.hidden_size // p.num_heads // 2
        pe = rotary(ids, (axis, axis), THETA, dtype=x.dtype)
        skips: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, c, context, pe, skips.pop()) if p.is_up(index) else block(x, c, context, pe)
            if index < p.depth // 2 - 1:
                skips.append(x)
        return unpatchify(self.final_layer(x, c), rows, columns, p.patch_size)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int, path: Path) -> ModelSpec:
    """Inputs, outputs and conventions of a Hunyuan-DiT for ``size`` x ``size`` latents."""
    side = {"default": size, "min": p.patch_size, "max": 2 * size, "multiple": p.patch_size}
    sample = TensorSpec(name="hidden_states", shape=("batch", p.in_channels, "height", "width"), varies=Varies.SAMPLE)
    sizes = TensorSpec(name="image_meta_size", shape=("batch", META_SIZES), varies=Varies.PROMPT)
    clip, t5 = ("batch", p.clip_tokens), ("batch", p.t5_tokens)
    return ModelSpec(
        name=name,
        family="hunyuan_dit",
        inputs=(
            sample,
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="encoder_hidden_states", shape=(*clip, p.clip_dim), varies=Varies.PROMPT),
            TensorSpec(name="text_embedding_mask", dtype=DType.INT64, shape=clip, varies=Varies.PROMPT),
            TensorSpec(name="encoder_hidden_states_t5", shape=(*t5, p.t5_dim), varies=Varies.PROMPT),
            TensorSpec(name="text_embedding_mask_t5", dtype=DType.INT64, shape=t5, varies=Varies.PROMPT),
            *([sizes] if p.size_conditioning else []),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side)),
        path=path,
        prediction=V_PREDICTION,
        sampling=Sampling(num_inference_steps=50, guidance_scale=5.0),
    )


def _preset(name: str, p: Params, *, beta_end: float) -> Preset:
    path = VP(schedule=BetaSchedule.SCALED_LINEAR, beta_start=0.00085, beta_end=beta_end)
    return Preset(params=p, build=HunyuanDiT, spec=spec(name, p, size=128, path=path))


PRESETS: dict[
    str, Preset
] = {  # beta_end: 0.03 is the default of the release's comfyui-hydit/hydit_v1_1/config.py, 0.018
    # what its scripts train 1.2 with (--beta-end in controlnet/train_controlnet.sh)
    "hunyuan-dit-1.1": _preset("hunyuan-dit-1.1", Params(size_conditioning=True), beta_end=0.03),
    "hunyuan-dit-1.2": _preset("hunyuan-dit-1.2", Params(), beta_end=0.018),
}
