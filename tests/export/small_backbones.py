"""Small configurations of every backbone, so that a test of all families is one test.

A configuration is a preset with fewer and narrower layers, so the preset's own spec describes it and a new family is
tested without more code. Its fields are made small by name; a family that calls them otherwise must teach ``SMALL``
its names, and one whose spec is large itself, such as one that names the width of its text, stands in ``TINY``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lehr.export.backbones import (
    dit,
    gaussian_dit,
    hunyuan_dit,
    single_stream,
    spacetime_dit,
    transfusion,
    uvit,
    video_unet,
)
from lehr.export.backbones.preset import Preset
from lehr.runtime.spec import DType, ModelSpec

SMALL: dict[str, Callable[[Any], Any]] = {
    "axes_dim": lambda p: (4, 10, 10),
    "block_out_channels": lambda p: (32,) * len(p.block_out_channels),
    "channel_mult": lambda p: tuple(min(1, mult) for mult in p.channel_mult),
    "depth": lambda p: 2,
    "depth_single_blocks": lambda p: 2,
    "dual_attention": lambda p: min(1, p.dual_attention),
    "hidden_size": lambda p: 48,
    "layers_per_block": lambda p: 1,
    "middle_depth": lambda p: 1,
    "model_channels": lambda p: 64,
    "num_head_channels": lambda p: p.num_head_channels and 32,
    "num_heads": lambda p: 2,
    "num_res_blocks": lambda p: 1,
    "transformer_depth": lambda p: tuple(min(1, depth) for depth in p.transformer_depth),
}


def _hunyuan_dit(preset: Preset) -> tuple[Any, ModelSpec]:
    p = replace(preset.params, hidden_size=24, depth=4, num_heads=3, clip_dim=20, clip_tokens=5, t5_dim=16, t5_tokens=7)
    return p, hunyuan_dit.spec("tiny", p, size=16, path=preset.spec.path)


def _spacetime_dit(preset: Preset) -> tuple[Any, ModelSpec]:
    if isinstance(preset.params, spacetime_dit.ClassParams):
        picture = dit.Params(in_channels=3, hidden_size=24, depth=1, num_heads=3, num_classes=7)
        of_class = spacetime_dit.ClassParams(picture=picture, patch_frames=2)
        return of_class, spacetime_dit.class_spec("tiny", of_class, size=8, frames=4)
    p = spacetime_dit.Params(in_channels=3, hidden_size=24, depth=1, num_heads=3, caption_channels=20, base_size=5)
    return p, spacetime_dit.spec("tiny", p, size=8, frames=4)


def _single_stream(preset: Preset) -> tuple[Any, ModelSpec]:
    p = single_stream.Params(
        in_channels=6,
        hidden_size=32,
        depth=2,
        num_heads=2,
        mlp_hidden=40,
        condition_dim=10,
        text_dim=24,
        sections=(4, 2, 2),
        text=preset.params.text,
    )
    return p, single_stream.spec("tiny", p)


def _video_unet(preset: Preset) -> tuple[Any, ModelSpec]:
    p = video_unet.Params(
        in_channels=5,
        out_channels=3,
        block_out_channels=(32,),
        layers_per_block=1,
        attention_levels=(0,),
        num_heads=(2,),
        context_dim=12,
        time_id_dim=8,
    )
    return p, video_unet.spec("tiny", p, height=8, width=12, frames=4)


def _gaussian_dit(preset: Preset) -> tuple[Any, ModelSpec]:
    p = gaussian_dit.Params(hidden_size=24, depth=2, num_heads=3, context_dim=12)
    return p, gaussian_dit.spec("tiny", p, gaussians=16)


def _transfusion(preset: Preset) -> tuple[Any, ModelSpec]:
    p = transfusion.Params(in_channels=3, hidden_size=24, depth=3, num_heads=3, mlp_hidden=40, vocab_size=30)
    return p, transfusion.spec("tiny", p, size=8)


def _uvit(preset: Preset) -> tuple[Any, ModelSpec]:
    p = replace(preset.params, hidden_size=24, depth=3, num_heads=3, size=4 * preset.params.patch_size)
    return p, uvit.spec("tiny", p, path=preset.spec.path, prediction=preset.spec.prediction)


TINY: dict[str, Callable[[Preset], tuple[Any, ModelSpec]]] = {
    "gaussian_dit": _gaussian_dit,
    "hunyuan_dit": _hunyuan_dit,
    "single_stream": _single_stream,
    "spacetime_dit": _spacetime_dit,
    "transfusion": _transfusion,
    "uvit": _uvit,
    "video_unet": _video_unet,
}


def small(preset: Preset) -> Preset:
    """The preset with fewer and narrower layers."""
    if preset.spec.family in TINY:
        params, spec = TINY[preset.spec.family](preset)
        return replace(preset, params=params, spec=spec)
    named = [field.name for field in fields(preset.params) if field.name in SMALL]
    return replace(preset, params=replace(preset.params, **{name: SMALL[name](preset.params) for name in named}))


def randomise(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every parameter random, those that start at zero or one included, at a scale that keeps signals of order one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = (parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return module.eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unseen(spec: ModelSpec) -> dict[str, int]:
    """Sizes that differ from those of the trace, and from each other."""
    return {
        dim.name: 3 if dim.name == "batch" else dim.multiple * (2 + number % 2 + 5 * (dim.multiple == 1))
        for number, dim in enumerate(spec.dims)
    }


def random_feeds(spec: ModelSpec, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ends = sorted((spec.path.first_timestep, spec.path.last_timestep))
    feeds: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = tensor.sizes(sizes)
        if tensor is spec.timestep:
            feeds[tensor.name] = rng.uniform(*ends, shape).astype(tensor.dtype.numpy)
        elif tensor.dtype is DType.INT64:
            feeds[tensor.name] = rng.integers(0, spec.num_classes or 2, shape)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype.numpy)
    return feeds
