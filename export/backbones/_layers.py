"""Layers that several backbone families use identically.

Shape legend: B batch, L tokens, D channels of a token, H W height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_embedding(
    timestep: Tensor, dim: int, max_period: float = 10_000.0, *, frequency_shift: int = 0
) -> Tensor:
    """Embed scalars as ``[cos(t w_0) … cos(t w_{n-1}), sin(t w_0) …]``, w_k = max_period^(-k/n), n = dim/2.

    The order (cosines first) and the frequencies are those of DDPM (Ho et al. 2020, arXiv:2006.11239) as
    used by ADM and DiT. Computed in float32 at least: timesteps reach 1000, and a half-precision product
    t·w loses the phase.

    Args:
        timestep: (B,) float.
        dim: even embedding size.
        max_period: longest wavelength, in timesteps, over 2 pi.
        frequency_shift: 1 makes w_k = max_period^(-k/(n-1)), so that the last frequency is 1/max_period exactly.

    Returns:
        (B, dim), float32 (float64 if ``timestep`` is).
    """
    dtype = torch.promote_types(timestep.dtype, torch.float32)
    half = dim // 2
    k = torch.arange(half, dtype=dtype, device=timestep.device)
    frequencies = torch.exp(-math.log(max_period) * k / (half - frequency_shift))
    phase = timestep.to(dtype)[:, None] * frequencies
    return torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid of ``frequency_dim`` values followed by a two-layer MLP: (B,) -> (B, dim)."""

    def __init__(self, dim: int, frequency_dim: int = 256, *, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_dim, self.frequency_shift = frequency_dim, frequency_shift
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        fixed = sinusoidal_embedding(timestep, self.frequency_dim, frequency_shift=self.frequency_shift)
        return self.mlp(fixed.to(first.weight.dtype))


# --------------------------------------------------------------------------------- transformers on patches


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D) * (1 + scale) + shift, with shift and scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_positions(positions: Tensor, dim: int) -> Tensor:
    """``[sin(x w_0) … sin(x w_{n-1}), cos(x w_0) …]``, w_k = 10000^(-k/n), n = dim/2: (N,) -> (N, dim)."""
    half = dim // 2
    k = torch.arange(half, dtype=positions.dtype, device=positions.device)
    phase = positions[:, None] * torch.exp(-math.log(10_000.0) * k / half)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def sincos_grid(rows: Tensor, columns: Tensor) -> Tensor:
    """2-D table of two 1-D ones, (rows, D/2) and (columns, D/2): (1, rows * columns, D), the column first (MAE)."""
    height, width, half = rows.shape[0], columns.shape[0], rows.shape[1]
    y = rows[:, None, :].expand(height, width, half)
    x = columns[None, :, :].expand(height, width, half)
    return torch.cat([x, y], dim=-1).reshape(1, height * width, 2 * half)


def integer_grid(rows: int, columns: int, dim: int, *, like: Tensor) -> Tensor:
    """Sin-cos table of the integer grid, (1, rows * columns, dim), computed in float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    y, x = (sincos_positions(torch.arange(n, dtype=dtype, device=like.device), dim // 2) for n in (rows, columns))
    return sincos_grid(y, x).to(like.dtype)


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, L, D), one token a patch."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, sample: Tensor) -> Tensor:
        return self.proj(sample).flatten(2).transpose(1, 2)


def unpatchify(x: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """(B, rows * columns, patch_size² C) -> (B, C, rows * patch_size, columns * patch_size)."""
    p, channels = patch_size, x.shape[-1] // patch_size**2
    x = x.reshape(-1, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return x.reshape(-1, channels, rows * p, columns * p)


class Mlp(nn.Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
