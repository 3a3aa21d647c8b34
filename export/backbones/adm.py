"""ADM: the ablated diffusion U-Net (Dhariwal & Nichol 2021, arXiv:2105.05233, section 3 and appendix A).

Adaptive group norm (AdaGN) injects timestep and class into every residual block, attention runs at several
resolutions with 64 channels a head, and down- and upsampling happen inside BigGAN residual blocks. The module
names are those of the authors' release (``guided-diffusion``), so its checkpoints load without a key map.

Shape legend: B batch, C channels, H W height and width, L = H W, E embedding channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import sinusoidal_embedding
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, BetaSchedule, Path
from lehr.runtime.prediction import EPSILON, Prediction
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

NUM_GROUPS = 32  # group norm groups everywhere (ADM appendix A)


class QKVOrder(str, Enum):
    """How the 3C channels of the packed projection are laid out; both are found in released checkpoints."""

    HEADS_FIRST = "heads_first"  # [head 0: q k v][head 1: q k v] …   (``QKVAttentionLegacy``)
    QKV_FIRST = "qkv_first"  # [q: all heads][k: all heads][v: all heads]


# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one ADM U-Net. ``num_classes`` counts the rows of the label table; None is unconditional."""

    in_channels: int = 3
    out_channels: int = 6
    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_downsampling: tuple[int, ...] = (8, 16, 32)
    num_head_channels: int | None = 64
    num_heads: int = 4  # used only where num_head_channels is None
    num_classes: int | None = 1000
    qkv_order: QKVOrder = QKVOrder.HEADS_FIRST
    rescale_residual: bool = False  # 1/sqrt(2) on every residual sum (ADM section 3, after Song et al. 2021)

    def __post_init__(self) -> None:
        for mult in self.channel_mult:
            if int(mult * self.model_channels) % NUM_GROUPS:
                raise ValueError(
                    f"model_channels {self.model_channels} x channel_mult {mult} must be a multiple of {NUM_GROUPS}"
                )

    def heads(self, channels: int) -> int:
        """Attention heads of a layer of ``channels``."""
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this (one halving per level after the first)."""
        return 2 ** (len(self.channel_mult) - 1)


# -------------------------------------------------------------------------------------------------- layers


class Resize(Enum):
    """What a residual block does to height and width."""

    NONE = 0
    DOWN = 1
    UP = 2

    def __call__(self, x: Tensor) -> Tensor:
        if self is Resize.DOWN:
            return F.avg_pool2d(x, 2)
        if self is Resize.UP:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


class ResBlock(nn.Module):
    """BigGAN residual block with AdaGN(h, y) = y_s GroupNorm(h) + y_b, equation 3 of the paper."""

    def __init__(self, channels: int, embedding: int, out_channels: int, resize: Resize, rescale: bool) -> None:
        super().__init__()
        self.resize = resize
        self.gain = 1 / math.sqrt(2) if rescale else 1.0
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the release has dropout here; it keeps the convolution's index in checkpoints
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        nn.init.zeros_(self.out_layers[3].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out_layers[3].bias)  # type: ignore[arg-type]
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resize(act(norm(x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        x = self.skip_connection(self.resize(x)) + h
        return x * self.gain if self.gain != 1.0 else x


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels of a feature map."""

    def __init__(self, channels: int, num_heads: int, order: QKVOrder, rescale: bool) -> None:
        super().__init__()
        self.num_heads, self.order = num_heads, order
        self.gain = 1 / math.sqrt(2) if rescale else 1.0
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        flat = x.reshape(b, c, height * width)  # (B, C, L)
        qkv = self.qkv(self.norm(flat))
        head = c // self.num_heads
        if self.order is QKVOrder.HEADS_FIRST:
            q, k, v = qkv.reshape(b, self.num_heads, 3, head, height * width).unbind(2)
        else:
            q, k, v = qkv.reshape(b, 3, self.num_heads, head, height * width).unbind(1)
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT  # (B, heads, C/heads, L)
        out = flat + self.proj_out(h.reshape(b, c, height * width))
        return (out * self.gain if self.gain != 1.0 else out).reshape(b, c, height, width)


class EmbedSequential(nn.Sequential):
    """A sequence in which residual blocks also receive the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


# --------------------------------------------------------------------------------------------------- model


class Encoder(nn.Module):
    """The embedding of the timestep, the way down and the middle: what denoiser and noisy classifier share.

    ``skips`` holds the channels of what each input block leaves for a decoder.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        embedding = 4 * p.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(p.model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        res, attention = self.res, self.attention
        channels = int(p.channel_mult[0] * p.model_channels)
        down = [EmbedSequential(nn.Conv2d(p.in_channels, channels, 3, padding=1))]
        self.skips = [channels]
        for level, mult in enumerate(p.channel_mult):
            for _ in range(p.num_res_blocks):
                layers: list[nn.Module] = [res(channels, int(mult * p.model_channels))]
                channels = int(mult * p.model_channels)
                if 2**level in p.attention_downsampling:
                    layers.append(attention(channels))
                down.append(EmbedSequential(*layers))
                self.skips.append(channels)
            if level + 1 < len(p.channel_mult):
                down.append(EmbedSequential(res(channels, channels, Resize.DOWN)))
                self.skips.append(channels)
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = EmbedSequential(res(channels, channels), attention(channels), res(channels, channels))

    def res(self, channels: int, out: int, resize: Resize = Resize.NONE) -> ResBlock:
        return ResBlock(channels, 4 * self.params.model_channels, out, resize, self.params.rescale_residual)

    def attention(self, channels: int) -> AttentionBlock:
        p = self.params
        return AttentionBlock(channels, p.heads(channels), p.qkv_order, p.rescale_residual)

    def embed(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        first: nn.Linear = self.time_embed[0]  # type: ignore[assignment]
        return self.time_embed(sinusoidal_embedding(timestep, self.params.model_channels).to(first.weight.dtype))

    def encode(self, sample: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The middle's output and every input block's, which a decoder takes from the end."""
        x, outputs = sample, []
        for block in self.input_blocks:
            x = block(x, emb)
            outputs.append(x)
        return self.middle_block(x, emb), outputs


class ADM(Encoder):
    """The denoiser F(x_t, t, class)."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        p = params
        if p.num_classes is not None:
            self.label_emb = nn.Embedding(p.num_classes, 4 * p.model_channels)
        channels, skips = self.skips[-1], list(self.skips)
        up = []
        for level, mult in reversed(list(enumerate(p.channel_mult))):
            for i in range(p.num_res_blocks + 1):
                layers: list[nn.Module] = [self.res(channels + skips.pop(), int(mult * p.model_channels))]
                channels = int(mult * p.model_channels)
                if 2**level in p.attention_downsampling:
                    layers.append(self.attention(channels))
                if level > 0 and i == p.num_res_blocks:
                    layers.append(self.res(channels, channels, Resize.UP))
                up.append(EmbedSequential(*layers))
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, p.out_channels, 3, padding=1)
        )
        nn.init.zeros_(self.out[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out[2].bias)  # type: ignore[arg-type]

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, in_channels, H, W) x_t; H and W multiples of ``params.size_multiple``.
            timestep: (B,) float, 0 … 999.
            class_labels: (B,) int64, exactly for class-conditional models.

        Returns:
            (B, out_channels, H, W).
        """
        emb = self.embed(timestep)
        if class_labels is not None:
            emb = emb + self.label_emb(class_labels)
        x, skips = self.encode(sample, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int, classes: int | None, path: Path, prediction: Prediction) -> ModelSpec:
    """Inputs, outputs and conventions; a label table with one row more than ``classes`` holds "no class"."""
    side = {"default": size, "min": p.size_multiple, "max": 4 * size, "multiple": p.size_multiple}
    labels = TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
    return ModelSpec(
        name=name,
        family="adm",
        inputs=(
            TensorSpec(name="sample", shape=("batch", p.in_channels, "height", "width"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            *([labels] if classes is not None else []),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side)),
        path=path,
        prediction=prediction,
        num_classes=classes,
        null_class=classes if classes is not None and p.num_classes == classes + 1 else None,
    )


def _preset(
    name: str, p: Params, *, size: int, classes: int | None, path: Path | None = None, sampling: Sampling | None = None
) -> Preset:
    described = spec(name, p, size=size, classes=classes, path=path or VP(), prediction=EPSILON)
    return Preset(params=p, build=ADM, spec=replace(described, sampling=sampling or described.sampling))


PRESETS = {  # the ImageNet models: appendix I of the paper, table 11
    "adm-imagenet-64": _preset(
        "adm-imagenet-64",
        Params(
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_downsampling=(2, 4, 8),
            qkv_order=QKVOrder.QKV_FIRST,
        ),
        size=64,
        classes=1000,
        path=VP(schedule=BetaSchedule.COSINE),
    ),
    "adm-imagenet-128": _preset(
        "adm-imagenet-128",
        Params(channel_mult=(1, 1, 2, 3, 4), attention_downsampling=(4, 8, 16), num_head_channels=None, num_heads=4),
        size=128,
        classes=1000,
    ),
    "adm-imagenet-256": _preset("adm-imagenet-256", Params(), size=256, classes=1000),
    "adm-imagenet-256-uncond": _preset("adm-imagenet-256-uncond", Params(num_classes=None), size=256, classes=None),
    "adm-imagenet-512": _preset(
        "adm-imagenet-512",
        Params(channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_downsampling=(16, 32, 64)),
        size=512,
        classes=1000,
    ),
    "digits-adm": _preset(
        "digits-adm",
        Params(
            in_channels=1,
            out_channels=1,
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_downsampling=(2, 4),
            num_classes=11,
        ),  # trained on MNIST by lehr.export.reference, shipped
        size=28,
        classes=10,
        sampling=Sampling(guidance_scale=2.0),
    ),
}
