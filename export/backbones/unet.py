"""The DDPM U-Net (Ho, Jain & Abbeel 2020, arXiv:2006.11239, appendix B).

Residual blocks receive the timestep as a bias per channel after their first convolution, self-attention runs at
one resolution and in the middle, and strided convolutions change the resolution. The module names are those of
diffusers' ``UNet2DModel``, the layout these models are published in, so its folders load without a key map.

Shape legend: B batch, C channels, H W height and width, E embedding channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import sinusoidal_embedding
from lehr.export.backbones._unet_layers import PixelAttention, TimestepEmbedding
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, Path
from lehr.runtime.prediction import EPSILON, Prediction
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies

# ---------------------------------------------------------------------------------------------- parameters


class SinusoidOrder(str, Enum):
    """Which half of the timestep's embedding comes first."""

    SINES_FIRST = "sines_first"  # DDPM
    COSINES_FIRST = "cosines_first"  # models trained with diffusers' defaults


class DownPadding(str, Enum):
    """How a strided 3x3 convolution is padded."""

    AFTER = "after"  # one row below, one column to the right: DDPM, from TensorFlow's "SAME"
    AROUND = "around"  # one pixel on every side: diffusers' default


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one DDPM U-Net; the defaults are the paper's CIFAR-10 model.

    Attributes:
        attention_levels: levels of ``block_out_channels`` that have self-attention; the middle always has.
        head_channels: size of an attention head; None is one head of all channels.
        frequency_shift: w_k = 10000^(-k / (n - shift)) for n frequencies; 1 in DDPM, 0 in diffusers' defaults.
        num_classes: rows of the class table; None is unconditional.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    attention_levels: tuple[int, ...] = (1,)
    head_channels: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    down_padding: DownPadding = DownPadding.AFTER
    sinusoid_order: SinusoidOrder = SinusoidOrder.SINES_FIRST
    frequency_shift: int = 1
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels {self.block_out_channels} must be multiples of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        attended = {self.block_out_channels[level] for level in self.attention_levels} | {self.block_out_channels[-1]}
        if self.head_channels is not None and any(channels % self.head_channels for channels in attended):
            raise ValueError(f"channels with attention {sorted(attended)} must be multiples of {self.head_channels}")

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this (one halving per level after the first)."""
        return int(2 ** (len(self.block_out_channels) - 1))


# -------------------------------------------------------------------------------------------------- layers


def ddpm_embedding(timestep: Tensor, p: Params) -> Tensor:
    """(B,) -> (B, channels of the first level) sinusoids in the order that ``p`` asks for."""
    fixed = sinusoidal_embedding(timestep, p.block_out_channels[0], frequency_shift=p.frequency_shift)
    if p.sinusoid_order is SinusoidOrder.COSINES_FIRST:
        return fixed
    cosines, sines = fixed.chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


class ResnetBlock(nn.Module):
    """Two convolutions around an additive timestep embedding."""

    def __init__(self, channels: int, out_channels: int, embedding: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int, padding: DownPadding) -> None:
        super().__init__()
        self.after = padding is DownPadding.AFTER
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.after else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.after else x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution on one side of the U, each followed by attention if the level has it."""

    def __init__(
        self, p: Params, embedding: int, in_channels: Iterable[int], out_channels: int, *, attention: bool
    ) -> None:
        super().__init__()
        groups, eps = p.norm_num_groups, p.norm_eps
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, out_channels, embedding, groups=groups, eps=eps) for channels in in_channels
        )
        heads = out_channels // (p.head_channels or out_channels)
        count = len(self.resnets) if attention else 0
        self.attentions = nn.ModuleList(
            PixelAttention(out_channels, heads, groups=groups, eps=eps) for _ in range(count)
        )

    def block(self, i: int, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x) if len(self.attentions) else x


class DownBlock(Level):
    def __init__(self, p: Params, embedding: int, in_channels: int, level: int) -> None:
        out = p.block_out_channels[level]
        inputs = [in_channels, *[out] * (p.layers_per_block - 1)]
        super().__init__(p, embedding, inputs, out, attention=level in p.attention_levels)
        last = level + 1 == len(p.block_out_channels)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out, p.down_padding)])

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and what the decoder takes from this level."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, emb)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class UpBlock(Level):
    def __init__(self, p: Params, embedding: int, in_channels: int, skips: Iterable[int], level: int) -> None:
        out = p.block_out_channels[level]
        inputs = [(out if i else in_channels) + skip for i, skip in enumerate(skips)]
        super().__init__(p, embedding, inputs, out, attention=level in p.attention_levels)
        self.upsamplers = nn.ModuleList([Upsample(out)] if level else [])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes its inputs from the end of ``skips``."""
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat([x, skips.pop()], dim=1), emb)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, p: Params, embedding: int) -> None:
        super().__init__()
        channels, groups, eps = p.block_out_channels[-1], p.norm_num_groups, p.norm_eps
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, embedding, groups=groups, eps=eps) for _ in range(2)
        )
        heads = channels // (p.head_channels or channels)
        self.attentions = nn.ModuleList([PixelAttention(channels, heads, groups=groups, eps=eps)])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, emb)), emb)


# --------------------------------------------------------------------------------------------------- model


class UNet(nn.Module):
    """The denoiser F(x_t, t) or F(x_t, t, class)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        first = p.block_out_channels[0]
        embedding = 4 * first
        self.conv_in = nn.Conv2d(p.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, embedding)
        if p.num_classes is not None:
            self.class_embedding = nn.Embedding(p.num_classes, embedding)

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
        self.conv_norm_out = nn.GroupNorm(p.norm_num_groups, channels, eps=p.norm_eps)
        self.conv_out = nn.Conv2d(channels, p.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, in_channels, H, W) x_t; H and W multiples of ``params.size_multiple``.
            timestep: (B,) float, 0 … 999.
            class_labels: (B,) int64, exactly for class-conditional models.

        Returns:
            (B, out_channels, H, W).
        """
        emb = self.time_embedding(ddpm_embedding(timestep, self.params))
        if class_labels is not None:
            emb = emb + self.class_embedding(class_labels)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, emb)
            skips += new
        x = self.mid_block(x, emb)
        for block in self.up_blocks:
            x = block(x, emb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int, path: Path, prediction: Prediction) -> ModelSpec:
    """Inputs, outputs and conventions of a U-Net trained on pictures of ``size`` x ``size``."""
    side = {"default": size, "min": p.size_multiple, "max": 4 * size, "multiple": p.size_multiple}
    labels = TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
    return ModelSpec(
        name=name,
        family="unet",
        inputs=(
            TensorSpec(name="sample", shape=("batch", p.in_channels, "height", "width"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            *([labels] if p.num_classes is not None else []),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side)),
        path=path,
        prediction=prediction,
        num_classes=p.num_classes,
    )


def _preset(name: str, p: Params, *, size: int) -> Preset:
    return Preset(params=p, build=UNet, spec=spec(name, p, size=size, path=VP(), prediction=EPSILON))


PRESETS = {
    "ddpm-cifar10": _preset("ddpm-cifar10", Params(), size=32),
    "ddpm-celebahq-256": _preset(
        "ddpm-celebahq-256", Params(block_out_channels=(128, 128, 256, 256, 512, 512), attention_levels=(4,)), size=256
    ),  # appendix B; the LSUN models have the same architecture
}
