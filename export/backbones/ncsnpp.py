"""NCSN++: the continuous score network of score-SDE (Song et al. 2021, arXiv:2011.13456, appendix H).

A U-Net that sees the noise level itself, through Fourier features of log(sigma), and whose input and output are
fed to every resolution through FIR-filtered pyramids ("input skip", "output skip": the paper's variant for
256 x 256 and more). Every residual sum is scaled by 1/sqrt(2), and the output is divided by sigma, which makes it
the score. Module names are those of diffusers' ``UNet2DModel`` with skip blocks, so its folders load without a
key map.

Shape legend: B batch, C channels, H W height and width, E embedding channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._unet_layers import PixelAttention, TimestepEmbedding
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VE, Path
from lehr.runtime.prediction import SCORE, Prediction
from lehr.runtime.spec import BATCH, Dim, ModelSpec, TensorSpec, Varies

GAIN = 1 / math.sqrt(2)  # of every residual sum ("skip rescale", appendix H.1)
EPS = 1e-6  # of every group norm
FOURIER_SCALE = 16.0  # standard deviation of the Fourier frequencies (appendix C)


def groups(channels: int) -> int:
    """Group norm groups: at least four channels in each, at most 32 groups."""
    return min(channels // 4, 32)


# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one NCSN++; the defaults have the size of the paper's CIFAR-10 model ("NCSN++ cont.").

    Attributes:
        attention_levels: levels of ``block_out_channels`` that have self-attention; the middle always has.
        head_channels: size of an attention head; None is one head of all channels.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 4
    attention_levels: tuple[int, ...] = (1,)
    head_channels: int | None = None

    def __post_init__(self) -> None:
        widths = self.block_out_channels
        joined = [a + b for a, b in zip(widths, (*widths[1:], widths[-1]), strict=True)]  # in the decoder
        if any(channels < 4 or channels % groups(channels) for channels in (*widths, *joined)):
            raise ValueError(
                f"block_out_channels {widths} and sums of neighbours must be multiples of 4, and of 32 from 128 on"
            )

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this (one halving per level after the first)."""
        return int(2 ** (len(self.block_out_channels) - 1))


# -------------------------------------------------------------------------------------------------- layers


class FourierEmbedding(nn.Module):
    """(B,) sigma -> (B, 2 dim): sin and cos of 2 pi w log(sigma), the frequencies w drawn once and then fixed."""

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(dim) * FOURIER_SCALE)

    def forward(self, sigma: Tensor) -> Tensor:
        dtype = torch.promote_types(sigma.dtype, torch.float32)  # phases reach a thousand turns
        phase = sigma.to(dtype).log()[:, None] * self.weight.to(dtype) * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


def fir_kernel(x: Tensor) -> Tensor:
    """(C, 1, 4, 4): the separable binomial filter [1 3 3 1] / 8 for every channel of ``x`` (StyleGAN2's)."""
    outer, inner = x.new_full((1,), 1 / 8), x.new_full((2,), 3 / 8)
    taps = torch.cat([outer, inner, outer])
    return (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


class Resize(Enum):
    """Resampling without aliasing."""

    NONE = 0
    DOWN = 1
    UP = 2

    def __call__(self, x: Tensor) -> Tensor:
        if self is Resize.DOWN:
            return F.conv2d(x, fir_kernel(x), stride=2, padding=1, groups=x.shape[1])
        if self is Resize.UP:  # four times the kernel: three of four samples that it meets are inserted zeros
            return F.conv_transpose2d(x, 4 * fir_kernel(x), stride=2, padding=1, groups=x.shape[1])
        return x


class ResnetBlock(nn.Module):
    """BigGAN residual block with an additive embedding and FIR resampling inside (figure 7 of the paper)."""

    def __init__(self, channels: int, out_channels: int, embedding: int, resize: Resize = Resize.NONE) -> None:
        super().__init__()
        self.resize = resize
        self.norm1 = nn.GroupNorm(groups(channels), channels, eps=EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out_channels)
        self.norm2 = nn.GroupNorm(groups(out_channels), out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels and resize is Resize.NONE
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(self.resize(x)) + h) * GAIN


def attention(p: Params, channels: int) -> PixelAttention:
    """Self-attention as every level has it."""
    heads = channels // (p.head_channels or channels)
    return PixelAttention(channels, heads, groups=groups(channels), eps=EPS, gain=GAIN)


class DownBlock(nn.Module):
    """One level of the encoder; all but the last end by going down and adding the filtered input."""

    def __init__(self, p: Params, embedding: int, in_channels: int, level: int) -> None:
        super().__init__()
        out, count = p.block_out_channels[level], p.layers_per_block
        self.resnets = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out, out, embedding) for i in range(count))
        attended = count if level in p.attention_levels else 0
        self.attentions = nn.ModuleList(attention(p, out) for _ in range(attended))
        self.goes_down = level + 1 < len(p.block_out_channels)
        if self.goes_down:
            self.resnet_down = ResnetBlock(out, out, embedding, Resize.DOWN)
            self.skip_conv = nn.Conv2d(p.in_channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the output, the input at the output's resolution, and what the decoder takes from this level."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            x = self.attentions[i](x) if len(self.attentions) else x
            skips.append(x)
        if self.goes_down:
            pyramid = Resize.DOWN(pyramid)
            x = self.resnet_down(x, emb) + self.skip_conv(pyramid)
            skips.append(x)
        return x, pyramid, skips


class MidBlock(nn.Module):
    def __init__(self, p: Params, embedding: int) -> None:
        super().__init__()
        channels = p.block_out_channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, embedding) for _ in range(2))
        self.attentions = nn.ModuleList([attention(p, channels)])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, emb)), emb)


class UpBlock(nn.Module):
    """One level of the decoder; all but the last end by adding to the output's pyramid and going up."""

    def __init__(self, p: Params, embedding: int, in_channels: int, skips: Iterable[int], level: int) -> None:
        super().__init__()
        out = p.block_out_channels[level]
        self.resnets = nn.ModuleList(
            ResnetBlock((out if i else in_channels) + skip, out, embedding) for i, skip in enumerate(skips)
        )
        self.attentions = nn.ModuleList([attention(p, out)] if level in p.attention_levels else [])
        self.goes_up = level > 0
        if self.goes_up:
            self.skip_norm = nn.GroupNorm(groups(out), out, eps=EPS)
            self.skip_conv = nn.Conv2d(out, p.out_channels, 3, padding=1)
            self.resnet_up = ResnetBlock(out, out, embedding, Resize.UP)

    def forward(
        self, x: Tensor, emb: Tensor, skips: list[Tensor], pyramid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Takes its inputs from the end of ``skips``; returns the output and the output's pyramid, a level up."""
        for resnet in self.resnets:
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
        for block in self.attentions:
            x = block(x)
        if self.goes_up:
            new = self.skip_conv(F.silu(self.skip_norm(x)))
            pyramid = Resize.UP(new if pyramid is None else pyramid + new)
            x = self.resnet_up(x, emb)
        return x, pyramid


# --------------------------------------------------------------------------------------------------- model


class NCSNpp(nn.Module):
    """The denoiser F(x_t, sigma), an estimate of the score."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        first = p.block_out_channels[0]
        embedding = 4 * first
        self.conv_in = nn.Conv2d(p.in_channels, first, 3, padding=1)
        self.time_proj = FourierEmbedding(first)
        self.time_embedding = TimestepEmbedding(2 * first, embedding)

        channels, skips = first, [first]
        self.down_blocks = nn.ModuleList()
        for level, out in enumerate(p.block_out_channels):
            self.down_blocks.append(DownBlock(p, embedding, channels, level))
            channels = out
            skips += [out] * (p.layers_per_block + (level + 1 < len(p.block_out_channels)))
        self.mid_block = MidBlock(p, embedding)
        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(p.block_out_channels))):
            taken = [skips.pop() for _ in range(p.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(p, embedding, channels, taken, level))
            channels = out
        self.conv_norm_out = nn.GroupNorm(groups(channels), channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, p.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, in_channels, H, W) x_t; H and W multiples of ``params.size_multiple``.
            timestep: (B,) float, the noise level sigma itself.

        Returns:
            (B, out_channels, H, W), the score.
        """
        emb = self.time_embedding(self.time_proj(timestep))
        x, pyramid = self.conv_in(sample), sample
        skips = [x]
        for block in self.down_blocks:
            x, pyramid, new = block(x, emb, pyramid)
            skips += new
        x = self.mid_block(x, emb)
        output: Tensor | None = None
        for block in self.up_blocks:
            x, output = block(x, emb, skips, output)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        if output is not None:  # None if there is a single level
            x = x + output
        return x / timestep.to(x.dtype)[:, None, None, None]


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int, path: Path, prediction: Prediction) -> ModelSpec:
    """Inputs, outputs and conventions of an NCSN++ trained on pictures of ``size`` x ``size``."""
    side = {"default": size, "min": p.size_multiple, "max": 4 * size, "multiple": p.size_multiple}
    return ModelSpec(
        name=name,
        family="ncsnpp",
        inputs=(
            TensorSpec(name="sample", shape=("batch", p.in_channels, "height", "width"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side)),
        path=path,
        prediction=prediction,
        value_range=(0.0, 1.0),  # score-SDE centres pictures for VP models only
    )


def _preset(name: str, p: Params, *, size: int, path: Path) -> Preset:
    return Preset(params=p, build=NCSNpp, spec=spec(name, p, size=size, path=path, prediction=SCORE))


PRESETS = {
    "ncsnpp-cifar10": _preset("ncsnpp-cifar10", Params(), size=32, path=VE(sigma_min=0.01, sigma_max=50.0)),
    "ncsnpp-celebahq-256": _preset(
        "ncsnpp-celebahq-256",
        Params(block_out_channels=(128, 128, 256, 256, 256, 256, 256), layers_per_block=2, attention_levels=(4,)),
        size=256,
        path=VE(sigma_min=0.01, sigma_max=348.0),
    ),
}
