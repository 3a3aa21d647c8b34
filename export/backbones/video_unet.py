"""Stable Video Diffusion: a latent U-Net over frames (Blattmann et al. 2023, arXiv:2311.15127).

The U-Net of Stable Diffusion 2 with a temporal layer behind every spatial one (Blattmann et al. 2023,
arXiv:2304.08818), both blended by a learned weight:
convolutions along time behind the residual blocks, attention along time behind the transformers. A picture conditions
it twice, by CLIP's embedding, the one token that all frames attend to, and by its latents, joined to every frame's;
frame rate, amount of motion and noise added to the picture are embedded with the time. Trained with EDM's
preconditioning for a network that predicts v. Module and parameter names are those of diffusers'
``UNetSpatioTemporalConditionModel``. Any number of frames and any size is an input.

Shape legend: B batch, T frames, C channels, H W latent height and width, L = H W, S tokens of the picture's embedding,
E embedding channels. Feature maps are (B, T, C, H, W), tokens (B, T, L, C).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones import latent_unet, unet
from lehr.export.backbones._layers import sinusoidal_embedding
from lehr.export.backbones._unet_layers import TimestepEmbedding
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import EDM
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.spec import BATCH, Dim, ModelSpec, Sampling, TensorSpec, Varies

NUM_GROUPS = 32  # group norm groups everywhere
V_OF_EDM = Prediction(kind=PredictionKind.EDM, sigma_data=1.0, sign=-1)  # v with EDM's scaling of the input

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one video U-Net.

    Attributes:
        in_channels: those of the sample, as many as ``out_channels``, and behind them those of the picture's latents.
        attention_levels: the resolutions, 0 the finest, whose residual blocks are followed by transformers.
        num_heads: attention heads, a number a level.
        time_ids: numbers of micro-conditioning: frame rate, motion, noise.
        time_id_dim: channels of the embedding of each.
    """

    in_channels: int = 8
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    num_heads: tuple[int, ...] = (5, 10, 20, 20)
    context_dim: int = 1024
    time_ids: int = 3
    time_id_dim: int = 256

    def __post_init__(self) -> None:
        if self.in_channels <= self.out_channels:
            raise ValueError(
                f"in_channels {self.in_channels} must hold the sample's {self.out_channels} channels and a picture's"
            )
        if len(self.num_heads) != len(self.block_out_channels):
            raise ValueError(f"num_heads {self.num_heads} needs one number a level of {self.block_out_channels}")
        for channels, heads in zip(self.block_out_channels, self.num_heads, strict=True):
            if channels % NUM_GROUPS or channels % heads:
                raise ValueError(f"{channels} channels must be a multiple of {NUM_GROUPS} and of {heads} heads")

    @property
    def condition_channels(self) -> int:
        return self.in_channels - self.out_channels

    @property
    def embedding(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def size_multiple(self) -> int:
        return int(2 ** (len(self.block_out_channels) - 1))


# ------------------------------------------------------------------------------------------------- residual


class Blend(nn.Module):
    """A learned weighted mean of what the frames say alone and together."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([0.5]))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        return alpha * spatial + (1 - alpha) * temporal


class SpatialResBlock(unet.ResnetBlock):
    """The U-Net's residual block on every frame; the embedding (B, E) is that of all frames."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        flat = x.flatten(0, 1)
        h = self.conv1(F.silu(self.norm1(flat))).unflatten(0, (batch, frames))
        h = (h + self.time_emb_proj(F.silu(emb))[:, None, :, None, None]).flatten(0, 1)
        h = self.conv_shortcut(flat) + self.conv2(F.silu(self.norm2(h)))
        return h.unflatten(0, (batch, frames))


class TemporalResBlock(nn.Module):
    """Convolutions over three frames, (B, C, T, H, W); norms are over the whole video."""

    def __init__(self, channels: int, embedding: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, channels, eps=eps)
        self.conv1 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.time_emb_proj = nn.Linear(embedding, channels)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, channels, eps=eps)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class VideoResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, embedding: int, eps: float) -> None:
        super().__init__()
        self.spatial_res_block = SpatialResBlock(channels, out_channels, embedding, groups=NUM_GROUPS, eps=eps)
        self.temporal_res_block = TemporalResBlock(out_channels, embedding, eps)
        self.time_mixer = Blend()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.spatial_res_block(x, emb)
        return self.time_mixer(x, self.temporal_res_block(x.transpose(1, 2), emb).transpose(1, 2))


# --------------------------------------------------------------------------------------------- transformers


class SpatialBlock(latent_unet.TransformerBlock):
    """Attention within each frame; the context (B, S, D) is that of all frames, so no frame copies it."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        frames = x.shape[:2]
        y = self.norm1(x).flatten(0, 1)
        x = x + self.attn1(y, y).unflatten(0, frames)
        x = x + self.attn2(self.norm2(x).flatten(1, 2), context).unflatten(1, x.shape[1:3])
        return x + self.ff(self.norm3(x))


class TemporalBlock(latent_unet.TransformerBlock):
    """Attention of each position along its frames, behind a feed-forward layer of its own."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__(dim, context_dim, num_heads)
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = latent_unet.FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.ff_in(self.norm_in(x))
        y = self.norm1(x).transpose(1, 2)  # (B, L, T, C)
        x = x + self.attn1(y.flatten(0, 1), y.flatten(0, 1)).unflatten(0, y.shape[:2]).transpose(1, 2)
        x = x + self.attn2(self.norm2(x).flatten(1, 2), context).unflatten(1, x.shape[1:3])
        return x + self.ff(self.norm3(x))


class FrameEmbedding(nn.Module):
    """Two-layer MLP over a sinusoid of the frame's number: (T,) -> (T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, channels)

    def forward(self, numbers: Tensor) -> Tensor:
        fixed = sinusoidal_embedding(numbers, self.linear_1.in_features)
        return self.linear_2(F.silu(self.linear_1(fixed.to(self.linear_1.weight.dtype))))


class VideoTransformer(nn.Module):
    """A spatial and a temporal transformer block inside one residual connection."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(channels, context_dim, num_heads)])
        self.temporal_transformer_blocks = nn.ModuleList([TemporalBlock(channels, context_dim, num_heads)])
        self.time_pos_embed = FrameEmbedding(channels)
        self.time_mixer = Blend()
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, frames, channels, height, width = x.shape
        y = self.norm(x.flatten(0, 1)).flatten(2).mT.unflatten(0, (batch, frames))  # (B, T, L, C)
        y = self.proj_in(y)
        wide = torch.promote_types(x.dtype, torch.float32)
        numbers = self.time_pos_embed(torch.arange(frames, dtype=wide, device=x.device)).unsqueeze(1)  # (T, 1, C)
        for block, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            y = block(y, context)
            y = self.time_mixer(y, temporal(y + numbers, context))
        return x + self.proj_out(y).mT.reshape(batch, frames, channels, height, width)


# -------------------------------------------------------------------------------------------------- levels


class Downsample(unet.Downsample):
    """(B, T, C, H, W) -> (B, T, C, H/2, W/2)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Upsample(unet.Upsample):
    """(B, T, C, H, W) -> (B, T, C, 2H, 2W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Level(nn.Module):
    """The residual blocks of one resolution on one side of the U, each followed by a transformer if it has them."""

    def __init__(self, p: Params, in_channels: Iterable[int], level: int, eps: float) -> None:
        super().__init__()
        out = p.block_out_channels[level]
        self.resnets = nn.ModuleList(VideoResBlock(channels, out, p.embedding, eps) for channels in in_channels)
        count = len(self.resnets) if level in p.attention_levels else 0
        self.attentions = nn.ModuleList(VideoTransformer(out, p.context_dim, p.num_heads[level]) for _ in range(count))

    def block(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context) if len(self.attentions) else x


class DownBlock(Level):
    def __init__(self, p: Params, in_channels: int, level: int) -> None:
        out = p.block_out_channels[level]
        eps = 1e-6 if level in p.attention_levels else 1e-5  # as released
        super().__init__(p, [in_channels, *[out] * (p.layers_per_block - 1)], level, eps)
        last = level + 1 == len(p.block_out_channels)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out, unet.DownPadding.AROUND)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and what the decoder takes from this level."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, emb, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class UpBlock(Level):
    def __init__(self, p: Params, in_channels: int, skips: Iterable[int], level: int) -> None:
        out = p.block_out_channels[level]
        super().__init__(p, [(out if i else in_channels) + skip for i, skip in enumerate(skips)], level, 1e-6)
        self.upsamplers = nn.ModuleList([Upsample(out)] if level else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes its inputs from the end of ``skips``."""
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat([x, skips.pop()], dim=2), emb, context)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        channels = p.block_out_channels[-1]
        self.resnets = nn.ModuleList(VideoResBlock(channels, channels, p.embedding, 1e-5) for _ in range(2))
        self.attentions = nn.ModuleList([VideoTransformer(channels, p.context_dim, p.num_heads[-1])])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, emb), context), emb)


# --------------------------------------------------------------------------------------------------- model


class VideoUNet(nn.Module):
    """The denoiser F(x_t, t, picture, frame rate, motion, noise)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        first = p.block_out_channels[0]
        self.conv_in = nn.Conv2d(p.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, p.embedding)
        self.add_embedding = TimestepEmbedding(p.time_ids * p.time_id_dim, p.embedding)
        channels, skips = first, [first]
        self.down_blocks = nn.ModuleList()
        for level, out in enumerate(p.block_out_channels):
            self.down_blocks.append(DownBlock(p, channels, level))
            channels = out
            skips += [out] * (p.layers_per_block + (level + 1 < len(p.block_out_channels)))
        self.mid_block = MidBlock(p)
        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(p.block_out_channels))):
            taken = [skips.pop() for _ in range(p.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(p, channels, taken, level))
            channels = out
        self.conv_norm_out = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, p.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        sample_cond: Tensor,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, T, out_channels, H, W), x_t times c_in; H and W multiples of ``params.size_multiple``.
            timestep: (B,) float, ln(sigma) / 4.
            encoder_hidden_states: (B, S, context_dim), CLIP's embedding of the picture, one token.
            added_time_ids: (B, time_ids) float: frames a second less one, motion bucket, noise added to the picture.
            sample_cond: (B, condition_channels, H, W), the picture's latents, the same for every frame.

        Returns:
            (B, T, out_channels, H, W), v.
        """
        p = self.params
        frames = sample.shape[:2]
        fixed = sinusoidal_embedding(timestep, p.block_out_channels[0])
        ids = sinusoidal_embedding(added_time_ids.flatten(), p.time_id_dim).unflatten(0, (-1, p.time_ids)).flatten(1)
        emb = self.time_embedding(fixed) + self.add_embedding(ids)  # (B, E)
        picture = sample_cond.unsqueeze(1).expand(-1, sample.shape[1], -1, -1, -1)
        x = self.conv_in(torch.cat([sample, picture], dim=2).flatten(0, 1)).unflatten(0, frames)
        skips = [x]
        for down in self.down_blocks:
            x, kept = down(x, emb, encoder_hidden_states)
            skips += kept
        x = self.mid_block(x, emb, encoder_hidden_states)
        for up in self.up_blocks:
            x = up(x, emb, encoder_hidden_states, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x.flatten(0, 1)))).unflatten(0, frames)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, height: int, width: int, frames: int) -> ModelSpec:
    """Inputs, outputs and conventions of a video U-Net trained on ``frames`` of ``height`` x ``width`` latents."""
    video = ("batch", "frames", p.out_channels, "height", "width")
    multiple = p.size_multiple
    picture = ("batch", p.condition_channels, "height", "width")
    return ModelSpec(
        name=name,
        family="video_unet",
        inputs=(
            TensorSpec(name="sample", shape=video, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="encoder_hidden_states", shape=("batch", 1, p.context_dim), varies=Varies.PROMPT),
            TensorSpec(name="added_time_ids", shape=("batch", p.time_ids), varies=Varies.PROMPT),
            TensorSpec(name="sample_cond", shape=picture, varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=video, varies=Varies.SAMPLE),),
        dims=(
            BATCH,
            Dim(name="frames", default=frames, max=4 * frames),
            Dim(name="height", default=height, min=multiple, max=4 * height, multiple=multiple),
            Dim(name="width", default=width, min=multiple, max=4 * width, multiple=multiple),
        ),
        path=EDM(sigma_min=0.002, sigma_max=700.0),
        prediction=V_OF_EDM,
        sampling=Sampling(num_inference_steps=25),
    )


def _preset(name: str, frames: int) -> Preset:
    return Preset(params=Params(), build=VideoUNet, spec=spec(name, Params(), height=72, width=128, frames=frames))


PRESETS: dict[str, Preset] = {
    "svd": _preset("svd", frames=14),
    "svd-xt": _preset("svd-xt", frames=25),
}
_DARTS = Params(
    in_channels=6,
    out_channels=3,
    block_out_channels=(32, 64),  # groups of one channel, as in 32, take away again what time and motion add to it
    layers_per_block=1,
    attention_levels=(1,),
    num_heads=(2, 2),
    context_dim=48,
    time_id_dim=32,
)
PRESETS["flying-darts"] = Preset(  # pixels; trained by lehr.export.reference.video
    params=_DARTS,
    build=VideoUNet,
    spec=replace(
        spec("flying-darts", _DARTS, height=16, width=16, frames=8),
        path=EDM(sigma_min=0.02, sigma_max=80.0),
        sampling=Sampling(num_inference_steps=20),
    ),
)
