"""FLUX.1: a rectified-flow transformer of 12 billion parameters (Black Forest Labs 2024, ``black-forest-labs/flux``).

Double-stream blocks treat text and picture with weights of their own and join them in one attention, as MMDiT does;
single-stream blocks then run attention and MLP in parallel (Dehghani et al. 2023, arXiv:2302.05442) over one joined
sequence. Positions are rotary (Su et al. 2021, arXiv:2104.09864) over three axes given as ids, so any picture size,
and any layout of tokens, is an input. Module and parameter names are those of the authors' release.

Shape legend: B batch, L picture tokens (2 x 2 latents each), M text tokens, N = M + L, D token channels,
d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import sinusoidal_embedding
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import FLOW_PREDICTION
from lehr.runtime.spec import BATCH, Dim, ModelSpec, Sampling, TensorSpec, Varies

TIME_FACTOR = 1000.0  # the sinusoid sees 1000 t; t and the guidance scale are inputs as they are

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one FLUX. ``guidance_embed``: the guidance scale is an input (guidance distillation)."""

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.hidden_size // self.num_heads or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim} must be even and add up to the {self.hidden_size // self.num_heads} "
                "channels of a head"
            )


# -------------------------------------------------------------------------------------------------- layers


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D) * (1 + scale) + shift, with shift and scale (B, 1, D)."""
    return x * (1 + scale) + shift


def rotary(ids: Tensor, axes_dim: tuple[int, ...], theta: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation of each channel pair, each (N, d/2), for ids (N, axes).

    Phases are computed in float32 at least, for they reach hundreds of radians; the result has ``dtype``.
    """
    wide, phases = torch.promote_types(dtype, torch.float32), []
    for axis, dim in enumerate(axes_dim):
        k = torch.arange(0, dim, 2, dtype=wide, device=ids.device)
        phases.append(ids[:, axis, None].to(wide) * torch.exp(-math.log(theta) * k / dim))
    phase = torch.cat(phases, dim=-1)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def apply_rotary(x: Tensor, pe: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate adjacent channel pairs of x (B, heads, N, d)."""
    cos, sin = pe
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)  # each (B, heads, N, d/2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: tuple[Tensor, Tensor]) -> Tensor:
    """(B, heads, N, d), three times -> (B, N, D)."""
    x = F.scaled_dot_product_attention(apply_rotary(q, pe), apply_rotary(k, pe), v)
    return x.transpose(1, 2).flatten(2)


def scaled_sinusoid(x: Tensor) -> Tensor:
    """(B,) -> (B, 256). Scaled in float32 at least: 3.5 x 1000 has no bf16."""
    return sinusoidal_embedding(x.to(torch.promote_types(x.dtype, torch.float32)) * TIME_FACTOR, 256)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    """``count`` vectors (B, 1, D) out of ``vec`` (B, D): shift, scale, gate, once or twice."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(dim, count * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec)).unsqueeze(1).chunk(self.count, dim=-1)


class SelfAttention(nn.Module):
    """Projections of one stream; the attention itself is :func:`attention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, L, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return *self.norm(q, k), v


class DoubleStreamBlock(nn.Module):
    """Text and picture, each with its own modulation, projections and MLP; one attention over both."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        dim, hidden = p.hidden_size, int(p.hidden_size * p.mlp_ratio)
        self.img_mod = Modulation(dim, 6)
        self.img_norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.img_attn = SelfAttention(dim, p.num_heads)
        self.img_norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.img_mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.txt_mod = Modulation(dim, 6)
        self.txt_norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.txt_attn = SelfAttention(dim, p.num_heads)
        self.txt_norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.txt_mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """img (B, L, D), txt (B, M, D), vec (B, D) -> img, txt."""
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = self.img_mod(vec)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.txt_mod(vec)
        txt_qkv = self.txt_attn.heads(modulate(self.txt_norm1(txt), t_shift1, t_scale1))
        img_qkv = self.img_attn.heads(modulate(self.img_norm1(img), i_shift1, i_scale1))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        attended, split = attention(q, k, v, pe), txt.shape[1]  # (B, N, D), text first
        img = img + i_gate1 * self.img_attn.proj(attended[:, split:])
        img = img + i_gate2 * self.img_mlp(modulate(self.img_norm2(img), i_shift2, i_scale2))
        txt = txt + t_gate1 * self.txt_attn.proj(attended[:, :split])
        txt = txt + t_gate2 * self.txt_mlp(modulate(self.txt_norm2(txt), t_shift2, t_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel over the joined sequence; both projections in, and both out, are one layer."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        dim, hidden = p.hidden_size, int(p.hidden_size * p.mlp_ratio)
        self.num_heads, self.widths = p.num_heads, (3 * dim, hidden)
        self.modulation = Modulation(dim, 3)
        self.pre_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear1 = nn.Linear(dim, 3 * dim + hidden)
        self.norm = QKNorm(dim // p.num_heads)
        self.linear2 = nn.Linear(dim + hidden, dim)

    def forward(self, x: Tensor, vec: Tensor, pe: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, N, D), vec (B, D)."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(self.pre_norm(x), shift, scale)).split(self.widths, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm(q, k)
        out = self.linear2(torch.cat([attention(q, k, v, pe), F.gelu(mlp, approximate="tanh")], dim=-1))
        return x + gate * out


class LastLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# --------------------------------------------------------------------------------------------------- model


class Flux(nn.Module):
    """The denoiser F(x_t, t, text, pooled text, guidance)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.img_in = nn.Linear(p.in_channels, p.hidden_size)
        self.time_in = MLPEmbedder(256, p.hidden_size)
        self.vector_in = MLPEmbedder(p.vec_in_dim, p.hidden_size)
        if p.guidance_embed:
            self.guidance_in = MLPEmbedder(256, p.hidden_size)
        self.txt_in = nn.Linear(p.context_in_dim, p.hidden_size)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(p) for _ in range(p.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(p) for _ in range(p.depth_single_blocks))
        self.final_layer = LastLayer(p.hidden_size, p.in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
        single_residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, L, in_channels) x_t, 2 x 2 latents a token.
            timestep: (B,) float, 0 … 1.
            encoder_hidden_states: (B, M, context_in_dim), T5's features.
            pooled_projections: (B, vec_in_dim), CLIP's pooled features.
            img_ids: (L, axes) float, position of each picture token: 0, row, column.
            txt_ids: (M, axes) float, zeros.
            guidance: (B,) float, the guidance scale; for guidance-distilled models.
            residuals: a ControlNet's, (B, L, D) each, of which each is added behind several double-stream blocks.
            single_residuals: the same for single-stream blocks.

        Returns:
            (B, L, in_channels), the flow eps - x_0.
        """
        img, txt, vec, pe = self.embed(
            hidden_states, timestep, encoder_hidden_states, pooled_projections, img_ids, txt_ids, guidance
        )
        for k, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, vec, pe)
            if residuals:
                img = img + residuals[k // -(-len(self.double_blocks) // len(residuals))]
        x, split = torch.cat([txt, img], dim=1), txt.shape[1]  # (B, N, D)
        for k, block in enumerate(self.single_blocks):
            x = block(x, vec, pe)
            if single_residuals:
                added = single_residuals[k // -(-len(self.single_blocks) // len(single_residuals))]
                x = torch.cat([x[:, :split], x[:, split:] + added], dim=1)
        return self.final_layer(x[:, split:], vec)

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What the blocks take: img (B, L, D), txt (B, M, D), vec (B, D) and the rotation of every position."""
        p = self.params
        if p.guidance_embed != (guidance is not None):
            raise ValueError(f"this model {'needs' if p.guidance_embed else 'takes no'} guidance input")
        img, txt = self.img_in(hidden_states), self.txt_in(encoder_hidden_states)  # (B, L, D), (B, M, D)
        vec = self.time_in(scaled_sinusoid(timestep)) + self.vector_in(pooled_projections)
        if guidance is not None:
            vec = vec + self.guidance_in(scaled_sinusoid(guidance))
        return img, txt, vec, rotary(torch.cat([txt_ids, img_ids]), p.axes_dim, p.theta, dtype=img.dtype)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, text_tokens: int, steps: int) -> ModelSpec:
    """Inputs, outputs and conventions; ``text_tokens`` is the length T5 is padded to."""
    axes = len(p.axes_dim)
    tokens = ("batch", "image_tokens", p.in_channels)
    guidance = TensorSpec(name="guidance", shape=("batch",), varies=Varies.PROMPT)
    text = ("batch", "text_tokens", p.context_in_dim)
    return ModelSpec(
        name=name,
        family="flux",
        inputs=(
            TensorSpec(name="hidden_states", shape=tokens, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="encoder_hidden_states", shape=text, varies=Varies.PROMPT),
            TensorSpec(name="pooled_projections", shape=("batch", p.vec_in_dim), varies=Varies.PROMPT),
            TensorSpec(name="img_ids", shape=("image_tokens", axes), varies=Varies.PROMPT),
            TensorSpec(name="txt_ids", shape=("text_tokens", axes), varies=Varies.PROMPT),
            *([guidance] if p.guidance_embed else []),
        ),
        outputs=(TensorSpec(name="output", shape=tokens, varies=Varies.SAMPLE),),
        dims=(
            BATCH,
            Dim(name="image_tokens", default=4096, max=16_384),  # 1024 x 1024 pixels; at most 2048 x 2048
            Dim(name="text_tokens", default=text_tokens, max=1024),
        ),
        path=LinearFlow(num_train_timesteps=1),
        prediction=FLOW_PREDICTION,
        sampling=Sampling(num_inference_steps=steps),
    )


def _preset(name: str, p: Params, *, text_tokens: int = 512, steps: int = 28) -> Preset:
    return Preset(params=p, build=Flux, spec=spec(name, p, text_tokens=text_tokens, steps=steps))


PRESETS: dict[str, Preset] = {
    "flux-dev": _preset("flux-dev", Params()),
    "flux-krea": _preset("flux-krea", Params()),  # other weights of the same architecture
    "flux-schnell": _preset("flux-schnell", Params(guidance_embed=False), text_tokens=256, steps=4),
}
