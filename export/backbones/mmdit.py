"""MMDiT: Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206).

Text and picture are two streams with weights of their own that meet in one attention over both sequences. The
3.5 models normalise queries and keys (section 5.3.2 of the paper); 3.5-medium (MMDiT-X) adds a second,
picture-only attention to its first blocks. Module and parameter names are those of the authors' release, with one
exception: the last block's text stream ends in its attention, and its shorter modulation is named ``pre_only``.

The position table is the centre of a square sin-cos grid, whose values come with the checkpoint. A sin-cos grid is
two one-dimensional tables, so those are what is stored: thousands of numbers instead of the 226 million that
3.5-medium ships.

Shape legend: B batch, C latent channels, H W latent height and width, p patch size, L = (H/p)(W/p) tokens,
M text tokens, D token channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import (
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    sincos_grid,
    sincos_positions,
    unpatchify,
)
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import FLOW_PREDICTION
from lehr.runtime.spec import BATCH, Dim, ModelSpec, Sampling, TensorSpec, Varies

# ---------------------------------------------------------------------------------------------- parameters


class QKNorm(str, Enum):
    """Normalisation of queries and keys, per head."""

    NONE = "none"  # SD3
    RMS = "rms"  # SD3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one MMDiT.

    Attributes:
        depth: number of joint blocks; the published models have as many heads, of 64 channels each.
        dual_attention: how many blocks, from the first, have the second attention of MMDiT-X.
        pos_embed_max_size: tokens a side of the stored position grid, the largest size the model can take.
        base_size: tokens a side over which a freshly made grid covers positions 0 … base_size.
    """

    in_channels: int = 16
    patch_size: int = 2
    hidden_size: int = 1536
    depth: int = 24
    num_heads: int = 24
    mlp_ratio: float = 4.0
    context_dim: int = 4096
    pooled_dim: int = 2048
    qk_norm: QKNorm = QKNorm.NONE
    dual_attention: int = 0
    pos_embed_max_size: int = 192
    base_size: int = 64

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)")
        if not 0 <= self.dual_attention <= self.depth:
            raise ValueError(f"dual_attention must lie between 0 and depth {self.depth}, got {self.dual_attention}")


# -------------------------------------------------------------------------------------------------- layers


class PositionGrid(nn.Module):
    """Centre crop of a square sin-cos grid stored as its rows and columns, each (max_size, D/2)."""

    rows: Tensor
    columns: Tensor

    def __init__(self, p: Params) -> None:
        super().__init__()
        step = p.base_size / p.pos_embed_max_size
        table = sincos_positions(torch.arange(p.pos_embed_max_size, dtype=torch.float32) * step, p.hidden_size // 2)
        self.register_buffer("rows", table)
        self.register_buffer("columns", table.clone())

    def forward(self, height: int, width: int) -> Tensor:
        """(1, height * width, D)."""
        return sincos_grid(_centre(self.rows, height), _centre(self.columns, width))


def _centre(table: Tensor, size: int) -> Tensor:
    """The middle ``size`` rows; gathered, because a slice would fix the size at export."""
    start = (table.shape[0] - size) // 2
    return table.index_select(0, torch.arange(size, device=table.device) + start)


class VectorEmbedder(nn.Module):
    """Pooled text (B, pooled_dim) -> (B, D)."""

    def __init__(self, pooled_dim: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(pooled_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.mlp(pooled)


class SelfAttention(nn.Module):
    """Projections of one stream; the attention itself is :func:`attention`."""

    def __init__(self, p: Params, *, output: bool = True) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.qkv = nn.Linear(p.hidden_size, 3 * p.hidden_size)
        self.ln_q, self.ln_k = (
            nn.RMSNorm(p.hidden_size // p.num_heads, eps=1e-6) if p.qk_norm is QKNorm.RMS else nn.Identity()
            for _ in range(2)
        )
        if output:
            self.proj = nn.Linear(p.hidden_size, p.hidden_size)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, L, D/heads)."""
        b, length, dim = x.shape
        qkv = self.qkv(x).reshape(b, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.ln_q(q), self.ln_k(k), v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.heads(x)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, L, D/heads), three times -> (B, L, D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class StreamBlock(nn.Module):
    """One stream's share of a joint block: everything but the attention between the streams."""

    def __init__(self, p: Params, *, dual_attention: bool = False) -> None:
        super().__init__()
        dim = p.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(p)
        if dual_attention:
            self.attn2 = SelfAttention(p)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * p.mlp_ratio))
        self.chunks = 9 if dual_attention else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.chunks * dim))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """shift, scale and gate (B, D) of the attention, of the MLP and, if there is one, of the second attention."""
        return self.adaLN_modulation(c).chunk(self.chunks, dim=1)

    def before(self, x: Tensor, m: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """This stream's q, k, v."""
        return self.attn.heads(modulate(self.norm1(x), m[0], m[1]))

    def after(self, x: Tensor, attended: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        """The stream after the block; ``attended`` (B, L, D) is its part of the joint attention's output."""
        out = x + m[2].unsqueeze(1) * self.attn.proj(attended)
        if self.chunks == 9:
            out = out + m[8].unsqueeze(1) * self.attn2(modulate(self.norm1(x), m[6], m[7]))
        return out + m[5].unsqueeze(1) * self.mlp(modulate(self.norm2(out), m[3], m[4]))


class PreOnlyBlock(nn.Module):
    """The last block's text stream: it is attended to and then dropped."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(p.hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(p, output=False)
        self.pre_only = nn.Sequential(nn.SiLU(), nn.Linear(p.hidden_size, 2 * p.hidden_size))

    def before(self, context: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale = self.pre_only(c).chunk(2, dim=1)
        return self.attn.heads(modulate(self.norm1(context), shift, scale))


class JointBlock(nn.Module):
    """Both streams, one attention over text and picture together."""

    def __init__(self, p: Params, *, dual_attention: bool) -> None:
        super().__init__()
        self.context_block = StreamBlock(p)
        self.x_block = StreamBlock(p, dual_attention=dual_attention)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, M, D), x (B, L, D), c (B, D) -> context, x."""
        m_context, m_x = self.context_block.modulation(c), self.x_block.modulation(c)
        attended = joint_attention(self.context_block.before(context, m_context), self.x_block.before(x, m_x))
        split = context.shape[1]
        context = self.context_block.after(context, attended[:, :split], m_context)
        return context, self.x_block.after(x, attended[:, split:], m_x)


class LastJointBlock(nn.Module):
    """A joint block whose text stream has no successor."""

    def __init__(self, p: Params, *, dual_attention: bool) -> None:
        super().__init__()
        self.context_block = PreOnlyBlock(p)
        self.x_block = StreamBlock(p, dual_attention=dual_attention)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> Tensor:
        m_x = self.x_block.modulation(c)
        attended = joint_attention(self.context_block.before(context, c), self.x_block.before(x, m_x))
        return self.x_block.after(x, attended[:, context.shape[1] :], m_x)


def joint_attention(context: tuple[Tensor, Tensor, Tensor], x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One attention over the text's and the picture's q, k, v: (B, M + L, D), text first."""
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(context, x, strict=True))
    return attention(q, k, v)


class FinalLayer(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(p.hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(p.hidden_size, p.patch_size**2 * p.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(p.hidden_size, 2 * p.hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# --------------------------------------------------------------------------------------------------- model


class MMDiT(nn.Module):
    """The denoiser F(x_t, t, text, pooled text)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.x_embedder = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.pos_embed = PositionGrid(p)
        self.t_embedder = TimestepEmbedder(p.hidden_size)
        self.y_embedder = VectorEmbedder(p.pooled_dim, p.hidden_size)
        self.context_embedder = nn.Linear(p.context_dim, p.hidden_size)
        self.joint_blocks = nn.ModuleList(
            (JointBlock if i + 1 < p.depth else LastJointBlock)(p, dual_attention=i < p.dual_attention)
            for i in range(p.depth)
        )
        self.final_layer = FinalLayer(p)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, C, H, W) x_t; H and W multiples of the patch size.
            timestep: (B,) float, 0 … 1000.
            encoder_hidden_states: (B, M, context_dim), CLIP's and T5's features.
            pooled_projections: (B, pooled_dim), CLIP's pooled features.

        Returns:
            (B, C, H, W), the flow eps - x_0.
        """
        p = self.params
        rows, columns = hidden_states.shape[2] // p.patch_size, hidden_states.shape[3] // p.patch_size
        x = self.x_embedder(hidden_states)  # (B, L, D)
        x = x + self.pos_embed(rows, columns)
        c = self.t_embedder(timestep) + self.y_embedder(pooled_projections)  # (B, D)
        context = self.context_embedder(encoder_hidden_states)  # (B, M, D)
        *blocks, last = self.joint_blocks
        for block in blocks:
            context, x = block(context, x, c)
        x = last(context, x, c)
        return unpatchify(self.final_layer(x, c), rows, columns, p.patch_size)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int) -> ModelSpec:
    """Inputs, outputs and conventions of an MMDiT whose usual latents are ``size`` x ``size``."""
    side = {"default": size, "min": p.patch_size, "max": p.pos_embed_max_size * p.patch_size, "multiple": p.patch_size}
    latents = ("batch", p.in_channels, "height", "width")
    text = ("batch", "text_tokens", p.context_dim)
    return ModelSpec(
        name=name,
        family="mmdit",
        inputs=(
            TensorSpec(name="hidden_states", shape=latents, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="encoder_hidden_states", shape=text, varies=Varies.PROMPT),
            TensorSpec(name="pooled_projections", shape=("batch", p.pooled_dim), varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=latents, varies=Varies.SAMPLE),),
        dims=(
            BATCH,
            Dim(name="height", **side),
            Dim(name="width", **side),
            Dim(name="text_tokens", default=333, max=1024),  # 77 of the CLIPs and 256 of T5
        ),
        path=LinearFlow(),
        prediction=FLOW_PREDICTION,
        sampling=Sampling(num_inference_steps=28),
    )


def _preset(name: str, p: Params) -> Preset:
    return Preset(params=p, build=MMDiT, spec=spec(name, p, size=128))


PRESETS: dict[str, Preset] = {
    "sd3-medium": _preset("sd3-medium", Params()),
    "sd3.5-medium": _preset("sd3.5-medium", Params(qk_norm=QKNorm.RMS, dual_attention=13, pos_embed_max_size=384)),
    "sd3.5-large": _preset("sd3.5-large", Params(hidden_size=2432, depth=38, num_heads=38, qk_norm=QKNorm.RMS)),
}
