"""The text encoder of the emoji: a small bidirectional transformer with norms before its layers, and a memory.

The memory holds what captions of every picture have in common. What a text means is recalled from it by likeness (a
modern Hopfield network's step, Ramsauer et al. 2020, arXiv:2008.02217), so that words nobody has used before end where
the denoiser has been, or between two such places.

Shape legend: B batch, M tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import Mlp
from lehr.export.backbones.dit import CrossAttention

MASKED = -10_000.0  # added to the scores of padding; finite, as in the denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of the text encoder.

    Attributes:
        memory: rows of it; 3,786 pictures and the empty text.
        sharpness: of the likeness; how much of what is recalled is the nearest row.
    """

    vocabulary: int = 2048
    longest: int = 32
    hidden_size: int = 192
    depth: int = 3
    num_heads: int = 6
    mlp_ratio: int = 2
    memory: int = 3787
    sharpness: float = 25.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")


class Block(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(p.hidden_size)
        self.attn = CrossAttention(p.hidden_size, p.num_heads)
        self.norm2 = nn.LayerNorm(p.hidden_size)
        self.mlp = Mlp(p.hidden_size, p.mlp_ratio * p.hidden_size)

    def forward(self, x: Tensor, mask_bias: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, mask_bias)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class TextEncoder(nn.Module):
    """Tokens -> features; every token sees every other."""

    memory: Tensor  # (R, D), each row of unit mean square

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.token_embedding = nn.Embedding(p.vocabulary, p.hidden_size)
        self.position_embedding = nn.Embedding(p.longest, p.hidden_size)
        self.blocks = nn.ModuleList(Block(p) for _ in range(p.depth))
        self.final_norm = nn.LayerNorm(p.hidden_size)
        self.register_buffer("memory", torch.zeros(p.memory, p.hidden_size))
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the network.

        Args:
            input_ids: (B, M) int64, M up to ``longest``.
            attention_mask: (B, M) int64, 1 for text and 0 for padding.

        Returns:
            Features (B, M, D) of the tokens, and what their mean over the text recalls (B, D), of unit mean square.
        """
        x, mean = self.embed(input_ids, attention_mask)
        cosine = mean @ self.memory.T / self.params.hidden_size
        recalled = torch.softmax(self.params.sharpness * cosine, dim=1) @ self.memory
        return x, F.rms_norm(recalled, recalled.shape[-1:], eps=1e-6)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, M, D) of the tokens, and their mean over the text (B, D) scaled to unit mean square."""
        x = self.token_embedding(input_ids)
        x = x + self.position_embedding(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = attention_mask.to(x.dtype)
        mask_bias = ((1 - mask) * MASKED)[:, None, None, :].expand(-1, -1, input_ids.shape[1], -1)
        for block in self.blocks:
            x = block(x, mask_bias)
        x = self.final_norm(x)
        # The direction alone tells what is meant; the length would tell how much the tokens agree.
        return x, F.rms_norm((x * mask[:, :, None]).sum(dim=1), x.shape[-1:], eps=1e-6)
