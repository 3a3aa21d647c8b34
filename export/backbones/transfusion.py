"""Transfusion: one transformer that writes text and diffuses pictures (Zhou et al. 2024, arXiv:2408.11039).

The transformer is a language model's (Llama: Touvron et al. 2023, arXiv:2302.13971). A text is a causal prefix; the
patches of the noisy picture stand behind it as one block, in which every patch sees the whole prefix and all other
patches. This is the picture's half: given a prefix, the noise in the patches. The language head, which would write the
text that follows, is no part of the denoiser.

A token of the prefix sees nothing behind it, so all that the transformer computes for it, keys and values in every
layer, depends on the prompt alone. ``forward`` keeps prefix and patches apart, with the same weights, instead of
masking one sequence: the keys and values then fall to the graph that runs once a prompt.

No weights are published. Module names are those of transformers' ``LlamaModel``, with an input and an output layer for
patches and an embedding of the timestep, which is added to every patch.

Shape legend: B batch, C latent channels, H W latent height and width, p patch size, M tokens of the prefix,
L = (H/p)(W/p) patches, D token channels, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import PatchEmbed, TimestepEmbedder, unpatchify
from lehr.export.backbones.preset import Preset
from lehr.export.backbones.single_stream import MASKED, RMSNorm, Rotation, rotate
from lehr.runtime.paths import VP, BetaSchedule
from lehr.runtime.prediction import EPSILON
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

NORM_EPS = 1e-5
THETA = 10_000.0

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one Transfusion; ``vocab_size`` counts the two tokens that stand around a picture."""

    in_channels: int = 8
    patch_size: int = 2
    hidden_size: int = 768
    depth: int = 16
    num_heads: int = 12
    mlp_hidden: int = 2048
    vocab_size: int = 32_002

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


# -------------------------------------------------------------------------------------------------- layers


def rotation(positions: Tensor, head_dim: int, *, like: Tensor) -> Rotation:
    """Cosines and sines (B, 1, N, d/2) at positions (B, N), computed in float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    k = torch.arange(head_dim // 2, dtype=dtype, device=like.device)
    phase = positions.to(dtype).unsqueeze(-1) * THETA ** (-2 * k / head_dim)
    return phase.cos().to(like.dtype).unsqueeze(1), phase.sin().to(like.dtype).unsqueeze(1)


class Attention(nn.Module):
    """Projections of one layer; who attends to whom is the block's affair."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.q_proj = nn.Linear(p.hidden_size, p.hidden_size, bias=False)
        self.k_proj = nn.Linear(p.hidden_size, p.hidden_size, bias=False)
        self.v_proj = nn.Linear(p.hidden_size, p.hidden_size, bias=False)
        self.o_proj = nn.Linear(p.hidden_size, p.hidden_size, bias=False)

    def heads(self, x: Tensor, pe: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, N, d); queries and keys rotated."""
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, pe), rotate(k, pe), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """Gated linear unit with SiLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Stream:
    """Tokens (B, N, D) on their way through the blocks, their rotation, and their scores' bias (B, 1, N, keys)."""

    def __init__(self, x: Tensor, pe: Rotation, bias: Tensor) -> None:
        self.x, self.pe, self.bias = x, pe, bias


class Block(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(p.hidden_size, NORM_EPS)
        self.self_attn = Attention(p)
        self.post_attention_layernorm = RMSNorm(p.hidden_size, NORM_EPS)
        self.mlp = GatedMlp(p.hidden_size, p.mlp_hidden)

    def forward(self, text: Stream, image: Stream) -> tuple[Tensor, Tensor]:
        """Prefix (B, M, D) and patches (B, L, D) one layer on."""
        q, k, v = self.self_attn.heads(self.input_layernorm(text.x), text.pe)
        q_image, k_image, v_image = self.self_attn.heads(self.input_layernorm(image.x), image.pe)
        prefix = text.x + self.self_attn.attend(q, k, v, text.bias)
        keys, values = torch.cat([k, k_image], dim=2), torch.cat([v, v_image], dim=2)
        patches = image.x + self.self_attn.attend(q_image, keys, values, image.bias)
        return self.feed(prefix), self.feed(patches)

    def feed(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


# --------------------------------------------------------------------------------------------------- model


class Transfusion(nn.Module):
    """The denoiser F(x_t, t, prefix)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.embed_tokens = nn.Embedding(p.vocab_size, p.hidden_size)
        self.x_embedder = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.t_embedder = TimestepEmbedder(p.hidden_size)
        self.layers = nn.ModuleList(Block(p) for _ in range(p.depth))
        self.norm = RMSNorm(p.hidden_size, NORM_EPS)
        self.patch_head = nn.Linear(p.hidden_size, p.patch_size * p.patch_size * p.in_channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, C, H, W) x_t; H and W multiples of the patch size.
            timestep: (B,) float, 0 … 999.
            input_ids: (B, M) int64, the text up to and with the token that begins a picture.
            attention_mask: (B, M) int64, 1 for text and 0 for padding, on either side.

        Returns:
            (B, C, H, W).
        """
        p = self.params
        rows, columns = hidden_states.shape[2] // p.patch_size, hidden_states.shape[3] // p.patch_size
        patches = self.x_embedder(hidden_states)  # (B, L, D)
        mask = attention_mask.to(patches.dtype)
        text, image = self.prefix(input_ids, mask), self.block(patches, mask)
        image.x = image.x + self.t_embedder(timestep).unsqueeze(1)
        for layer in self.layers:
            text.x, image.x = layer(text, image)
        return unpatchify(self.patch_head(self.norm(image.x)), rows, columns, p.patch_size)

    def prefix(self, input_ids: Tensor, mask: Tensor) -> Stream:
        """The text: causal, its positions counted from its first token."""
        x = self.embed_tokens(input_ids)
        numbers = torch.arange(input_ids.shape[1], device=x.device)
        seen = (numbers[:, None] >= numbers[None, :]).to(mask.dtype) * mask.unsqueeze(1)  # (B, M, M)
        pe = rotation(mask.cumsum(1) - 1, self.params.head_dim, like=x)
        return Stream(x, pe, ((1 - seen) * MASKED).unsqueeze(1))

    def block(self, patches: Tensor, mask: Tensor) -> Stream:
        """The picture: sees all text and all of itself, its positions follow the text's last."""
        length = patches.shape[1]
        numbers = torch.arange(length, dtype=mask.dtype, device=mask.device)
        pe = rotation(mask.sum(1, keepdim=True) + numbers, self.params.head_dim, like=patches)
        masked = torch.cat([(1 - mask) * MASKED, torch.zeros_like(patches[:, :, 0])], dim=1)
        # A row a query, because not every engine's attention broadcasts a mask along the queries.
        return Stream(patches, pe, masked[:, None, None, :].expand(-1, -1, length, -1))


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int) -> ModelSpec:
    """Inputs, outputs and conventions of a Transfusion trained on ``size`` x ``size`` latents."""
    side = {"default": size, "min": p.patch_size, "max": 4 * size, "multiple": p.patch_size}
    latents, text = ("batch", p.in_channels, "height", "width"), ("batch", "text_tokens")
    return ModelSpec(
        name=name,
        family="transfusion",
        inputs=(
            TensorSpec(name="hidden_states", shape=latents, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="input_ids", dtype=DType.INT64, shape=text, varies=Varies.PROMPT),
            TensorSpec(name="attention_mask", dtype=DType.INT64, shape=text, varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=latents, varies=Varies.SAMPLE),),
        dims=(
            BATCH,
            Dim(name="height", **side),
            Dim(name="width", **side),
            Dim(name="text_tokens", default=128, max=4096),
        ),
        path=VP(schedule=BetaSchedule.COSINE),
        prediction=EPSILON,
        sampling=Sampling(num_inference_steps=250, guidance_scale=5.0),
    )


def _preset(name: str, *, width: int, depth: int, heads: int, mlp: int) -> Preset:
    p = Params(hidden_size=width, depth=depth, num_heads=heads, mlp_hidden=mlp)
    return Preset(params=p, build=Transfusion, spec=spec(name, p, size=32))


# The five sizes of the paper (table 2: depth, width, heads), whose names count a separate language head of as many
# weights as the embedding. MLPs are Llama's: two thirds of four widths, rounded up to 256. Pictures of 256 pixels are
# 32 x 32 x 8 latents, 256 patches.
PRESETS: dict[str, Preset] = {
    "transfusion-0.16b": _preset("transfusion-0.16b", width=768, depth=16, heads=12, mlp=2048),
    "transfusion-0.37b": _preset("transfusion-0.37b", width=1024, depth=24, heads=16, mlp=2816),
    "transfusion-0.76b": _preset("transfusion-0.76b", width=1536, depth=24, heads=24, mlp=4096),
    "transfusion-1.4b": _preset("transfusion-1.4b", width=2048, depth=24, heads=16, mlp=5632),
    "transfusion-7b": _preset("transfusion-7b", width=4096, depth=32, heads=32, mlp=11_008),
}
