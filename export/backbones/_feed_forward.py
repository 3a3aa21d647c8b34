"""Feed-forward layers of a transformer block: plain, and gated by a product of two projections.

Gated units are Dauphin et al.'s (2017, arXiv:1612.08083); their variants, without biases and with two thirds of the
plain layer's width so that parameters stay equal, are Shazeer's (2020, arXiv:2002.05202, section 2).

Shape legend: B batch, L tokens, D channels of a token, E hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(str, Enum):
    """What stands between the two projections; ``a`` and ``b`` are the halves of the first one."""

    GELU = "gelu"  # gelu(a), exact, as U-ViT's release has it
    GLU = "glu"  # sigmoid(a) b
    REGLU = "reglu"  # relu(a) b
    GEGLU = "geglu"  # gelu(a) b
    SWIGLU = "swiglu"  # silu(a) b


_GATES: dict[FeedForward, Callable[[Tensor], Tensor]] = {
    FeedForward.GLU: torch.sigmoid,
    FeedForward.REGLU: F.relu,
    FeedForward.GEGLU: F.gelu,
    FeedForward.SWIGLU: F.silu,
}


class PlainFeedForward(nn.Module):
    """(B, L, D) -> (B, L, E) -> GELU -> (B, L, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedFeedForward(nn.Module):
    """(B, L, D) -> two of (B, L, 2E/3), multiplied -> (B, L, D); ``hidden`` is E."""

    def __init__(self, kind: FeedForward, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = _GATES[kind]
        width = 2 * hidden // 3
        self.fc1 = nn.Linear(dim, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.gate(a) * b)


def feed_forward(kind: FeedForward, dim: int, hidden: int) -> PlainFeedForward | GatedFeedForward:
    """A layer of ``kind`` with the parameters of a plain one of width ``hidden``."""
    return PlainFeedForward(dim, hidden) if kind is FeedForward.GELU else GatedFeedForward(kind, dim, hidden)
