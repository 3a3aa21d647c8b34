"""SiT: scalable interpolant transformers (Ma et al. 2024, arXiv:2401.08740).

The architecture is DiT's, parameter for parameter; what changes is the formulation. Time t runs from 0 (noise) to
1 (data) and is fed to the network as it is, x_t = alpha_t x_0 + sigma_t eps is a stochastic interpolant, and the
network regresses the velocity d x_t / dt. The release keeps DiT's doubled output channels and discards the second
half, so its checkpoints load without a key map.

Shape legend: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from torch import Tensor

from lehr.export.backbones.dit import DiT, Params
from lehr.export.backbones.preset import Preset
from lehr.runtime.paths import Curve, Interpolant
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies


class SiT(DiT):
    """The denoiser F(x_t, t, class)."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            sample: (B, C, H, W) x_t; H and W multiples of the patch size.
            timestep: (B,) float, 0 (noise) … 1 (data).
            class_labels: (B,) int64; ``num_classes`` means "no class".

        Returns:
            (B, C, H, W), the velocity.
        """
        return super().forward(sample, timestep, class_labels)[:, : self.params.in_channels]


# ------------------------------------------------------------------------------------------------- presets


def spec(name: str, p: Params, *, size: int, curve: Curve) -> ModelSpec:
    """Inputs, outputs and conventions of a SiT trained at ``size`` x ``size`` latents on the given interpolant."""
    side = {"default": size, "min": p.patch_size, "max": 4 * size, "multiple": p.patch_size}
    latents = ("batch", p.in_channels, "height", "width")
    path = Interpolant(curve=curve)
    return ModelSpec(
        name=name,
        family="sit",
        inputs=(
            TensorSpec(name="sample", shape=latents, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=latents, varies=Varies.SAMPLE),),
        dims=(BATCH, Dim(name="height", **side), Dim(name="width", **side)),
        path=path,
        prediction=Prediction(kind=PredictionKind.VELOCITY, interpolant=path),
        num_classes=p.num_classes,
        null_class=p.num_classes,
    )


def _preset(name: str, p: Params, *, curve: Curve = Curve.LINEAR) -> Preset:
    return Preset(params=p, build=SiT, spec=spec(name, p, size=32, curve=curve))


_SIZES = {  # hidden_size, depth, num_heads: table 1 of the paper
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
}

PRESETS: dict[str, Preset] = {
    f"sit-{size}-2": _preset(f"sit-{size}-2", Params(hidden_size=hidden, depth=depth, num_heads=heads))
    for size, (hidden, depth, heads) in _SIZES.items()
} | {
    # The other two interpolants of the paper's section 2.4; the weights released are of the straight one.
    f"sit-xl-2-{curve.value}": _preset(f"sit-xl-2-{curve.value}", Params(), curve=curve)
    for curve in (Curve.GVP, Curve.VP)
}
