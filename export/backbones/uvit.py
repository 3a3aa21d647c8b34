"""U-ViT: all are worth words (Bao et al. 2023, arXiv:2209.12152), and what keeps its activations in range.

A vision transformer whose second half receives, block by block, what the first half had: a U-Net's long skips without
its resolutions. Timestep and class are tokens of the sequence. Transformers without resampling are where choices
about skips, norms, residuals and feed-forward layers can be compared one at a time, so ``Params`` holds them as
options (``docs/architectures.md`` measures them); the published presets use the defaults.

Shape legend: B batch, C channels, H W height and width, p patch size, rows = H/p, columns = W/p, D token channels,
N = rows x columns and the tokens of conditions, heads of d = D/heads channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._feed_forward import FeedForward, feed_forward
from lehr.export.backbones._layers import (
    PatchEmbed,
    TimestepEmbedder,
    integer_grid,
    modulate,
    sinusoidal_embedding,
    unpatchify,
)
from lehr.export.backbones._skips import Grid, LongSkip, SkipFusion, SkipGate
from lehr.export.backbones.dit import Conditioning, FinalLayer
from lehr.export.backbones.mmdit import QKNorm
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, BetaSchedule, LinearFlow, Path
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, Prediction
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies

# ---------------------------------------------------------------------------------------------- parameters


class NormPlacement(str, Enum):
    """Where a residual branch f is normalised (Xiong et al. 2020, arXiv:2002.04745)."""

    PRE = "pre"  # x + f(norm(x))
    POST = "post"  # norm(x + f(x))


class BlockInit(str, Enum):
    """How the last layer of every residual branch starts."""

    NORMAL = "normal"  # like all others: normal, 0.02
    ZERO = "zero"  # at zero, so that a block starts as the identity (Goyal et al. 2017, arXiv:1706.02677)


class Positions(str, Enum):
    """What tells a patch where it is."""

    LEARNED = "learned"  # the release's: a stored table, which fixes the size
    SINCOS = "sincos"  # computed from the size, which is then free


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one U-ViT.

    Attributes:
        size: height and width that a learned table of positions is made for.
        depth: blocks, an odd number: as many with a long skip as before the middle one.
        null_class: whether the class table has one more row, index ``num_classes``, for "no class".
        final_conv: whether a 3x3 convolution follows the last projection.
        timestep_offset: what the network counts its timesteps from; 1 in models trained on discrete ones.
        conditioning: IN_CONTEXT (tokens) or ADALN_ZERO, whose gates make a block the identity at initialisation.
        skip_cutoff: cycles a token up to which a frequency counts as low, for ``SkipFusion.FREQUENCY``.
        residual_scale: beta in x + beta f(norm(x)).
    """

    in_channels: int = 4
    patch_size: int = 2
    size: int = 32
    hidden_size: int = 1024
    depth: int = 21
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    final_conv: bool = True
    timestep_offset: float = 0.0
    positions: Positions = Positions.LEARNED
    conditioning: Conditioning = Conditioning.IN_CONTEXT
    skip_fusion: SkipFusion = SkipFusion.CONCAT
    skip_gate: SkipGate = SkipGate.NONE
    skip_cutoff: float = 0.25
    residual_scale: float = 1.0
    block_init: BlockInit = BlockInit.NORMAL
    norm_placement: NormPlacement = NormPlacement.PRE
    feed_forward: FeedForward = FeedForward.GELU
    qk_norm: QKNorm = QKNorm.NONE

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)")
        if self.depth % 2 == 0:
            raise ValueError(f"depth must be odd (two halves and a middle block), got {self.depth}")
        if self.size % self.patch_size:
            raise ValueError(f"size {self.size} must be a multiple of patch_size {self.patch_size}")
        if not 0 <= self.skip_cutoff <= 0.5:
            raise ValueError(f"skip_cutoff must lie between 0 and 0.5 cycles a token, got {self.skip_cutoff}")
        if self.skip_fusion is SkipFusion.NONE and self.skip_gate is not SkipGate.NONE:
            raise ValueError(f"skip_gate {self.skip_gate.value} has no skip to gate; choose another skip_fusion")
        if self.conditioning is Conditioning.CROSS_ATTENTION:
            raise ValueError("conditioning must be in_context or adaln_zero here, got cross_attention")
        if self.conditioning is Conditioning.ADALN_ZERO and self.norm_placement is NormPlacement.POST:
            raise ValueError("adaln_zero modulates the norm in front of a branch; norm_placement must be pre")

    @property
    def extras(self) -> int:
        """Tokens of conditions."""
        return 2 if self.conditioning is Conditioning.IN_CONTEXT else 0


# -------------------------------------------------------------------------------------------------- layers


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D), queries and keys normalised by head or not."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.qkv = nn.Linear(p.hidden_size, 3 * p.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(p.hidden_size // p.num_heads, eps=1e-6) if p.qk_norm is QKNorm.RMS else nn.Identity()
            for _ in range(2)
        )
        self.proj = nn.Linear(p.hidden_size, p.hidden_size)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, N, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention and feed-forward, each a residual branch; conditions are tokens of ``x``."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.placement, self.scale = p.norm_placement, p.residual_scale
        self.norm1 = nn.LayerNorm(p.hidden_size)
        self.attn = Attention(p)
        self.norm2 = nn.LayerNorm(p.hidden_size)
        self.mlp = feed_forward(p.feed_forward, p.hidden_size, int(p.hidden_size * p.mlp_ratio))

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        if self.placement is NormPlacement.POST:
            x = self.norm1(x + self.scale * self.attn(x))
            return self.norm2(x + self.scale * self.mlp(x))
        x = x + self.scale * self.attn(self.norm1(x))
        return x + self.scale * self.mlp(self.norm2(x))


class AdaLNZeroBlock(nn.Module):
    """The same with shift, scale and gate of each branch regressed from ``c`` (B, D), as in DiT."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.scale = p.residual_scale
        self.norm1 = nn.LayerNorm(p.hidden_size, elementwise_affine=False)
        self.attn = Attention(p)
        self.norm2 = nn.LayerNorm(p.hidden_size, elementwise_affine=False)
        self.mlp = feed_forward(p.feed_forward, p.hidden_size, int(p.hidden_size * p.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(p.hidden_size, 6 * p.hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + self.scale * gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + self.scale * gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


# --------------------------------------------------------------------------------------------------- model


class UViT(nn.Module):
    """The denoiser F(x_t, t, class)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        adaln, half = p.conditioning is Conditioning.ADALN_ZERO, p.depth // 2
        block = AdaLNZeroBlock if adaln else Block
        self.patch_embed = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.label_emb = nn.Embedding(p.num_classes + p.null_class, p.hidden_size)
        if p.positions is Positions.LEARNED:
            patches = (p.size // p.patch_size) ** 2
            self.pos_embed = nn.Parameter(torch.empty(1, p.extras + patches, p.hidden_size))
        if adaln:
            self.time_embed = TimestepEmbedder(p.hidden_size)
        self.in_blocks = nn.ModuleList(block(p) for _ in range(half))
        self.mid_block = block(p)
        self.out_blocks = nn.ModuleList(block(p) for _ in range(half))
        if p.skip_fusion is not SkipFusion.NONE:
            self.skips = nn.ModuleList(
                LongSkip(p.skip_fusion, p.skip_gate, p.hidden_size, p.num_heads, p.skip_cutoff) for _ in range(half)
            )
        if adaln:
            self.head: nn.Module = FinalLayer(p.hidden_size, p.patch_size, p.in_channels)
        else:
            self.norm = nn.LayerNorm(p.hidden_size)
            self.decoder_pred = nn.Linear(p.hidden_size, p.patch_size**2 * p.in_channels)
        if p.final_conv:
            self.final_layer = nn.Conv2d(p.in_channels, p.in_channels, 3, padding=1)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Linear layers and learned positions normal with deviation 0.02, and what ``Params`` asks to start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.params.positions is Positions.LEARNED:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, LongSkip):
                module.reset_gate()
        zeroed: list[nn.Linear] = []
        if self.params.conditioning is Conditioning.ADALN_ZERO:
            modulated = (*self.in_blocks, self.mid_block, *self.out_blocks, self.head)
            zeroed += [layer.adaLN_modulation[-1] for layer in modulated]
        if self.params.block_init is BlockInit.ZERO:
            for layer in (*self.in_blocks, self.mid_block, *self.out_blocks):
                zeroed += [layer.attn.proj, layer.mlp.fc2]
        for linear in zeroed:
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, C, H, W) x_t; H and W are ``Params.size`` with learned positions, else multiples of the patch.
            timestep: (B,) float, 0 … 1000, growing with the noise.
            class_labels: (B,) int64; ``num_classes`` means "no class" where there is a row for it.

        Returns:
            (B, C, H, W).
        """
        p = self.params
        grid = Grid(p.extras, sample.shape[2] // p.patch_size, sample.shape[3] // p.patch_size)
        x = self.patch_embed(sample)  # (B, rows * columns, D)
        if p.positions is Positions.SINCOS:
            x = x + integer_grid(grid.rows, grid.columns, p.hidden_size, like=x)
        t, y = timestep + p.timestep_offset, self.label_emb(class_labels)
        c: Tensor | None = None
        if p.conditioning is Conditioning.ADALN_ZERO:
            c = self.time_embed(t) + y
        else:
            time = sinusoidal_embedding(t, p.hidden_size).to(x.dtype)
            x = torch.cat([y.unsqueeze(1), time.unsqueeze(1), x], dim=1)  # (B, N, D)
        if p.positions is Positions.LEARNED:
            x = x + self.pos_embed
        kept: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x, c)
            kept.append(x)
        x = self.mid_block(x, c)
        for index, block in enumerate(self.out_blocks):
            if p.skip_fusion is not SkipFusion.NONE:
                x = self.skips[index](x, kept.pop(), timestep, grid)
            x = block(x, c)
        x = self.decoder_pred(self.norm(x))[:, p.extras :] if c is None else self.head(x, c)
        picture = unpatchify(x, grid.rows, grid.columns, p.patch_size)
        return self.final_layer(picture) if p.final_conv else picture


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, path: Path, prediction: Prediction) -> ModelSpec:
    """Inputs, outputs and conventions of a U-ViT trained at ``Params.size``.

    Raises:
        ValueError: a path whose timesteps fall with the noise, against which the time gate would open.
    """
    if path.first_timestep < path.last_timestep:
        raise ValueError(f"timesteps must grow with the noise, but {path} starts at {path.first_timestep:g}")
    sides: tuple[Dim, ...] = ()
    latents: tuple[str | int, ...] = ("batch", p.in_channels, p.size, p.size)
    if p.positions is Positions.SINCOS:
        side = {"default": p.size, "min": p.patch_size, "max": 4 * p.size, "multiple": p.patch_size}
        sides = (Dim(name="height", **side), Dim(name="width", **side))
        latents = ("batch", p.in_channels, "height", "width")
    return ModelSpec(
        name=name,
        family="uvit",
        inputs=(
            TensorSpec(name="sample", shape=latents, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=latents, varies=Varies.SAMPLE),),
        dims=(BATCH, *sides),
        path=path,
        prediction=prediction,
        num_classes=p.num_classes,
        null_class=p.num_classes if p.null_class else None,
    )


def _preset(name: str, p: Params, *, path: Path, prediction: Prediction = EPSILON) -> Preset:
    return Preset(params=p, build=UViT, spec=spec(name, p, path=path, prediction=prediction))


_LATENT = VP(schedule=BetaSchedule.SCALED_LINEAR, beta_start=0.00085, beta_end=0.012)

# Sizes are table 1 of the paper and the release's configurations: ImageNet 64 in pixels, ImageNet 256 in latents.
PRESETS: dict[str, Preset] = {
    "uvit-digits": _preset(
        "uvit-digits",
        Params(
            in_channels=1,
            patch_size=4,
            size=28,
            hidden_size=64,
            depth=5,
            num_heads=2,
            num_classes=10,
            positions=Positions.SINCOS,
        ),  # the baseline of benchmarks/stability_options.py
        path=LinearFlow(),
        prediction=FLOW_PREDICTION,
    ),
    "uvit-m-4": _preset(
        "uvit-m-4",
        Params(in_channels=3, patch_size=4, size=64, hidden_size=768, depth=17, num_heads=12, null_class=False),
        path=VP(),
    ),
    "uvit-l-2": _preset("uvit-l-2", Params(), path=VP()),
    "uvit-h-2": _preset(
        "uvit-h-2", Params(hidden_size=1152, depth=29, final_conv=False, timestep_offset=1.0), path=_LATENT
    ),
}
