"""ADM's noisy classifier p(class | x_t), whose gradient guides a denoiser (Dhariwal & Nichol 2021, section 4).

It is the encoder half of ``adm`` with attention pooling (Radford et al. 2021, arXiv:2103.00020) on top, and no
denoiser: hence no entry in the registry of backbones. Module names are those of the authors' release.

Shape legend: B batch, C channels, H W height and width, L = H W, E embedding channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones import adm
from lehr.runtime.spec import BATCH, Dim, TensorSpec, Varies

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one classifier for pictures of ``image_size`` x ``image_size``.

    The pooling layer stores a position for every pixel of the last feature map, which fixes the picture's size.
    """

    encoder: adm.Params
    image_size: int
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if self.image_size % self.encoder.size_multiple:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {self.encoder.size_multiple}")
        if self.encoder.num_classes is not None:
            raise ValueError("a classifier is not told the class: encoder.num_classes must be None")

    @property
    def pooled_size(self) -> int:
        return self.image_size // self.encoder.size_multiple


# -------------------------------------------------------------------------------------------------- layers


class AttentionPool(nn.Module):
    """One attention layer in which the mean pixel queries all pixels and itself: (B, C, H, W) -> (B, out)."""

    def __init__(self, size: int, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size * size + 1) / math.sqrt(channels))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        pixels = x.flatten(2)
        tokens = torch.cat([pixels.mean(dim=-1, keepdim=True), pixels], dim=-1) + self.positional_embedding
        qkv = self.qkv_proj(tokens).reshape(b, 3, self.num_heads, c // self.num_heads, -1)
        q, k, v = qkv.mT.unbind(1)  # each (B, heads, L+1, C/heads)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v).reshape(b, c, 1)
        return self.c_proj(pooled).squeeze(-1)


class NoisyClassifier(adm.Encoder):
    """Logits of p(class | x_t, t)."""

    def __init__(self, params: Params) -> None:
        super().__init__(params.encoder)
        channels, heads = self.skips[-1], params.encoder.heads(self.skips[-1])
        self.out = nn.Sequential(
            nn.GroupNorm(adm.NUM_GROUPS, channels),
            nn.SiLU(),
            AttentionPool(params.pooled_size, channels, heads, params.num_classes),
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Evaluate the classifier.

        Args:
            sample: (B, in_channels, image_size, image_size) x_t.
            timestep: (B,) float, 0 … 999.

        Returns:
            (B, num_classes) logits.
        """
        return self.out(self.encode(sample, self.embed(timestep))[0])


# ------------------------------------------------------------------------------------------------- presets


def signature(p: Params) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], tuple[Dim, ...]]:
    """Inputs, outputs and dimensions of a classifier."""
    shape = ("batch", p.encoder.in_channels, p.image_size, p.image_size)
    inputs = (
        TensorSpec(name="sample", shape=shape, varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
    )
    return inputs, (TensorSpec(name="logits", shape=("batch", p.num_classes), varies=Varies.SAMPLE),), (BATCH,)


def _params(size: int, channel_mult: tuple[float, ...], num_res_blocks: int = 2) -> Params:
    encoder = adm.Params(
        model_channels=128,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attention_downsampling=tuple(size // resolution for resolution in (32, 16, 8)),
        num_classes=None,
    )
    return Params(encoder=encoder, image_size=size)


CLASSIFIERS = {  # by the denoiser they guide
    "adm-imagenet-64": _params(64, (1, 2, 3, 4), num_res_blocks=4),
    "adm-imagenet-128": _params(128, (1, 1, 2, 3, 4)),
    "adm-imagenet-256": _params(256, (1, 1, 2, 2, 4, 4)),
    "adm-imagenet-512": _params(512, (0.5, 1, 1, 2, 2, 4, 4)),
}
