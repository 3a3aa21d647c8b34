"""Ideogram 4: one stream of text and picture through a plain transformer (Ideogram 2026, 9.3 billion parameters).

Text features of Qwen3-VL (hidden states of several layers, joined) and picture tokens form one sequence that all
34 blocks treat alike; a learned vector tells the two kinds apart. Blocks are those of language models, RMSNorm before
and after attention and SwiGLU, scaled and gated by the time alone. Guidance subtracts another network, of the same
architecture without text: presets ``ideogram-4`` and ``ideogram-4-unconditional`` are two engines, not a batch of two.
There is no paper; the architecture is that of diffusers' ``Ideogram4Transformer2DModel``.

The release's network is fed 1 - s and returns x_0 - eps; this one is fed the noise level s and returns eps - x_0, as
FLUX does. Picture positions begin at 65,536, where a float32 phase has steps of 0.008: the part that comes from the
offset is computed in float64 and is a constant here, so phases are exact to 1e-5.

Shape legend: B batch, L picture tokens (2 x 2 latents each), M text tokens, N = M + L, D token channels,
d channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import sinusoidal_embedding
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import FLOW_PREDICTION
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

MASKED = -10_000.0  # added to the scores of padding; finite, so that a row of padding alone stays defined
TIME_FACTOR = 10_000.0  # the sinusoid sees 10,000 (1 - s)
AXES = 3  # time, row, column

# ---------------------------------------------------------------------------------------------- parameters


class Text(str, Enum):
    """Whether the sequence begins with text."""

    JOINED = "joined"
    NONE = "none"  # what guidance subtracts


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one Ideogram 4.

    Attributes:
        text_dim: channels of a text token's features.
        condition_dim: channels of the vector that modulates the blocks.
        sections: how many rotation frequencies each axis has; those of row and column are interleaved with time's.
        image_offset: where picture positions begin, so that they never meet those of text.
    """

    in_channels: int = 128
    hidden_size: int = 4608
    depth: int = 34
    num_heads: int = 18
    mlp_hidden: int = 12_288
    condition_dim: int = 512
    text_dim: int = 53_248
    theta: float = 5_000_000.0
    sections: tuple[int, int, int] = (24, 20, 20)
    image_offset: int = 65_536
    norm_eps: float = 1e-5
    text: Text = Text.JOINED

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x num_heads {self.num_heads}")
        if len(self.sections) != AXES or 3 * max(self.sections[1:]) > self.head_dim // 2:
            raise ValueError(
                f"sections {self.sections} must be three, of which the last two reach within a third of the "
                f"{self.head_dim // 2} frequencies of a head"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def axis_of(self, frequency: int) -> int:
        """The axis that a rotation frequency encodes: every third one the row, the next the column, to their ends."""
        axis = frequency % AXES
        return axis if axis and frequency < AXES * self.sections[axis] else 0


# -------------------------------------------------------------------------------------------------- layers

Rotation = tuple[Tensor, Tensor]


def phases(ids: Tensor, p: Params, *, offset: int) -> Tensor:
    """Angles (…, N, d/2) of positions ``ids + offset``, ids (…, N, 3), in float32 at least."""
    dtype = torch.promote_types(ids.dtype, torch.float32)
    count = p.head_dim // 2
    frequencies = [p.theta ** (-k / count) for k in range(count)]
    by_axis = [[f if p.axis_of(k) == axis else 0.0 for k, f in enumerate(frequencies)] for axis in range(AXES)]
    turn = torch.tensor([math.fmod(f * offset, 2 * math.pi) for f in frequencies], dtype=dtype, device=ids.device)
    weights = torch.tensor(by_axis, dtype=dtype, device=ids.device)
    return (ids.to(dtype).unsqueeze(-1) * weights).sum(-2) + turn  # no matmul: engines may round its operands


def rotate(x: Tensor, pe: Rotation) -> Tensor:
    """Rotate the pairs (k, k + d/2) of x (B, heads, N, d); cosines and sines are (B, 1, N, d/2)."""
    cos, sin = pe
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Self-attention over (B, N, D); ``bias`` (B, 1, N, N) is added to the scores."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.qkv = nn.Linear(p.hidden_size, 3 * p.hidden_size, bias=False)
        self.norm_q = RMSNorm(p.head_dim, 1e-5)
        self.norm_k = RMSNorm(p.head_dim, 1e-5)
        self.o = nn.Linear(p.hidden_size, p.hidden_size, bias=False)

    def forward(self, x: Tensor, pe: Rotation, bias: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(self.norm_q(q), pe), rotate(self.norm_k(k), pe)
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated linear unit with SiLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and MLP between two norms each; ``c`` (B, 1, condition_dim) scales inputs and gates outputs."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.attention = Attention(p)
        self.feed_forward = SwiGLU(p.hidden_size, p.mlp_hidden)
        self.attention_norm1 = RMSNorm(p.hidden_size, p.norm_eps)
        self.ffn_norm1 = RMSNorm(p.hidden_size, p.norm_eps)
        self.attention_norm2 = RMSNorm(p.hidden_size, p.norm_eps)
        self.ffn_norm2 = RMSNorm(p.hidden_size, p.norm_eps)
        self.adaln_modulation = nn.Linear(p.condition_dim, 4 * p.hidden_size)

    def forward(self, x: Tensor, c: Tensor, pe: Rotation, bias: Tensor | None) -> Tensor:
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaln_modulation(c).chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(x) * (1 + scale_msa), pe, bias)
        x = x + torch.tanh(gate_msa) * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return x + torch.tanh(gate_mlp) * self.ffn_norm2(fed)


class TimeEmbedder(nn.Module):
    """Sinusoid of 10,000 (1 - s), sines first, and a two-layer MLP: (B,) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(dim, dim)
        self.mlp_out = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        time = 1 - timestep.to(torch.promote_types(timestep.dtype, torch.float32))
        fixed = sinusoidal_embedding(TIME_FACTOR * time, self.mlp_in.in_features, frequency_shift=1)
        cosines, sines = fixed.chunk(2, dim=-1)
        return self.mlp_out(F.silu(self.mlp_in(torch.cat([sines, cosines], dim=-1).to(self.mlp_in.weight.dtype))))


class FinalLayer(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(p.hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(p.hidden_size, p.in_channels)
        self.adaln_modulation = nn.Linear(p.condition_dim, p.hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm_final(x) * (1 + self.adaln_modulation(F.silu(c))))


# --------------------------------------------------------------------------------------------------- model


class SingleStream(nn.Module):
    """The denoiser F(x_t, s, text)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.input_proj = nn.Linear(p.in_channels, p.hidden_size)
        if p.text is Text.JOINED:
            self.llm_cond_norm = RMSNorm(p.text_dim, 1e-6)
            self.llm_cond_proj = nn.Linear(p.text_dim, p.hidden_size)
        self.t_embedding = TimeEmbedder(p.hidden_size)
        self.adaln_proj = nn.Linear(p.hidden_size, p.condition_dim)
        self.embed_image_indicator = nn.Embedding(2, p.hidden_size)  # rows: text, picture
        self.layers = nn.ModuleList(Block(p) for _ in range(p.depth))
        self.final_layer = FinalLayer(p)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, L, in_channels) x_t, 2 x 2 latents a token.
            timestep: (B,) float, the noise level s, 0 … 1.
            img_ids: (L, 3) float, position of each picture token: 0, row, column.
            encoder_hidden_states: (B, M, text_dim), the language model's features; for models with text.
            encoder_attention_mask: (B, M) int64, 1 for text and 0 for padding on either side; for models with text.

        Returns:
            (B, L, in_channels), the flow eps - x_0.
        """
        p, length = self.params, hidden_states.shape[1]
        given = encoder_hidden_states is not None and encoder_attention_mask is not None
        if given != (p.text is Text.JOINED):
            raise ValueError(f"this model {'takes no' if given else 'needs'} text and its mask")
        x = self.input_proj(hidden_states) + self.embed_image_indicator.weight[1]  # (B, L, D)
        angle = phases(img_ids, p, offset=p.image_offset).expand(x.shape[0], -1, -1)
        bias: Tensor | None = None
        if encoder_hidden_states is not None and encoder_attention_mask is not None:
            text = self.llm_cond_proj(self.llm_cond_norm(encoder_hidden_states))
            x = torch.cat([text + self.embed_image_indicator.weight[0], x], dim=1)  # (B, N, D)
            mask = encoder_attention_mask.to(img_ids.dtype)
            numbers = (mask.cumsum(1) - 1).unsqueeze(-1).expand(-1, -1, AXES)  # text counts from 0 behind its padding
            angle = torch.cat([phases(numbers, p, offset=0), angle], dim=1)
            masked = torch.cat([(1 - mask) * MASKED, torch.zeros_like(x[:, -length:, 0], dtype=mask.dtype)], dim=1)
            # A row a query, because not every engine's attention broadcasts a mask along the queries.
            bias = masked[:, None, None, :].expand(-1, -1, x.shape[1], -1).to(x.dtype)
        pe = (angle.cos().to(x.dtype).unsqueeze(1), angle.sin().to(x.dtype).unsqueeze(1))
        c = F.silu(self.adaln_proj(self.t_embedding(timestep))).unsqueeze(1)  # (B, 1, condition_dim)
        for block in self.layers:
            x = block(x, c, pe, bias)
        return -self.final_layer(x[:, -length:], c)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params) -> ModelSpec:
    """Inputs, outputs and conventions."""
    tokens, text = ("batch", "image_tokens", p.in_channels), ("batch", "text_tokens")
    joined = p.text is Text.JOINED
    prompt = (
        TensorSpec(name="encoder_hidden_states", shape=(*text, p.text_dim), varies=Varies.PROMPT),
        TensorSpec(name="encoder_attention_mask", dtype=DType.INT64, shape=text, varies=Varies.PROMPT),
    )
    return ModelSpec(
        name=name,
        family="single_stream",
        inputs=(
            TensorSpec(name="hidden_states", shape=tokens, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="img_ids", shape=("image_tokens", AXES), varies=Varies.PROMPT),
            *(prompt if joined else ()),
        ),
        outputs=(TensorSpec(name="output", shape=tokens, varies=Varies.SAMPLE),),
        dims=(
            BATCH,
            Dim(name="image_tokens", default=4096, max=16_384),  # 1024 x 1024 pixels; at most 2048 x 2048
            *((Dim(name="text_tokens", default=512, max=2048),) if joined else ()),
        ),
        path=LinearFlow(num_train_timesteps=1),
        prediction=FLOW_PREDICTION,
        sampling=Sampling(num_inference_steps=48, guidance_scale=7.0),
    )


def _preset(name: str, p: Params) -> Preset:
    return Preset(params=p, build=SingleStream, spec=spec(name, p))


PRESETS: dict[str, Preset] = {
    "ideogram-4": _preset("ideogram-4", Params()),
    "ideogram-4-unconditional": _preset("ideogram-4-unconditional", Params(text=Text.NONE)),
}
