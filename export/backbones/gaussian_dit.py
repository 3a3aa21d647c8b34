"""A diffusion transformer over sets of 3-D Gaussians, conditioned on a picture or a text.

3-D Gaussian splatting (Kerbl et al. 2023, arXiv:2308.04079) describes an object by some thousand Gaussians, each a
position, a size, an orientation, an opacity and a colour. Here each Gaussian is a token, as each point is one in
Point-E (Nichol et al. 2022, arXiv:2212.08751): a set has no order, so tokens have no positions, and to exchange two
Gaussians of the input exchanges them in the output. Blocks are DiT's (Peebles & Xie 2023) with cross-attention to the
tokens of an image or text encoder. The network predicts x_0, whose errors are those of the picture that
:class:`~lehr.export.backbones._splat_renderer.SplatRenderer`, the stage that decodes, draws of it.

No weights of this architecture are published. Module names are DiT's and PixArt's.

Shape legend: B batch, N Gaussians, M tokens of the condition, D token channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from lehr.export.backbones._layers import Mlp, TimestepEmbedder, modulate
from lehr.export.backbones._splat_renderer import CHANNELS
from lehr.export.backbones.dit import Attention, CrossAttention
from lehr.export.backbones.pixart import MASKED, CaptionEmbedder
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import VP, BetaSchedule
from lehr.runtime.prediction import SAMPLE
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies

VIT_TOKENS = 257  # of a picture in 16 x 16 patches, and its class token

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one Gaussian DiT; ``context_dim`` is the width of the condition's tokens."""

    in_channels: int = CHANNELS
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    context_dim: int = 1024

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")


# -------------------------------------------------------------------------------------------------- layers


class GaussianBlock(nn.Module):
    """DiT's block with attention to the condition between the other two; ``c`` (B, D) is the timestep's embedding."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        dim = p.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, p.num_heads)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, p.num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * p.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, y: Tensor, mask_bias: Tensor) -> Tensor:
        """x (B, N, D), c (B, D), y (B, M, D), mask_bias (B, 1, N, M)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.cross_attn(self.norm_cross(x), y, mask_bias)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of a token to its Gaussian."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# --------------------------------------------------------------------------------------------------- model


class GaussianDiT(nn.Module):
    """The denoiser F(x_t, t, picture or text)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        p = self.params = params
        self.x_embedder = nn.Linear(p.in_channels, p.hidden_size)
        self.t_embedder = TimestepEmbedder(p.hidden_size)
        self.y_embedder = CaptionEmbedder(p.context_dim, p.hidden_size)
        self.blocks = nn.ModuleList(GaussianBlock(p) for _ in range(p.depth))
        self.final_layer = FinalLayer(p.hidden_size, p.in_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        """Evaluate the network.

        Args:
            hidden_states: (B, N, in_channels) x_t, one Gaussian a row, in the channels of ``_splat_renderer``.
            timestep: (B,) float, 0 … 999.
            encoder_hidden_states: (B, M, context_dim), features of a picture's patches or of a text.
            encoder_attention_mask: (B, M) int64, 0 for padding.

        Returns:
            (B, N, in_channels), x_0.
        """
        x = self.x_embedder(hidden_states)  # (B, N, D)
        c, y = self.t_embedder(timestep), self.y_embedder(encoder_hidden_states)
        mask_bias = ((1 - encoder_attention_mask.to(x.dtype)) * MASKED)[:, None, None, :]
        # A row a query, because not every engine's attention broadcasts a mask along the queries.
        mask_bias = mask_bias.expand(-1, -1, x.shape[1], -1)
        for block in self.blocks:
            x = block(x, c, y, mask_bias)
        return self.final_layer(x, c)


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, gaussians: int, tokens: int = VIT_TOKENS) -> ModelSpec:
    """Inputs, outputs and conventions of a model of so many ``gaussians``, conditioned on usually ``tokens`` tokens."""
    splats, context = ("batch", "gaussians", p.in_channels), ("batch", "context_tokens")
    return ModelSpec(
        name=name,
        family="gaussian_dit",
        inputs=(
            TensorSpec(name="hidden_states", shape=splats, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="encoder_hidden_states", shape=(*context, p.context_dim), varies=Varies.PROMPT),
            TensorSpec(name="encoder_attention_mask", dtype=DType.INT64, shape=context, varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=splats, varies=Varies.SAMPLE),),
        dims=(
            BATCH,
            Dim(name="gaussians", default=gaussians, max=8 * gaussians),
            Dim(name="context_tokens", default=tokens, max=1024),
        ),
        path=VP(schedule=BetaSchedule.COSINE),
        prediction=SAMPLE,
        sampling=Sampling(num_inference_steps=50),
    )


PRESETS: dict[str, Preset] = {
    "gaussian-dit-b": Preset(  # DiT-B's size
        params=Params(), build=GaussianDiT, spec=spec("gaussian-dit-b", Params(), gaussians=4096)
    ),
}
_SOLIDS = Params(hidden_size=96, depth=4, num_heads=4, context_dim=16)
PRESETS["coloured-solids"] = Preset(  # trained by lehr.export.reference.splats
    params=_SOLIDS,
    build=GaussianDiT,
    spec=replace(spec("coloured-solids", _SOLIDS, gaussians=256, tokens=2), sampling=Sampling(num_inference_steps=30)),
)
