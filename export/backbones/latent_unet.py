"""The latent U-Net of Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv:2112.10752, appendix E).

ADM's skeleton with an additive timestep embedding, in a latent space, where transformer blocks let every position
attend to the tokens of a text encoder. Latent consistency models (Luo et al. 2023, arXiv:2310.04378) add an
embedding of the guidance scale. The module names are those of the authors' release (``ldm``), so the denoiser of
its checkpoints loads without a key map.

Shape legend: B batch, C channels, H W latent height and width, L = H W, S text tokens, D text channels,
E embedding channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import sinusoidal_embedding
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, BetaSchedule, Path
from lehr.runtime.prediction import EPSILON, V_PREDICTION, Prediction
from lehr.runtime.spec import BATCH, Dim, ModelSpec, TensorSpec, Varies

NUM_GROUPS = 32  # group norm groups everywhere
STABLE_DIFFUSION = VP(schedule=BetaSchedule.SCALED_LINEAR, beta_start=0.00085, beta_end=0.012)

# ---------------------------------------------------------------------------------------------- parameters


class Projection(str, Enum):
    """What leads into and out of the transformer blocks: the same map, stored in two shapes."""

    CONV = "conv"  # 1x1 convolution: Stable Diffusion 1
    LINEAR = "linear"  # Stable Diffusion 2, SDXL


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one latent U-Net; the defaults are Stable Diffusion 1.

    Attributes:
        transformer_depth: transformer blocks after each residual block, a number a level; 0 is no transformer.
        middle_depth: the same for the middle.
        num_head_channels: size of an attention head; None is ``num_heads`` heads at every level.
        guidance_dim: size of the guidance embedding ``timestep_cond`` of a consistency model; None has none.
        in_channels: those of the sample, as many as ``out_channels``, and behind them those of ``sample_cond``: an
            inpainting model's mask and masked latents (1 + 4), an editing model's source (4), a depth map (1).
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    num_head_channels: int | None = None
    num_heads: int = 8
    context_dim: int = 768
    projection: Projection = Projection.CONV
    guidance_dim: int | None = None

    def __post_init__(self) -> None:
        if self.in_channels < self.out_channels:
            raise ValueError(f"in_channels {self.in_channels} must hold the sample's {self.out_channels} channels")
        if len(self.transformer_depth) != len(self.channel_mult):
            raise ValueError(
                f"transformer_depth {self.transformer_depth} needs one number a level, as channel_mult "
                f"{self.channel_mult} has"
            )
        if self.model_channels % NUM_GROUPS:
            raise ValueError(f"model_channels {self.model_channels} must be a multiple of {NUM_GROUPS}")
        depths = (*self.transformer_depth, self.middle_depth)
        for mult, depth in zip((*self.channel_mult, self.channel_mult[-1]), depths, strict=True):
            channels = mult * self.model_channels
            if depth and channels % (self.num_head_channels or self.num_heads):
                raise ValueError(f"{channels} channels do not divide into attention heads: {self}")

    def heads(self, channels: int) -> int:
        """Attention heads of a layer of ``channels``."""
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads

    @property
    def condition_channels(self) -> int:
        """Channels of ``sample_cond``; 0 for models without."""
        return self.in_channels - self.out_channels

    @property
    def embedding(self) -> int:
        return 4 * self.model_channels

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this (one halving per level after the first)."""
        return int(2 ** (len(self.channel_mult) - 1))


# -------------------------------------------------------------------------------------- convolutional layers


class ResBlock(nn.Module):
    """Two convolutions around an additive timestep embedding."""

    def __init__(self, channels: int, embedding: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the release has dropout here; it keeps the convolution's index in checkpoints
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ---------------------------------------------------------------------------------------- transformer layers


class CrossAttention(nn.Module):
    """Queries from x (B, L, C), keys and values from context (B, S, D); self-attention if they are the same."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, length, dim = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.reshape(b, projected.shape[1], self.num_heads, dim // self.num_heads).transpose(1, 2)

        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, C/heads)
        return self.to_out(h.transpose(1, 2).reshape(b, length, dim))


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(dim, 4 * dim),
            nn.Identity(),  # dropout in the release
            nn.Linear(4 * dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, attention to the text, feed-forward."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, inside one residual connection."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, depth: int, projection: Projection) -> None:
        super().__init__()
        conv = self.conv = projection is Projection.CONV
        self.norm = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1) if conv else nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, num_heads) for _ in range(depth)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1) if conv else nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, height, width = x.shape
        y = self.norm(x)
        y = self.proj_in(y).flatten(2).mT if self.conv else self.proj_in(y.flatten(2).mT)  # (B, L, C)
        for block in self.transformer_blocks:
            y = block(y, context)
        if self.conv:
            return x + self.proj_out(y.mT.reshape(b, c, height, width))
        return x + self.proj_out(y).mT.reshape(b, c, height, width)


class EmbedSequential(nn.Sequential):
    """A sequence that hands each layer what it takes: the embedding, the text, or neither."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


# --------------------------------------------------------------------------------------------------- model


class LatentUNet(nn.Module):
    """The denoiser F(x_t, t, text), and with a guidance embedding F(x_t, t, text, guidance)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params

        def res(channels: int, out: int) -> ResBlock:
            return ResBlock(channels, p.embedding, out)

        def transformer(channels: int, depth: int) -> list[nn.Module]:
            make = SpatialTransformer
            return [make(channels, p.context_dim, p.heads(channels), depth, p.projection)] if depth else []

        self.time_embed = nn.Sequential(
            nn.Linear(p.model_channels, p.embedding), nn.SiLU(), nn.Linear(p.embedding, p.embedding)
        )
        if p.guidance_dim is not None:
            self.cond_proj = nn.Linear(p.guidance_dim, p.model_channels, bias=False)
        levels = list(zip(p.channel_mult, p.transformer_depth, strict=True))
        channels = p.model_channels
        down, skips = [EmbedSequential(nn.Conv2d(p.in_channels, channels, 3, padding=1))], [channels]
        for level, (mult, depth) in enumerate(levels):
            out = mult * p.model_channels
            for _ in range(p.num_res_blocks):
                down.append(EmbedSequential(res(channels, out), *transformer(out, depth)))
                channels = out
                skips.append(channels)
            if level + 1 < len(levels):
                down.append(EmbedSequential(Downsample(channels)))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = EmbedSequential(
            res(channels, channels), *transformer(channels, p.middle_depth), res(channels, channels)
        )
        up = []
        for level, (mult, depth) in reversed(list(enumerate(levels))):
            out = mult * p.model_channels
            for i in range(p.num_res_blocks + 1):
                layers = [res(channels + skips.pop(), out), *transformer(out, depth)]
                channels = out
                if level > 0 and i == p.num_res_blocks:
                    layers.append(Upsample(channels))
                up.append(EmbedSequential(*layers))
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, p.out_channels, 3, padding=1)
        )

    def embed(self, timestep: Tensor, timestep_cond: Tensor | None) -> Tensor:
        """(B,) and (B, guidance_dim) -> (B, E)."""
        first: nn.Linear = self.time_embed[0]  # type: ignore[assignment]
        fixed = sinusoidal_embedding(timestep, self.params.model_channels).to(first.weight.dtype)
        return self.time_embed(fixed if timestep_cond is None else fixed + self.cond_proj(timestep_cond))

    def denoise(
        self,
        sample: Tensor,
        emb: Tensor,
        context: Tensor,
        sample_cond: Tensor | None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """The U itself, once all else that conditions it is an embedding (B, E) and a context (B, S, D)."""
        x, skips = sample if sample_cond is None else torch.cat([sample, sample_cond], dim=1), []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        if residuals:  # a ControlNet's: of each skip connection, and of the middle
            *added, middle = residuals
            skips, x = [skip + residual for skip, residual in zip(skips, added, strict=True)], x + middle
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        sample_cond: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, out_channels, H, W) x_t; H and W multiples of ``params.size_multiple``.
            timestep: (B,) float, 0 … 999.
            encoder_hidden_states: (B, S, context_dim), the text encoder's tokens.
            timestep_cond: (B, guidance_dim) embedding of the guidance scale, exactly for models that have one.
            sample_cond: (B, condition_channels, H, W) what is joined to the sample, exactly for models that have it.
            residuals: a ControlNet's, see ``_controlnet.residuals``.

        Returns:
            (B, out_channels, H, W).
        """
        emb = self.embed(timestep, timestep_cond)
        return self.denoise(sample, emb, encoder_hidden_states, sample_cond, residuals)


# ------------------------------------------------------------------------------------------------- presets

TOKENS = Dim(name="tokens", default=77, max=4 * 77)  # CLIP's 77; prompt weighting joins several windows of 77


def conditions(p: Params) -> tuple[TensorSpec, ...]:
    """What every latent U-Net is conditioned on beside the timestep."""
    text = TensorSpec(name="encoder_hidden_states", shape=("batch", TOKENS.name, p.context_dim), varies=Varies.PROMPT)
    found = [text]
    if p.guidance_dim is not None:
        found.append(TensorSpec(name="timestep_cond", shape=("batch", p.guidance_dim), varies=Varies.PROMPT))
    if p.condition_channels:
        shape = ("batch", p.condition_channels, "height", "width")
        found.append(TensorSpec(name="sample_cond", shape=shape, varies=Varies.PROMPT))
    return tuple(found)


def spec(name: str, p: Params, *, size: int, path: Path, prediction: Prediction) -> ModelSpec:
    """Inputs, outputs and conventions of a latent U-Net trained at ``size`` x ``size`` latents."""
    side = {"default": size, "min": p.size_multiple, "max": 4 * size, "multiple": p.size_multiple}
    return ModelSpec(
        name=name,
        family="latent_unet",
        inputs=(
            TensorSpec(name="sample", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            *conditions(p),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side), TOKENS),
        path=path,
        prediction=prediction,
    )


def _preset(name: str, p: Params, *, size: int, prediction: Prediction) -> Preset:
    described = spec(name, p, size=size, path=STABLE_DIFFUSION, prediction=prediction)
    return Preset(params=p, build=LatentUNet, spec=described)


_SD_2 = Params(num_head_channels=64, context_dim=1024, projection=Projection.LINEAR)

PRESETS = {
    "sd-1.5": _preset("sd-1.5", Params(), size=64, prediction=EPSILON),
    "sd-2.1-base": _preset("sd-2.1-base", _SD_2, size=64, prediction=EPSILON),
    "sd-2.1": _preset("sd-2.1", _SD_2, size=96, prediction=V_PREDICTION),
    "sd-1.5-inpainting": _preset("sd-1.5-inpainting", Params(in_channels=9), size=64, prediction=EPSILON),
    "sd-2-inpainting": _preset("sd-2-inpainting", replace(_SD_2, in_channels=9), size=64, prediction=EPSILON),
    "lcm-sd-1.5": _preset("lcm-sd-1.5", Params(guidance_dim=256), size=64, prediction=EPSILON),
}
