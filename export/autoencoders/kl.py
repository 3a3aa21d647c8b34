"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G).

A convolutional encoder and decoder, trained with a small penalty on the Kullback-Leibler distance of the latent's
distribution from a normal one; between them self-attention over the smallest feature map. Stable Diffusion, SDXL,
SD3 and FLUX differ in the number of latent channels and in the pointwise convolutions around the latent.

Encoder and decoder are modules of their own that share nothing: a pipeline that draws from noise needs the decoder
alone. Names are those of diffusers' ``AutoencoderKL``, so its folders load without a key map.

Shape legend: B batch, C channels, H W height and width of a feature map, Z latent channels, f = 2^(levels - 1) pixels
along one side of a latent cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._unet_layers import PixelAttention

_EPS = 1e-6  # of every norm
_LOG_VARIANCE = (-30.0, 20.0)  # diffusers' bounds on the encoder's second output
_MAX_LEVELS, _MAX_LAYERS = 8, 64  # a configuration may be damaged

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one autoencoder; the defaults are Stable Diffusion's, 83.65 million parameters.

    Attributes:
        block_out_channels: widths from the picture to the latent; each level halves the resolution but the last.
        layers_per_block: residual blocks of an encoder's level; a decoder's has one more.
        mid_attention: whether the middle has self-attention.
        quant_conv, post_quant_conv: the pointwise convolutions after the encoder and before the decoder; SD3 and
            FLUX have none.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.block_out_channels) <= _MAX_LEVELS or not 1 <= self.layers_per_block <= _MAX_LAYERS:
            raise ValueError(
                f"block_out_channels must be 1 to {_MAX_LEVELS} widths and layers_per_block 1 to {_MAX_LAYERS}, got "
                f"{len(self.block_out_channels)} and {self.layers_per_block}"
            )
        if min(self.in_channels, self.out_channels, self.latent_channels, self.norm_num_groups) < 1:
            raise ValueError("channels and norm_num_groups must be at least 1")
        for channels in self.block_out_channels:
            if type(channels) is not int or channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"{channels!r} channels are no multiple of the {self.norm_num_groups} groups of a norm"
                )

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 1 << (len(self.block_out_channels) - 1)


# -------------------------------------------------------------------------------------------------- layers


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside the identity (or a pointwise convolution, where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Half the resolution; padded below and to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """One level of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, p: Params, *, down: bool) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * p.layers_per_block]
        self.resnets = nn.ModuleList(ResnetBlock(a, b, p.norm_num_groups) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One level of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, p: Params, *, up: bool) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * (p.layers_per_block + 1)]
        self.resnets = nn.ModuleList(ResnetBlock(a, b, p.norm_num_groups) for a, b in pairwise(widths))
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks, and attention with a single head between them."""

    def __init__(self, channels: int, p: Params) -> None:
        super().__init__()
        attention = [PixelAttention(channels, 1, groups=p.norm_num_groups, eps=_EPS)] if p.mid_attention else []
        self.attentions = nn.ModuleList(attention)
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, p.norm_num_groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.resnets
        for layer in (first, *self.attentions, last):
            x = layer(x)
        return x


# -------------------------------------------------------------------------------------------------- encoder


class _Encoder(nn.Module):
    """(B, in_channels, f H, f W) -> (B, 2 Z, H, W), mean and logarithm of the variance."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        widths = p.block_out_channels
        self.conv_in = nn.Conv2d(p.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(a, b, p, down=level < len(widths) - 1)
            for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = MidBlock(widths[-1], p)
        self.conv_norm_out = nn.GroupNorm(p.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * p.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        h = self.conv_in(sample)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class KLEncoder(nn.Module):
    """From a picture to the distribution of its latent."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.encoder = _Encoder(p)
        moments = 2 * p.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if p.quant_conv else None

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            sample: (B, in_channels, f H, f W) in [-1, 1].

        Returns:
            Mean and standard deviation, each (B, Z, H, W); a latent is mean + std · noise, before scaling.
        """
        moments = self.encoder(sample)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCE))


# -------------------------------------------------------------------------------------------------- decoder


class _Decoder(nn.Module):
    """(B, Z, H, W) -> (B, out_channels, f H, f W)."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        widths = p.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(p.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], p)
        self.up_blocks = nn.ModuleList(
            UpBlock(a, b, p, up=level < len(widths) - 1) for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = nn.GroupNorm(p.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], p.out_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(latent))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class KLDecoder(nn.Module):
    """From a latent to the picture."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(p.latent_channels, p.latent_channels, 1) if p.post_quant_conv else None
        self.decoder = _Decoder(p)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Decode.

        Args:
            latent_sample: (B, Z, H, W), no longer scaled.

        Returns:
            (B, out_channels, f H, f W), about [-1, 1].
        """
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return self.decoder(latent_sample)
