"""Tiny autoencoders (Bohan 2023, github.com/madebyollin/taesd): the latents of a large one for a fraction of the work.

A plain stack of convolutions in residual blocks, without norms or attention, distilled from the autoencoder of Stable
Diffusion, SDXL, SD3 or FLUX. Its encoder gives one latent instead of a distribution, already scaled as the denoiser
wants it. The authors' network works on pictures in [0, 1]; as diffusers' ``AutoencoderTiny``, whose names these are,
ours takes and returns [-1, 1].

Shape legend: B batch, C channels, H W height and width of the latent, Z latent channels, f = 2^(levels - 1) pixels
along one side of a latent cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BOUND = 3.0  # latents are squashed into (-3, 3) before decoding
_POOLED_GROUPS = 4
_MAX_LEVELS, _MAX_LAYERS = 8, 64  # a configuration may be damaged

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one tiny autoencoder; the defaults are TAESD's, 2.45 million parameters.

    Attributes:
        channels: of every layer.
        encoder_blocks, decoder_blocks: residual blocks of each resolution, in the order in which they run.
        pooled: whether the blocks at the latent's resolution begin with a normalised bottleneck, as those of the
            autoencoder for FLUX.2's 32 channels do.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    channels: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    pooled: bool = False

    def __post_init__(self) -> None:
        if len(self.encoder_blocks) != len(self.decoder_blocks) or not 1 <= len(self.encoder_blocks) <= _MAX_LEVELS:
            raise ValueError(f"{self.encoder_blocks} and {self.decoder_blocks} must be 1 to {_MAX_LEVELS} resolutions")
        if any(type(n) is not int or not 0 <= n <= _MAX_LAYERS for n in (*self.encoder_blocks, *self.decoder_blocks)):
            raise ValueError(f"a resolution must have 0 to {_MAX_LAYERS} blocks, got {self.encoder_blocks}")
        if (
            type(self.channels) is not int
            or min(self.in_channels, self.out_channels, self.latent_channels, self.channels) < 1
        ):
            raise ValueError("channels must be at least 1")

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 1 << (len(self.encoder_blocks) - 1)


# -------------------------------------------------------------------------------------------------- layers


class Block(nn.Module):
    """Three convolutions beside the identity."""

    def __init__(self, channels: int, *, pooled: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.pool = _bottleneck(channels) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _bottleneck(channels: int) -> nn.Sequential:
    wide = 4 * channels
    return nn.Sequential(
        nn.Conv2d(channels, wide, 1, bias=False),
        nn.GroupNorm(_POOLED_GROUPS, wide),
        nn.ReLU(),
        nn.Conv2d(wide, channels, 1, bias=False),
    )


class _Layers(nn.Module):
    """A holder, so that names begin as diffusers' do."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TinyEncoder(nn.Module):
    """From a picture to its latent."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        last = len(p.encoder_blocks) - 1
        layers: list[nn.Module] = []
        for level, count in enumerate(p.encoder_blocks):
            first = level == 0
            layers.append(
                nn.Conv2d(p.in_channels, p.channels, 3, padding=1)
                if first
                else nn.Conv2d(p.channels, p.channels, 3, stride=2, padding=1, bias=False)
            )
            layers += [Block(p.channels, pooled=p.pooled and level == last) for _ in range(count)]
        layers.append(nn.Conv2d(p.channels, p.latent_channels, 3, padding=1))
        self.encoder = _Layers(layers)

    def forward(self, sample: Tensor) -> Tensor:
        """(B, in_channels, f H, f W) in [-1, 1] -> (B, Z, H, W)."""
        return self.encoder(sample.add(1).div(2))


class TinyDecoder(nn.Module):
    """From a latent to the picture."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        last = len(p.decoder_blocks) - 1
        layers: list[nn.Module] = [nn.Conv2d(p.latent_channels, p.channels, 3, padding=1), nn.ReLU()]
        for level, count in enumerate(p.decoder_blocks):
            layers += [Block(p.channels, pooled=p.pooled and level == 0) for _ in range(count)]
            if level < last:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(p.channels, p.channels, 3, padding=1, bias=False)]
        layers.append(nn.Conv2d(p.channels, p.out_channels, 3, padding=1))
        self.decoder = _Layers(layers)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """(B, Z, H, W) -> (B, out_channels, f H, f W), about [-1, 1]."""
        return self.decoder(torch.tanh(latent_sample / _BOUND) * _BOUND).mul(2).sub(1)
