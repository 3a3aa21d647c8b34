"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): a copy of a latent U-Net's encoder that steers the U-Net.

The copy sees the sample and a picture, an edge map or a pose, and what it finds is added to the U-Net's skip
connections. Each skip gets a residual through a 1 x 1 convolution that was zero when training began. The two networks
are two graphs here: the residuals are outputs of one and inputs of the other, so that either can be exchanged,
quantised or left out of an evaluation. The module names are those of the authors' release (``lllyasviel/ControlNet``),
with the encoder's under ``unet``.

Shape legend: as in ``latent_unet``; h w a picture's height and width, 8 times the latent's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor, nn

from lehr.export.backbones.latent_unet import LatentUNet
from lehr.export.backbones.latent_unet import Params as LatentParams
from lehr.export.backbones.sdxl import SDXL
from lehr.export.backbones.sdxl import Params as SDXLParams
from lehr.runtime.spec import ModelSpec, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec

M = TypeVar("M", bound=nn.Module)

DOWN, MIDDLE = "down_block_additional_residuals_{}", "mid_block_additional_residual"  # diffusers' names

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one ControlNet.

    Attributes:
        unet: the U-Net whose encoder is copied.
        hint_channels: of the convolutions that bring the picture to the latent's size, halving it between two.
        hint_inputs: channels of the picture.
    """

    unet: LatentParams
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    hint_inputs: int = 3

    def __post_init__(self) -> None:
        if not self.hint_channels or min(self.hint_channels) < 1 or self.hint_inputs < 1:
            raise ValueError(f"a ControlNet needs channels for its picture, got {self}")
        if self.unet.condition_channels or self.unet.guidance_dim is not None:
            raise ValueError("a ControlNet sees the sample alone, and no guidance embedding")

    @property
    def factor(self) -> int:
        """Pixels of the picture along one side of a latent cell."""
        return int(2 ** (len(self.hint_channels) - 1))


def residuals(p: LatentParams) -> tuple[TensorSpec, ...]:
    """The residuals of a U-Net: of every skip connection in the order they are made, and of the middle."""

    def tensor(name: str, channels: int, level: int) -> TensorSpec:
        height, width = (size if level == 0 else f"{size}/{2**level}" for size in ("height", "width"))
        return TensorSpec(name=name, shape=("batch", channels, height, width), varies=Varies.SAMPLE)

    found = [(p.model_channels, 0)]
    for level, mult in enumerate(p.channel_mult):
        found += [(mult * p.model_channels, level)] * p.num_res_blocks
        if level + 1 < len(p.channel_mult):
            found.append((mult * p.model_channels, level + 1))
    skips = (tensor(DOWN.format(k), channels, level) for k, (channels, level) in enumerate(found))
    channels, level = found[-1]
    return *skips, tensor(MIDDLE, channels, level)


# ------------------------------------------------------------------------------------------- the ControlNet


def _encoder(unet: LatentUNet) -> LatentUNet:
    """A U-Net without the half that a ControlNet does not copy."""
    del unet.output_blocks, unet.out
    return unet


class Control(nn.Module):
    """Stable Diffusion 1 and 2: (x_t, t, text, picture) -> residuals."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params
        p = params.unet
        self.unet = _encoder(self._whole(p))
        widths = params.hint_channels
        hint: list[nn.Module] = [nn.Conv2d(params.hint_inputs, widths[0], 3, padding=1), nn.SiLU()]
        for narrow, wide in pairwise(widths):
            hint += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.SiLU()]
            hint += [nn.Conv2d(narrow, wide, 3, padding=1, stride=2), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*hint, nn.Conv2d(widths[-1], p.model_channels, 3, padding=1))
        *skips, middle = (int(tensor.shape[1]) for tensor in residuals(p))
        self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 1)) for width in skips)
        self.middle_block_out = nn.Sequential(nn.Conv2d(middle, middle, 1))

    def _whole(self, p: LatentParams) -> LatentUNet:
        return LatentUNet(p)

    def encode(self, sample: Tensor, emb: Tensor, context: Tensor, controlnet_cond: Tensor) -> tuple[Tensor, ...]:
        """The residuals, once all else that conditions them is an embedding (B, E) and a context (B, S, D)."""
        x, found = sample, []
        for k, (block, zero) in enumerate(zip(self.unet.input_blocks, self.zero_convs, strict=True)):
            x = block(x, emb, context)
            if k == 0:
                x = x + self.input_hint_block(controlnet_cond)
            found.append(zero(x))
        return *found, self.middle_block_out(self.unet.middle_block(x, emb, context))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, controlnet_cond: Tensor
    ) -> tuple[Tensor, ...]:
        """Find the residuals.

        Args:
            sample: (B, out_channels, H, W) x_t, as the U-Net sees it.
            timestep: (B,) float, 0 … 999.
            encoder_hidden_states: (B, S, context_dim), the text encoder's tokens.
            controlnet_cond: (B, hint_inputs, h, w) the picture, 0 … 1.

        Returns:
            What :func:`residuals` describes.
        """
        return self.encode(sample, self.unet.embed(timestep, None), encoder_hidden_states, controlnet_cond)


class ControlXL(Control):
    """SDXL: (x_t, t, text, pooled text, sizes, picture) -> residuals."""

    unet: SDXL

    def _whole(self, p: LatentParams) -> SDXL:
        if not isinstance(p, SDXLParams):
            raise TypeError(f"the ControlNet of an SDXL model needs its parameters, got {type(p).__name__}")
        return SDXL(p)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        controlnet_cond: Tensor,
    ) -> tuple[Tensor, ...]:
        """Find the residuals; arguments as those of ``SDXL.forward`` and ``Control.forward``."""
        emb = self.unet.embed(timestep, None) + self.unet.embed_pooled(text_embeds, time_ids)
        return self.encode(sample, emb, encoder_hidden_states, controlnet_cond)


def build(params: Params) -> Control:
    """The ControlNet of a U-Net's family."""
    return (ControlXL if isinstance(params.unet, SDXLParams) else Control)(params)


def stage_spec(name: str, params: Params, denoiser: ModelSpec) -> StageSpec:
    """A ControlNet as a stage beside its denoiser, whose sizes it shares."""
    known = {tensor.name: tensor for tensor in denoiser.inputs}
    names = ["encoder_hidden_states", *(["text_embeds", "time_ids"] if isinstance(params.unet, SDXLParams) else [])]
    height, width = (f"{params.factor}*{size}" for size in ("height", "width"))
    picture = TensorSpec(
        name="controlnet_cond", shape=("batch", params.hint_inputs, height, width), varies=Varies.PROMPT
    )
    return StageSpec(
        name=name,
        kind=StageKind.CONTROL,
        family="controlnet",
        inputs=(denoiser.sample, denoiser.timestep, *(known[name] for name in names), picture),
        outputs=residuals(params.unet),
        dims=denoiser.dims,
    )


# ------------------------------------------------------------------------------------------- the steered U-Net


def controlled(module: LatentUNet, spec: ModelSpec) -> tuple[LatentUNet, ModelSpec]:
    """A U-Net that takes residuals, and its spec.

    The module shares the parameters of ``module``, which may be on the meta device.
    """
    tensors = residuals(module.params)
    made = steered(module, {"residuals": [tensor.name for tensor in tensors]})
    return made, replace(spec, inputs=(*spec.inputs, *tensors))


def steered(module: M, groups: Mapping[str, Sequence[str]]) -> M:
    """``module`` with one more parameter of ``forward`` for each residual.

    Args:
        module: its ``forward`` takes sequences of residuals.
        groups: the name of such a sequence -> the residuals' own names.
    """
    kind = _steered(type(module), groups)
    made: M = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    return made


def _steered(base: type[M], groups: Mapping[str, Sequence[str]]) -> type[M]:
    class Steered(base):  # type: ignore[valid-type, misc]
        def forward(self, **feeds: Tensor) -> Tensor:
            given = {group: [feeds.pop(name) for name in names] for group, names in groups.items()}
            return super().forward(**feeds, **given)

    # A graph's inputs are named parameters, and how many there are depends on the network.
    listed = [p for p in inspect.signature(base.forward).parameters.values() if p.name not in groups]
    names = [name for group in groups.values() for name in group]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Tensor) for name in names]
    forward: Any = Steered.forward
    forward.__signature__ = inspect.Signature([*listed, *added])
    return Steered
