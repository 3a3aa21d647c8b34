"""Layers that several text encoders use identically.

Shape legend: B batch, L tokens, D channels of a token, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -10_000.0  # added to the scores of what is not looked at; finite in fp16, and a row of nothing else is defined


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU, x sigmoid(1.702 x) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


_tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {  # by the names in transformers' configurations
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def check_activation(name: str) -> None:
    """Raise ValueError for an activation that is not known here."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(sorted(ACTIVATIONS))}")


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=self.eps)


def causal_bias(length: int, *, like: Tensor) -> Tensor:
    """(1, 1, L, L): nothing for a token itself and those before it, ``MASKED`` for those after it."""
    position = torch.arange(length, device=like.device)
    later = position[None, :] > position[:, None]
    return (later.to(like.dtype) * MASKED)[None, None]


def padding_bias(attention_mask: Tensor, *, like: Tensor) -> Tensor:
    """attention_mask (B, L), 1 for text and 0 for padding -> (B, 1, L, L), a row a query."""
    bias = (1 - attention_mask.to(like.dtype)) * MASKED
    return bias[:, None, None, :].expand(-1, -1, attention_mask.shape[1], -1)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, L, heads * d) -> (B, heads, L, d)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of q, k, v (B, heads, L, d) with ``bias`` added to the scores -> (B, L, heads * d).

    ``scale`` None divides the scores by the square root of d.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)
