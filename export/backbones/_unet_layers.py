"""Layers that the pixel U-Nets (``unet``, ``ncsnpp``) use identically, named as in diffusers' ``UNet2DModel``.

Shape legend: B batch, C channels, H W height and width, L = H W, E embedding channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TimestepEmbedding(nn.Module):
    """Two-layer MLP over a fixed embedding of the timestep: (B, in_channels) -> (B, E)."""

    def __init__(self, in_channels: int, embedding: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, fixed: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(fixed.to(self.linear_1.weight.dtype))))


class PixelAttention(nn.Module):
    """Residual self-attention over the pixels of a feature map; ``gain`` scales the residual sum."""

    def __init__(self, channels: int, num_heads: int, *, groups: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.gain = num_heads, gain
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, L, C)

        def heads(linear: nn.Linear) -> Tensor:
            return linear(tokens).reshape(b, height * width, self.num_heads, c // self.num_heads).transpose(1, 2)

        h = F.scaled_dot_product_attention(heads(self.to_q), heads(self.to_k), heads(self.to_v))
        h = self.to_out(h.transpose(1, 2).reshape(b, height * width, c))
        out = x + h.transpose(1, 2).reshape(b, c, height, width)
        return out * self.gain if self.gain != 1.0 else out
