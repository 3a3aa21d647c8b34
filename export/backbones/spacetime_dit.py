"""Diffusion transformers over space-time patches: pictures are videos of one frame, and duration is a free size.

Two published ways of letting frames see each other:

- Latte (Ma et al. 2024, arXiv:2401.03048, variant 1) takes turns: one block attends within each frame, the next
  along each position's frames. It is PixArt's block, with text through cross-attention in the spatial ones.
- Sora's technical report (Brooks et al. 2024, "Video generation models as world simulators") describes a transformer
  whose tokens are all the space-time patches of a video of any duration and size, no more. :class:`SpaceTimeDiT` is
  DiT (Peebles & Xie 2023) over that sequence, conditioned on a class; no weights of such a model are published. The
  table of frames is zero at the first one, so that with one frame it *is* DiT and takes a DiT's weights.

Position tables are computed from the input's size inside the graph, as in ``dit`` and ``pixart``.

Shape legend: B batch, C latent channels, T frames, H W latent height and width, p patch size, F frames or groups of
frames that are tokens, L = (H/p)(W/p) tokens a frame, M text tokens, D token channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lehr.export.backbones import dit
from lehr.export.backbones._layers import Mlp, PatchEmbed, TimestepEmbedder, sincos_positions, unpatchify
from lehr.export.backbones.pixart import CaptionEmbedder, FinalLayer, positions
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, LinearFlow
from lehr.runtime.prediction import EPSILON, SAMPLE
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one Latte. ``depth`` counts pairs of a spatial and a temporal block.

    ``base_size`` and ``position_scale`` are those of ``pixart.Params``; ``learn_sigma`` doubles the output channels.
    """

    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    base_size: int = 32
    position_scale: float = 1.0
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassParams:
    """A DiT and how many frames make one patch; ``picture`` describes a single frame."""

    picture: dit.Params = field(default_factory=lambda: dit.Params(num_classes=101))
    patch_frames: int = 1

    def __post_init__(self) -> None:
        if self.picture.conditioning is not dit.Conditioning.ADALN_ZERO:
            raise ValueError(f"conditioning {self.picture.conditioning.value!r} of pictures must be 'adaln_zero'")
        if self.patch_frames < 1:
            raise ValueError(f"patch_frames must be at least 1, got {self.patch_frames}")


# -------------------------------------------------------------------------------------------------- layers


def frame_positions(frames: int, *, like: Tensor) -> Tensor:
    """Sin-cos table of the frames' numbers, (F, 1, D) for tokens (…, D), computed in float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    numbers = torch.arange(frames, dtype=dtype, device=like.device)
    return sincos_positions(numbers, like.shape[-1]).to(like.dtype).unsqueeze(1)


class LatteBlock(nn.Module):
    """PixArt's block over tokens (B, F, L, D), attending along one axis; ``t`` (B, 6, D) is added to a table."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        dim = p.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = dit.Attention(dim, p.num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * p.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def modulation(self, t: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention and of MLP, each (B, 1, 1, D): one for all frames and positions."""
        return (self.scale_shift_table + t).unsqueeze(1).chunk(6, dim=2)

    def attend(self, x: Tensor) -> Tensor:
        """Along the last token axis: (B, F, L, D), every frame by itself."""
        return self.attn(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(t)
        x = x + gate_msa * self.attend(self.norm1(x) * (1 + scale_msa) + shift_msa)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class TextBlock(LatteBlock):
    """Attention within each frame, then to the text, which all frames share."""

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.cross_attn = dit.CrossAttention(p.hidden_size, p.num_heads)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, F, L, D), t (B, 6, D), y (B, M, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(t)
        x = x + gate_msa * self.attend(self.norm1(x) * (1 + scale_msa) + shift_msa)
        x = x + self.cross_attn(x.flatten(1, 2), y).unflatten(1, x.shape[1:3])
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


# -------------------------------------------------------------------------------------------------- models


class Latte(nn.Module):
    """The denoiser F(x_t, t, text)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.x_embedder = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.t_embedder = TimestepEmbedder(p.hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(p.hidden_size, 6 * p.hidden_size))
        self.y_embedder = CaptionEmbedder(p.caption_channels, p.hidden_size)
        self.blocks = nn.ModuleList(TextBlock(p) for _ in range(p.depth))
        self.temporal_blocks = nn.ModuleList(LatteBlock(p) for _ in range(p.depth))
        self.final_layer = FinalLayer(p.hidden_size, p.patch_size, p.out_channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, C, T, H, W) x_t; H and W multiples of the patch size.
            timestep: (B,) float, 0 … 999.
            encoder_hidden_states: (B, M, caption_channels), T5's features.

        Returns:
            (B, out_channels, T, H, W).
        """
        p = self.params
        batch, frames = hidden_states.shape[0], hidden_states.shape[2]
        rows, columns = hidden_states.shape[3] // p.patch_size, hidden_states.shape[4] // p.patch_size
        x = self.x_embedder(hidden_states.transpose(1, 2).flatten(0, 1))  # (B F, L, D)
        x = x + positions(rows, columns, p.base_size, p.position_scale, like=x)
        x = x.unflatten(0, (batch, frames))  # (B, F, L, D)
        t = self.t_embedder(timestep)  # (B, D)
        modulation = self.t_block(t).unflatten(1, (6, p.hidden_size))
        y = self.y_embedder(encoder_hidden_states)
        table = frame_positions(frames, like=x)
        several = torch.arange(frames, device=x.device)[-1:] > 0  # the release numbers no frames of a picture
        for index, (block, temporal) in enumerate(zip(self.blocks, self.temporal_blocks, strict=True)):
            x = block(x, modulation, y)
            if index == 0:
                x = x + torch.where(several, table, torch.zeros_like(table))
            x = temporal(x.transpose(1, 2), modulation).transpose(1, 2)
        out = unpatchify(
            self.final_layer(x.flatten(1, 2), t).unflatten(1, (frames, rows * columns)).flatten(0, 1),
            rows,
            columns,
            p.patch_size,
        )  # (B F, out_channels, H, W)
        return out.unflatten(0, (batch, frames)).transpose(1, 2)


class SpaceTimeDiT(dit.DiT):
    """The denoiser F(x_t, t, class), over one sequence of F L tokens. Its weights are those of a DiT.

    A patch of several frames is a patch of one picture that has the frames' channels.
    """

    def __init__(self, params: ClassParams) -> None:
        self.patch_frames = params.patch_frames
        super().__init__(replace(params.picture, in_channels=params.picture.in_channels * params.patch_frames))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, C, T, H, W) x_t; T a multiple of ``patch_frames``, H and W of the patch size.
            timestep: (B,) float, 0 … 1000.
            class_labels: (B,) int64; ``num_classes`` means "no class".

        Returns:
            (B, out_channels, T, H, W).
        """
        p, group = self.params, self.patch_frames
        batch, channels, frames = sample.shape[0], sample.shape[1], sample.shape[2] // group
        rows, columns = sample.shape[3] // p.patch_size, sample.shape[4] // p.patch_size
        x = sample.unflatten(2, (frames, group)).transpose(1, 2)  # (B, F, C, T/F, H, W)
        x = self.x_embedder(x.reshape(batch * frames, channels * group, *sample.shape[3:]))  # (B F, L, D)
        x = (x + self.positions(rows, columns, like=x)).unflatten(0, (batch, frames))
        table = frame_positions(frames, like=x)
        x = (x + table - table[:1]).flatten(1, 2)  # (B, F L, D)
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, (frames, rows * columns)).flatten(0, 1)
        x = unpatchify(x, rows, columns, p.patch_size)  # (B F, out_channels T/F, H, W)
        x = x.reshape(batch, frames, p.out_channels // group, group, *sample.shape[3:])
        return x.transpose(1, 2).flatten(2, 3)


# ------------------------------------------------------------------------------------------------- presets


def _video(channels: int) -> tuple[int | str, ...]:
    return ("batch", channels, "frames", "height", "width")


def _dims(patch_size: int, patch_frames: int, *, size: int, frames: int) -> tuple[Dim, ...]:
    side = {"default": size, "min": patch_size, "max": 4 * size, "multiple": patch_size}
    frames_dim = Dim(name="frames", default=frames, min=patch_frames, max=8 * frames, multiple=patch_frames)
    return BATCH, frames_dim, Dim(name="height", **side), Dim(name="width", **side)


def spec(name: str, p: Params, *, size: int, frames: int) -> ModelSpec:
    """Inputs, outputs and conventions of a Latte trained on ``frames`` of ``size`` x ``size`` latents."""
    text = ("batch", "text_tokens", p.caption_channels)
    return ModelSpec(
        name=name,
        family="spacetime_dit",
        inputs=(
            TensorSpec(name="hidden_states", shape=_video(p.in_channels), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="encoder_hidden_states", shape=text, varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=_video(p.out_channels), varies=Varies.SAMPLE),),
        dims=(
            *_dims(p.patch_size, 1, size=size, frames=frames),
            Dim(name="text_tokens", default=120, max=512),  # the release cuts T5's features to the text, up to 120
        ),
        path=VP(),
        prediction=EPSILON,
        sampling=Sampling(num_inference_steps=50, guidance_scale=7.5),
    )


def class_spec(name: str, p: ClassParams, *, size: int, frames: int) -> ModelSpec:
    """Inputs, outputs and conventions of a class-conditional space-time DiT."""
    picture = p.picture
    return ModelSpec(
        name=name,
        family="spacetime_dit",
        inputs=(
            TensorSpec(name="sample", shape=_video(picture.in_channels), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=_video(picture.out_channels), varies=Varies.SAMPLE),),
        dims=_dims(picture.patch_size, p.patch_frames, size=size, frames=frames),
        path=VP(),
        prediction=EPSILON,
        num_classes=picture.num_classes,
        null_class=picture.num_classes,
    )


PRESETS: dict[str, Preset] = {
    "latte": Preset(params=Params(), build=Latte, spec=spec("latte", Params(), size=64, frames=16)),
    "spacetime-dit-xl-2": Preset(  # DiT-XL/2's size for the 101 classes of UCF-101, on which Latte compares designs
        params=ClassParams(),
        build=SpaceTimeDiT,
        spec=class_spec("spacetime-dit-xl-2", ClassParams(), size=32, frames=16),
    ),
}
_SHAPES = ClassParams(
    picture=dit.Params(
        in_channels=3, patch_size=4, hidden_size=96, depth=4, num_heads=4, num_classes=8, learn_sigma=False
    ),
    patch_frames=2,
)
PRESETS["moving-shapes"] = Preset(  # pixels; fitted by lehr.export.reference.video
    params=_SHAPES,
    build=SpaceTimeDiT,
    spec=replace(
        class_spec("moving-shapes", _SHAPES, size=16, frames=8),
        path=LinearFlow(),
        prediction=SAMPLE,  # easier than its noise where a patch has as many values as a token
        sampling=Sampling(num_inference_steps=20, guidance_scale=1.5),
    ),
)
