"""diffusers' configurations of U-Nets as ``Params``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lehr.export.backbones import latent_unet, ncsnpp, sdxl, unet, video_unet
from lehr.export.checkpoints.config import Architecture, NotOurs, Options, anything, sample_size

SDXL_POOLED = 1280  # channels of the pooled text embedding of every published SDXL model

# -------------------------------------------------------------------------------------------------- in pixels

_PIXELS = {
    "act_fn": ["silu", "swish"],
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "dropout": anything(),
    "mid_block_type": "UNetMidBlock2D",
    "num_train_timesteps": anything(),  # of learned time embeddings
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "upsample_type": "conv",
}


def _levels(o: Options, plain: str, attended: str, down: tuple[str, ...], up: tuple[str, ...]) -> tuple[bool, ...]:
    """Which levels have attention; the decoder must mirror the encoder."""
    down, up = o.take("down_block_types", down), o.take("up_block_types", up)
    for name in down:
        if name not in (plain, attended):
            raise NotOurs(f"down_block_types has {name}")
    if up != tuple(name.replace("Down", "Up") for name in reversed(down)):
        raise NotOurs(f"up_block_types {up} do not mirror down_block_types {down}")
    return tuple(name == attended for name in down)


def _unet_2d(o: Options) -> Architecture:
    attends = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    mirrored = tuple(name.replace("Down", "Up") for name in reversed(attends))
    embedding = o.take("time_embedding_type", "positional")
    if embedding not in ("positional", "fourier"):
        raise NotOurs(f"time_embedding_type is {embedding!r}")
    fourier = embedding == "fourier"
    skip = "Skip" if fourier else ""
    levels = _levels(o, f"{skip}DownBlock2D", f"Attn{skip}DownBlock2D", attends, mirrored)
    common: dict[str, Any] = {
        "in_channels": o.take("in_channels", 3),
        "out_channels": o.take("out_channels", 3),
        "block_out_channels": o.take("block_out_channels", (224, 448, 672, 896)),
        "layers_per_block": o.take("layers_per_block", 2),
        "attention_levels": tuple(level for level, attended in enumerate(levels) if attended),
        "head_channels": o.maybe("attention_head_dim", 8),
    }
    if len(levels) != len(common["block_out_channels"]):
        raise NotOurs(f"{len(levels)} block types do not go with block_out_channels {common['block_out_channels']}")
    return (_ncsnpp if fourier else _ddpm)(o, common)


def _ncsnpp(o: Options, common: dict[str, Any]) -> Architecture:
    params = ncsnpp.Params(**common)
    narrow = [params.block_out_channels[level] for level in params.attention_levels]
    if any(channels < 128 for channels in narrow):  # diffusers normalises these in 32 groups, score-SDE in fewer
        raise NotOurs(f"attention at {min(narrow)} channels, of fewer than 128")
    if not math.isclose(o.take("mid_block_scale_factor", 1.0), math.sqrt(2), rel_tol=1e-6):
        raise NotOurs("mid_block_scale_factor is not the square root of 2")
    size = sample_size(o)
    ignored = ("flip_sin_to_cos", "freq_shift", "downsample_padding")  # of other embeddings and blocks
    o.finish(
        _PIXELS
        | dict.fromkeys(ignored, anything())
        | {"norm_eps": 1e-6, "norm_num_groups": None, "num_class_embeds": None}
    )
    return Architecture(family="ncsnpp", params=params, size=size)


def _ddpm(o: Options, common: dict[str, Any]) -> Architecture:
    paddings = {0: unet.DownPadding.AFTER, 1: unet.DownPadding.AROUND}
    orders = {False: unet.SinusoidOrder.SINES_FIRST, True: unet.SinusoidOrder.COSINES_FIRST}
    padding = o.take("downsample_padding", 1)
    if padding not in paddings:
        raise NotOurs(f"downsample_padding is {padding}")
    params = unet.Params(
        **common,
        norm_num_groups=o.take("norm_num_groups", 32),
        norm_eps=o.take("norm_eps", 1e-5),
        down_padding=paddings[padding],
        sinusoid_order=orders[o.take("flip_sin_to_cos", True)],
        frequency_shift=o.take("freq_shift", 0),
        num_classes=o.maybe("num_class_embeds", None),
    )
    size = sample_size(o)
    o.finish(_PIXELS | {"mid_block_scale_factor": [1, 1.0]})
    return Architecture(family="unet", params=params, size=size)


# -------------------------------------------------------------------------------------------------- in latents

_LATENTS = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": anything(),  # of another kind of addition
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": anything(),
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": [None, False],
    "mid_block_scale_factor": [1, 1.0],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": latent_unet.NUM_GROUPS,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": [1, 1.0],
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": anything(),  # float32 everywhere here
}


def _per_level(o: Options, name: str, default: int, levels: int) -> list[int]:
    value = o.raw(name, default)
    values = value if isinstance(value, list) else [value] * levels
    if len(values) != levels or any(type(item) is not int or item < 1 for item in values):
        raise NotOurs(f"{name} is {value!r}")
    return list(values)


def _heads(counts: list[int], channels: tuple[int, ...], attended: list[int]) -> dict[str, Any]:
    """Heads of one number, or of one size. diffusers calls the *number* ``attention_head_dim``."""
    if len(set(counts)) == 1:
        return {"num_head_channels": None, "num_heads": counts[0]}
    sizes = {channels[level] / counts[level] for level in attended}
    if len(sizes) != 1 or not min(sizes).is_integer():
        raise NotOurs(f"attention_head_dim {counts} gives heads of several sizes")
    return {"num_head_channels": int(min(sizes))}


def _unet_2d_condition(o: Options) -> Architecture:
    default = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    mirrored = tuple(name.replace("Down", "Up") for name in reversed(default))
    levels = _levels(o, "DownBlock2D", "CrossAttnDownBlock2D", default, mirrored)
    channels = o.take("block_out_channels", (320, 640, 1280, 1280))
    if len(levels) != len(channels) or any(width % channels[0] for width in channels):
        raise NotOurs(f"block_out_channels {channels} are no multiples of the first, one a block")
    depths = _per_level(o, "transformer_layers_per_block", 1, len(levels))
    counts = _per_level(o, "attention_head_dim", 8, len(levels))
    blocks = _per_level(o, "layers_per_block", 2, len(levels))
    if len(set(blocks)) != 1:
        raise NotOurs(f"layers_per_block is {blocks}")
    linear = o.take("use_linear_projection", False)
    attended = [level for level, here in enumerate(levels) if here]
    common: dict[str, Any] = {
        "in_channels": o.take("in_channels", 4),
        "out_channels": o.take("out_channels", 4),
        "model_channels": channels[0],
        "channel_mult": tuple(width // channels[0] for width in channels),
        "num_res_blocks": blocks[0],
        "transformer_depth": tuple(depth if here else 0 for depth, here in zip(depths, levels, strict=True)),
        "middle_depth": depths[-1],
        "context_dim": o.take("cross_attention_dim", 1280),
        "projection": latent_unet.Projection.LINEAR if linear else latent_unet.Projection.CONV,
        "guidance_dim": o.maybe("time_cond_proj_dim", None),
        **_heads(counts, channels, [*attended, len(levels) - 1]),
    }
    if common["in_channels"] < common["out_channels"]:
        raise NotOurs(f"in_channels {common['in_channels']} are fewer than the {common['out_channels']} out_channels")
    size, addition = sample_size(o), o.raw("addition_embed_type", None)
    id_dim, joined = o.maybe("addition_time_embed_dim", None), o.maybe("projection_class_embeddings_input_dim", None)
    o.finish(_LATENTS)
    if addition is None:
        return Architecture(family="latent_unet", params=latent_unet.Params(**common), size=size)
    if addition != "text_time" or id_dim is None or joined is None:
        raise NotOurs(f"addition_embed_type is {addition!r}")
    # The width of the pooled text is not stored; the refiner has five numbers of micro-conditioning, others six.
    count = 5 if joined - 5 * id_dim == SDXL_POOLED else 6
    if joined <= count * id_dim:
        raise NotOurs(f"projection_class_embeddings_input_dim is {joined} for {count} times {id_dim} channels")
    added: dict[str, Any] = {"pooled_dim": joined - count * id_dim, "time_ids": count, "time_id_dim": id_dim}
    return Architecture(family="sdxl", params=sdxl.Params(**common, **added), size=size)


# ------------------------------------------------------------------------------------------------- over frames


def _unet_spatio_temporal(o: Options) -> Architecture:
    default = (*["CrossAttnDownBlockSpatioTemporal"] * 3, "DownBlockSpatioTemporal")
    mirrored = tuple(name.replace("Down", "Up") for name in reversed(default))
    levels = _levels(o, "DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal", default, mirrored)
    channels = o.take("block_out_channels", (320, 640, 1280, 1280))
    if len(levels) != len(channels):
        raise NotOurs(f"{len(levels)} block types do not go with block_out_channels {channels}")
    blocks = _per_level(o, "layers_per_block", 2, len(levels))
    depths = _per_level(o, "transformer_layers_per_block", 1, len(levels))
    if len(set(blocks)) != 1 or set(depths) != {1}:
        raise NotOurs(f"layers_per_block is {blocks}, transformer_layers_per_block {depths}")
    id_dim = o.take("addition_time_embed_dim", 256)
    joined = o.take("projection_class_embeddings_input_dim", 768)
    if joined % id_dim:
        raise NotOurs(f"projection_class_embeddings_input_dim {joined} is no multiple of {id_dim} channels")
    heads = o.raw("num_attention_heads", [5, 10, 20, 20])
    if not isinstance(heads, (int, list, tuple)):
        raise NotOurs(f"num_attention_heads is {heads!r}")
    params = video_unet.Params(
        in_channels=o.take("in_channels", 8),
        out_channels=o.take("out_channels", 4),
        block_out_channels=channels,
        layers_per_block=blocks[0],
        attention_levels=tuple(level for level, here in enumerate(levels) if here),
        num_heads=(heads,) * len(levels) if isinstance(heads, int) else tuple(heads),
        context_dim=o.take("cross_attention_dim", 1024),
        time_ids=joined // id_dim,
        time_id_dim=id_dim,
    )
    size = sample_size(o)
    o.finish({"num_frames": anything()})
    return Architecture(family="video_unet", params=params, size=size)


READERS: dict[str, Callable[[Options], Architecture]] = {
    "UNet2DConditionModel": _unet_2d_condition,
    "UNet2DModel": _unet_2d,
    "UNetSpatioTemporalConditionModel": _unet_spatio_temporal,
}
