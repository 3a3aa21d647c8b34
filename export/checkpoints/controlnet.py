"""ControlNets from diffusers folders and single files, and the denoiser that takes their residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lehr.engines.graph.weights import WeightSource
from lehr.export.backbones import _controlnet as controlnet
from lehr.export.backbones import _flux_controlnet as flux_controlnet
from lehr.export.backbones.flux import Flux
from lehr.export.backbones.flux import Params as FluxParams
from lehr.export.backbones.latent_unet import LatentUNet
from lehr.export.backbones.latent_unet import Params as LatentParams
from lehr.export.checkpoints import config as configs
from lehr.export.checkpoints.config import NotOurs
from lehr.export.checkpoints.files import Pickles, open_component, open_file
from lehr.export.checkpoints.layouts import DIFFUSERS, ORIGINAL
from lehr.export.checkpoints.mapped import Layout, MappedSource, mapped, shapes
from lehr.export.checkpoints.maps import controlnet as keys
from lehr.export.checkpoints.maps import flux_controlnet as flux_keys
from lehr.export.source import Source
from lehr.export.stages import StageSource
from lehr.runtime.errors import InvalidInput
from lehr.runtime.noise import standard_normal
from lehr.runtime.stage import StageSpec

Array = npt.NDArray[Any]

NAME = "controlnet"  # diffusers' name of the component; further ones are controlnet_2 and so on
_CLASS, _FLUX_CLASS = "ControlNetModel", "FluxControlNetModel"
_FLUX = "flux_controlnet"  # the family of FLUX's
_FLUX_REFUSED = ("num_mode", "conditioning_embedding_channels")
_OWN = ("conditioning_channels", "conditioning_embedding_out_channels")
_DEMANDED = {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}


def read_controlnet(
    path: Path, denoiser: Source, *, name: str = NAME, pickles: Pickles = Pickles.REFUSED
) -> StageSource:
    """A ControlNet for a denoiser.

    Args:
        path: a diffusers folder of a ``ControlNetModel``, or one of the authors' files, whose architecture is then the
            denoiser's.
        denoiser: the U-Net that it steers.
        name: of the stage.
        pickles: whether pickled weights are read.

    Raises:
        InvalidInput: another class or architecture than can be read, damaged or wrong weights, or a ControlNet of
            another model.
    """
    if isinstance(denoiser.module, Flux):
        return _flux_controlnet(path, denoiser, denoiser.module.params, name, pickles)
    unet = _latent_unet(denoiser).params
    if path.is_dir():
        params = _params(configs.read_config(path), path)
        source: WeightSource = open_component(path, pickles)
        p = params.unet
        rules = keys.folder_rules(p.num_res_blocks, 2 * len(params.hint_channels), len(controlnet.residuals(p)) - 1)
        layout = Layout(DIFFUSERS, rules, keys.DIFFUSERS_IGNORED)
    else:
        params = controlnet.Params(unet=replace(unet, in_channels=unet.out_channels, guidance_dim=None))
        source = open_file(path, pickles)
        layout = Layout(ORIGINAL, keys.ORIGINAL, keys.ORIGINAL_IGNORED)
    if _residual_shapes(params.unet) != _residual_shapes(unet) or params.unet.context_dim != unet.context_dim:
        raise InvalidInput(
            f"{path} is the ControlNet of another model than {denoiser.name}: it was made beside {params.unet}, "
            f"expected {unet}."
        )
    with torch.device("meta"):
        module = controlnet.build(params).eval()
    weights: MappedSource = mapped(source, shapes(module), layout, what=f"the ControlNet {path.name}")
    spec = controlnet.stage_spec(name, params, denoiser.spec)
    return StageSource(
        spec=spec, module=module, weights=weights, origin=f"weights of {path.name}", feeds=partial(_feeds, spec)
    )


def with_residuals(found: Source, controls: Sequence[StageSource]) -> Source:
    """The denoiser with the residuals of its ControlNets among its inputs.

    Raises:
        InvalidInput: a denoiser that no ControlNet steers, or ControlNets that make different residuals.
    """
    made = [[(tensor.name, tensor.shape) for tensor in control.spec.outputs] for control in controls]
    if any(other != made[0] for other in made):
        raise InvalidInput("ControlNets of different depths cannot steer one model together; export it once for each.")
    if isinstance(found.module, Flux):
        params = controls[0].module.params
        module, spec = flux_controlnet.controlled(found.module, found.spec, params)  # type: ignore[arg-type]
        return replace(found, module=module, spec=spec)
    unet, spec = controlnet.controlled(_latent_unet(found), found.spec)
    return replace(found, module=unet, spec=spec)


def _flux_controlnet(path: Path, denoiser: Source, flux: FluxParams, name: str, pickles: Pickles) -> StageSource:
    if not path.is_dir():
        raise InvalidInput(f"{path} is no folder. Of FLUX's ControlNets, folders of {_FLUX_CLASS} are read.")
    config = configs.read_config(path)
    if config["_class_name"] != _FLUX_CLASS:
        raise InvalidInput(f"{path} holds a {config['_class_name']}, expected a {_FLUX_CLASS}.")
    for option in _FLUX_REFUSED:
        if config.get(option) is not None:
            raise InvalidInput(f"{path} has {option} {config[option]!r}: Union ControlNets and XLabs' are not read.")
    neutral = {key: value for key, value in config.items() if key not in _FLUX_REFUSED}
    try:
        found = configs.architecture({**neutral, "_class_name": "FluxTransformer2DModel"})
    except NotOurs as e:
        raise InvalidInput(f"{path} is a ControlNet that is not known here: {e}.") from e
    own = replace(
        found.params, depth=flux.depth, depth_single_blocks=flux.depth_single_blocks, guidance_embed=flux.guidance_embed
    )
    if own != flux:
        raise InvalidInput(
            f"{path} is the ControlNet of another model than {denoiser.name}: {found.params}, expected one for {flux}."
        )
    params = flux_controlnet.Params(flux=found.params)
    with torch.device("meta"):
        module = flux_controlnet.FluxControl(params).eval()
    layout = Layout(DIFFUSERS, flux_keys.DIFFUSERS, flux_keys.DIFFUSERS_IGNORED)
    weights = mapped(open_component(path, pickles), shapes(module), layout, what=f"the ControlNet {path.name}")
    spec = flux_controlnet.stage_spec(name, params, denoiser.spec)
    return StageSource(
        spec=spec, module=module, weights=weights, origin=f"weights of {path.name}", feeds=partial(_feeds, spec)
    )


def _latent_unet(found: Source) -> LatentUNet:
    if not isinstance(found.module, LatentUNet):
        raise InvalidInput(
            f"{found.name} is a {type(found.module).__name__} of family {found.spec.family}; ControlNets steer the "
            "U-Nets of Stable Diffusion 1 and 2 and of SDXL, and FLUX."
        )
    return found.module


def _params(config: Mapping[str, Any], path: Path) -> controlnet.Params:
    """A ``ControlNetModel``'s configuration, read as that of the U-Net it copies."""
    if config["_class_name"] != _CLASS:
        raise InvalidInput(f"{path} holds a {config['_class_name']}, expected a {_CLASS}.")
    for option, value in _DEMANDED.items():
        if config.get(option, value) != value:
            raise InvalidInput(f"{path} has {option} {config[option]!r}, and only {value!r} is read.")
    down = config.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    unet = {key: value for key, value in config.items() if key not in {*_OWN, *_DEMANDED}}
    unet |= {
        "_class_name": "UNet2DConditionModel",
        "out_channels": config.get("in_channels", 4),
        "up_block_types": [str(kind).replace("Down", "Up") for kind in reversed(down)],
        "addition_embed_type_num_heads": 64,
    }
    try:
        found = configs.architecture(unet)
    except NotOurs as e:
        raise InvalidInput(f"{path} is a ControlNet that is not known here: {e}.") from e
    widths = config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
    return controlnet.Params(
        unet=found.params,
        hint_channels=tuple(int(width) for width in widths),
        hint_inputs=int(config.get("conditioning_channels", 3)),
    )


def _residual_shapes(p: LatentParams) -> list[tuple[int | str, ...]]:
    return [tensor.shape for tensor in controlnet.residuals(p)]


def _feeds(spec: StageSpec, seed: int) -> dict[str, Array]:
    """Golden inputs: unit normals, timesteps over the schedule, a picture of noise between 0 and 1."""
    sizes = spec.default_sizes(batch=2)
    feeds: dict[str, Array] = {}
    for number, tensor in enumerate(spec.inputs):
        shape = tensor.sizes(sizes)
        rows: Array = np.stack(
            [standard_normal(seed, k, shape[1:], stream=2_000_000 + number) for k in range(shape[0])]
        )
        if tensor.name == spec.inputs[1].name:
            rows = np.linspace(0.1, 0.9, shape[0]) * (1 if spec.family == _FLUX else 1000)
        elif tensor.name == "controlnet_cond" and spec.family != _FLUX:
            rows = 1 / (1 + np.exp(-rows))
        elif tensor.name == "time_ids":
            rows = np.full(shape, 1024.0)
        feeds[tensor.name] = rows.astype(tensor.dtype.numpy)
    return feeds
