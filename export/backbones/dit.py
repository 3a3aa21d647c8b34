"""DiT: scalable diffusion models with transformers (Peebles & Xie 2023, arXiv:2212.09748).

The paper compares ways of telling the network the timestep and the class (section 3.2): adaLN-zero, which it
settles on and all presets use, in-context tokens, and cross-attention. Module and parameter names are those of
the authors' release, which holds adaLN-zero alone, so its checkpoints load without a key map.
The position table is computed from the input's size inside the graph instead of being stored: an engine
then serves sizes that were not seen at export, where a stored table would silently fix one size.

Shape legend: B batch, C latent channels, H W latent height and width, p patch size,
L = (H/p)(W/p) tokens, D token channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones._layers import (
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    integer_grid,
    modulate,
    unpatchify,
)
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, LinearFlow, Path
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, Prediction
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

# ---------------------------------------------------------------------------------------------- parameters


class Conditioning(str, Enum):
    """How timestep and class reach the blocks (figure 3 of the paper)."""

    ADALN_ZERO = "adaln_zero"  # shift, scale and gate of every layer, regressed from t + y
    IN_CONTEXT = "in_context"  # two more tokens of the sequence, dropped after the last block
    CROSS_ATTENTION = "cross_attention"  # a sequence of two that one more layer of every block attends to


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one DiT. ``learn_sigma`` doubles the output channels (learned-range variance).

    ``frequency_shift`` and ``norm2_eps`` are 0 and 1e-6 in the paper's code. diffusers' module embeds the timestep
    with shift 1 and reads the second norm's epsilon (1e-5 by default) from the folder's configuration.
    """

    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    conditioning: Conditioning = Conditioning.ADALN_ZERO
    frequency_shift: int = 0
    norm2_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


# -------------------------------------------------------------------------------------------------- layers


class LabelEmbedder(nn.Module):
    """Class table with one extra row, index ``num_classes``, for "no class" (classifier-free guidance)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)


class Attention(nn.Module):
    """Multi-head self-attention over (B, L, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, length, dim = x.shape
        qkv = self.qkv(x).reshape(b, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, L, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, length, dim))


class CrossAttention(nn.Module):
    """Multi-head attention of (B, L, D) to a context (B, M, D).

    ``bias`` is added to the scores; it broadcasts to (B, heads, L, M).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        b, length, dim = x.shape
        q = self.q_linear(x).reshape(b, length, self.num_heads, dim // self.num_heads).transpose(1, 2)
        kv = self.kv_linear(context).reshape(b, context.shape[1], 2, self.num_heads, dim // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, M, D/heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(b, length, dim))


class DiTBlock(nn.Module):
    """Pre-norm transformer block with adaLN-zero; ``c`` (B, D) is the sum of timestep and class embedding."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        dim = p.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, p.num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=p.norm2_eps)
        self.mlp = Mlp(dim, int(dim * p.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class InContextBlock(nn.Module):
    """The standard ViT block: the conditions are tokens of ``x`` itself."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(p.hidden_size, eps=1e-6)
        self.attn = Attention(p.hidden_size, p.num_heads)
        self.norm2 = nn.LayerNorm(p.hidden_size, eps=p.norm2_eps)
        self.mlp = Mlp(p.hidden_size, int(p.hidden_size * p.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """The ViT block with cross-attention to the two condition tokens after the self-attention."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(p.hidden_size, eps=1e-6)
        self.attn = Attention(p.hidden_size, p.num_heads)
        self.norm_cross = nn.LayerNorm(p.hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(p.hidden_size, p.num_heads)
        self.norm2 = nn.LayerNorm(p.hidden_size, eps=p.norm2_eps)
        self.mlp = Mlp(p.hidden_size, int(p.hidden_size * p.mlp_ratio))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), context)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of a token to its patch."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainFinalLayer(nn.Module):
    """Final layer of the variants without adaLN."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


_BLOCKS: dict[Conditioning, type[nn.Module]] = {
    Conditioning.ADALN_ZERO: DiTBlock,
    Conditioning.IN_CONTEXT: InContextBlock,
    Conditioning.CROSS_ATTENTION: CrossAttentionBlock,
}

# --------------------------------------------------------------------------------------------------- model


class DiT(nn.Module):
    """The denoiser F(x_t, t, class)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.x_embedder = PatchEmbed(p.in_channels, p.patch_size, p.hidden_size)
        self.t_embedder = TimestepEmbedder(p.hidden_size, frequency_shift=p.frequency_shift)
        self.y_embedder = LabelEmbedder(p.num_classes, p.hidden_size)
        self.blocks = nn.ModuleList(_BLOCKS[p.conditioning](p) for _ in range(p.depth))
        final = FinalLayer if p.conditioning is Conditioning.ADALN_ZERO else PlainFinalLayer
        self.final_layer = final(p.hidden_size, p.patch_size, p.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The output is zero at the start of training and, with adaLN-zero, every block the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.params.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)  # type: ignore[arg-type]
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)  # type: ignore[arg-type]
        zeroed = [self.final_layer.linear]
        if self.params.conditioning is Conditioning.ADALN_ZERO:
            zeroed += [layer.adaLN_modulation[-1] for layer in (*self.blocks, self.final_layer)]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, C, H, W) x_t; H and W multiples of the patch size.
            timestep: (B,) float, 0 … 1000.
            class_labels: (B,) int64; ``num_classes`` means "no class".

        Returns:
            (B, out_channels, H, W).
        """
        p = self.params
        rows, columns = sample.shape[2] // p.patch_size, sample.shape[3] // p.patch_size
        x = self.x_embedder(sample)  # (B, L, D)
        x = x + self.positions(rows, columns, like=x)
        t, y = self.t_embedder(timestep), self.y_embedder(class_labels)  # each (B, D)
        if p.conditioning is Conditioning.ADALN_ZERO:
            c = t + y
            for block in self.blocks:
                x = block(x, c)
            x = self.final_layer(x, c)  # (B, L, p*p*out_channels)
        elif p.conditioning is Conditioning.IN_CONTEXT:
            x = torch.cat([x, torch.stack([t, y], dim=1)], dim=1)  # (B, L + 2, D)
            for block in self.blocks:
                x = block(x)
            x = self.final_layer(x[:, :-2])
        else:
            context = torch.stack([t, y], dim=1)  # (B, 2, D)
            for block in self.blocks:
                x = block(x, context)
            x = self.final_layer(x)
        return unpatchify(x, rows, columns, p.patch_size)

    def positions(self, rows: int, columns: int, *, like: Tensor) -> Tensor:
        """Where the patches are, (1, rows * columns, D)."""
        return integer_grid(rows, columns, self.params.hidden_size, like=like)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int, path: Path, prediction: Prediction) -> ModelSpec:
    """Inputs, outputs and conventions of a DiT trained at ``size`` x ``size`` latents."""
    side = {"default": size, "min": p.patch_size, "max": 4 * size, "multiple": p.patch_size}
    return ModelSpec(
        name=name,
        family="dit",
        inputs=(
            TensorSpec(name="sample", shape=("batch", p.in_channels, "height", "width"), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", p.out_channels, "height", "width"), varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side)),
        path=path,
        prediction=prediction,
        num_classes=p.num_classes,
        null_class=p.num_classes,
    )


def _preset(
    name: str, p: Params, *, size: int, path: Path, prediction: Prediction, sampling: Sampling | None = None
) -> Preset:
    described = spec(name, p, size=size, path=path, prediction=prediction)
    return Preset(params=p, build=DiT, spec=replace(described, sampling=sampling or described.sampling))


_SIZES = {  # hidden_size, depth, num_heads: table 1 of the paper
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
}

PRESETS = {
    f"dit-{size}-{patch}": _preset(
        f"dit-{size}-{patch}",
        Params(patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads),
        size=32,
        path=VP(),
        prediction=EPSILON,
    )
    for size, (hidden, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
PRESETS["digits-dit"] = _preset(
    "digits-dit",
    Params(
        in_channels=1, patch_size=4, hidden_size=128, depth=6, num_heads=4, num_classes=10, learn_sigma=False
    ),  # trained on MNIST by lehr.export.reference, shipped
    size=28,
    path=LinearFlow(),
    prediction=FLOW_PREDICTION,
    sampling=Sampling(guidance_scale=1.5),
)
