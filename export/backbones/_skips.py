"""Long skips: what a block makes of the features that its mirror image in the first half had.

A fusion joins the deep features d and the skipped ones s; a gate in (0, 1) says how much of s takes part. The fusions
by a projection and by a sum are those U-ViT compares (Bao et al. 2023, arXiv:2209.12152, section 3.1). Separate gains
for the low and the high frequencies of a skip are FreeU's (Si et al. 2023, arXiv:2309.11497), learned here instead of
chosen; the channel gate is squeeze and excitation (Hu et al. 2018, arXiv:1709.01507), the spatial one an attention
gate (Oktay et al. 2018, arXiv:1804.03999).

Shape legend: B batch, D channels of a token, N tokens, those of conditions first and then rows x columns of patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones.dit import CrossAttention

OPEN = 2.0  # bias in front of a gate's sigmoid: it starts at 0.88, so the skip is there from the first step


class SkipFusion(str, Enum):
    """How deep and skipped features become one."""

    NONE = "none"  # d
    CONCAT = "concat"  # W [d, s]: the release's
    ADD = "add"  # d + s
    NORMALISED = "normalised"  # (d + a norm(s)) / sqrt(1 + a²), a learned for each channel
    ATTENTION = "attention"  # d + attention of d to s
    FREQUENCY = "frequency"  # d + low_gain low(s) + high_gain high(s), gains learned for each channel


class SkipGate(str, Enum):
    """What decides how much of the skip takes part."""

    NONE = "none"
    TIME = "time"  # the timestep: less, the more noise
    CHANNEL = "channel"  # the tokens' mean: one gate a channel
    SPATIAL = "spatial"  # the neighbourhood: one gate a patch
    CROSS_ATTENTION = "cross_attention"  # what d finds in s: one gate a token and channel


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the patches are: ``extras`` tokens of conditions, then ``rows`` x ``columns`` of patches."""

    extras: int
    rows: int
    columns: int

    def of(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, rows, columns, D)."""
        return x[:, self.extras :].unflatten(1, (self.rows, self.columns))


# ------------------------------------------------------------------------------------------------------- gates


class Gate(Protocol):
    """(B or 1, N or 1, D or 1), all in (0, 1)."""

    def __call__(self, x: Tensor, skip: Tensor, timestep: Tensor, grid: Grid) -> Tensor: ...


class TimeGate(nn.Module):
    """sigmoid(bias - softplus(steepness) t / 1000) of each channel: falls with t whatever the parameters are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((dim,), OPEN))
        self.steepness = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, skip: Tensor, timestep: Tensor, grid: Grid) -> Tensor:
        noise = (timestep.to(x.dtype) / 1000)[:, None, None]
        return torch.sigmoid(self.bias - F.softplus(self.steepness) * noise)


class ChannelGate(nn.Module):
    """A small MLP of the tokens' mean of d and s."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * dim, dim // 4), nn.SiLU(), nn.Linear(dim // 4, dim))

    @property
    def last(self) -> nn.Linear:
        return self.mlp[2]  # type: ignore[return-value]

    def forward(self, x: Tensor, skip: Tensor, timestep: Tensor, grid: Grid) -> Tensor:
        return torch.sigmoid(self.mlp(torch.cat([x, skip], dim=-1).mean(dim=1, keepdim=True)))


class SpatialGate(nn.Module):
    """A convolution over the grid of d and s; tokens of conditions have no place in it and pass whole."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(2 * dim, 1, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor, timestep: Tensor, grid: Grid) -> Tensor:
        joined = torch.cat([grid.of(x), grid.of(skip)], dim=-1).permute(0, 3, 1, 2)
        mask = torch.sigmoid(self.last(joined)).flatten(2).transpose(1, 2)  # (B, rows * columns, 1)
        return torch.cat([torch.ones_like(x[:, : grid.extras, :1]), mask], dim=1)


class CrossAttentionGate(nn.Module):
    """d asks, s answers."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, num_heads)

    @property
    def last(self) -> nn.Linear:
        return self.attn.proj

    def forward(self, x: Tensor, skip: Tensor, timestep: Tensor, grid: Grid) -> Tensor:
        return torch.sigmoid(self.attn(normalised(x), normalised(skip)))


# ----------------------------------------------------------------------------------------------------- fusions


class Fusion(Protocol):
    """(B, N, D) of d and of s, and the gate if there is one, to (B, N, D)."""

    def __call__(self, x: Tensor, skip: Tensor, gate: Tensor | None, grid: Grid) -> Tensor: ...


def normalised(x: Tensor) -> Tensor:
    """Each token with mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])


def gated(skip: Tensor, gate: Tensor | None) -> Tensor:
    """``skip`` as far as the gate lets it through."""
    return skip if gate is None else gate * skip


class ConcatFusion(nn.Module):
    """W [d, s]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor | None, grid: Grid) -> Tensor:
        return self.linear(torch.cat([x, gated(skip, gate)], dim=-1))


class AddFusion(nn.Module):
    """d + s."""

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor | None, grid: Grid) -> Tensor:
        return x + gated(skip, gate)


class NormalisedFusion(nn.Module):
    """(d + a norm(s)) / sqrt(1 + a²): variance 1 where d has it, whatever the scale of s."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor | None, grid: Grid) -> Tensor:
        scale = gated(self.scale, gate)  # behind the norm, which would undo it
        return (x + scale * normalised(skip)) * torch.rsqrt(1 + scale.square())


class AttentionFusion(nn.Module):
    """d + attention of d to s: weights that sum to one mix what comes from s."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, num_heads)

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor | None, grid: Grid) -> Tensor:
        return x + self.attn(normalised(x), gated(normalised(skip), gate))


class FrequencyFusion(nn.Module):
    """d + low_gain low(s) + high_gain high(s), low frequencies being those up to ``cutoff`` on both axes.

    The discrete Fourier transform, the choice of frequencies and the transform back are one real matrix an axis
    (:func:`low_pass`), since complex numbers do not export. Tokens of conditions are added as they are.
    """

    def __init__(self, dim: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.low_gain = nn.Parameter(torch.ones(dim))
        self.high_gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor | None, grid: Grid) -> Tensor:
        filtered = self.filter(grid.of(skip)).flatten(1, 2)
        return x + gated(torch.cat([skip[:, : grid.extras], filtered], dim=1), gate)

    def filter(self, picture: Tensor) -> Tensor:
        """(B, rows, columns, D) with both gains applied."""
        across = low_pass(picture.shape[2], self.cutoff, like=picture) @ picture
        down = low_pass(picture.shape[1], self.cutoff, like=picture) @ across.flatten(2)
        low = down.unflatten(2, picture.shape[2:])
        return self.high_gain * picture + (self.low_gain - self.high_gain) * low


def low_pass(size: int, cutoff: float, *, like: Tensor) -> Tensor:
    """(size, size), the real matrix that keeps frequencies up to ``cutoff`` cycles a token.

    F⁻¹ diag(kept) F with the transform F = C - iS: the imaginary parts cancel because a frequency and its negative
    are kept together, which leaves (C diag(kept) C + S diag(kept) S) / size. Computed in float32 at least, the
    phases from integers, so that they do not lose digits with the size.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    k = torch.arange(size, device=like.device)
    n = torch.full_like(k, size)  # a tensor, because the remainder by a size that is free does not export
    kept = (torch.minimum(k, n - k).to(dtype) <= cutoff * n.to(dtype)).to(dtype)
    phase = (k[:, None] * k[None, :] % n).to(dtype) * (2 * math.pi) / n.to(dtype)
    c, s = phase.cos(), phase.sin()  # both symmetric
    return (((c * kept) @ c + (s * kept) @ s) / size).to(like.dtype)


# ---------------------------------------------------------------------------------------------------- the skip


class LongSkip(nn.Module):
    """A fusion and its gate.

    Args:
        fusion: any but NONE, which is the absence of this layer.
        gate: starts the same everywhere, at sigmoid(OPEN).
        dim, num_heads: D, and the heads of those that attend.
        cutoff: cycles a token up to which a frequency counts as low.
    """

    def __init__(self, fusion: SkipFusion, gate: SkipGate, dim: int, num_heads: int, cutoff: float) -> None:
        super().__init__()
        self.gate = _gate(gate, dim, num_heads)
        self.fusion = _fusion(fusion, dim, num_heads, cutoff)

    def reset_gate(self) -> None:
        """Make the gate the same for all inputs; called when the weights around it have been initialised."""
        if isinstance(self.gate, (ChannelGate, SpatialGate, CrossAttentionGate)):
            nn.init.zeros_(self.gate.last.weight)
            nn.init.constant_(self.gate.last.bias, OPEN)  # type: ignore[arg-type]

    def forward(self, x: Tensor, skip: Tensor, timestep: Tensor, grid: Grid) -> Tensor:
        """x and skip (B, N, D), timestep (B,), to (B, N, D)."""
        gate = None if self.gate is None else self.gate(x, skip, timestep, grid)
        return self.fusion(x, skip, gate, grid)


def _gate(kind: SkipGate, dim: int, num_heads: int) -> nn.Module | None:
    match kind:
        case SkipGate.NONE:
            return None
        case SkipGate.TIME:
            return TimeGate(dim)
        case SkipGate.CHANNEL:
            return ChannelGate(dim)
        case SkipGate.SPATIAL:
            return SpatialGate(dim)
        case SkipGate.CROSS_ATTENTION:
            return CrossAttentionGate(dim, num_heads)


def _fusion(kind: SkipFusion, dim: int, num_heads: int, cutoff: float) -> nn.Module:
    match kind:
        case SkipFusion.NONE:
            raise ValueError("a long skip needs a fusion other than none; leave the layer out instead")
        case SkipFusion.CONCAT:
            return ConcatFusion(dim)
        case SkipFusion.ADD:
            return AddFusion()
        case SkipFusion.NORMALISED:
            return NormalisedFusion(dim)
        case SkipFusion.ATTENTION:
            return AttentionFusion(dim, num_heads)
        case SkipFusion.FREQUENCY:
            return FrequencyFusion(dim, cutoff)
