"""diffusers' configurations of transformers as ``Params``."""

from __future__ import annotations

from collections.abc import Callable

from lehr.export.backbones import dit, flux, hunyuan_dit, mmdit, pixart, single_stream, spacetime_dit
from lehr.export.checkpoints.config import Architecture, NotOurs, Options, anything, sample_size

_PLAIN = {  # of the modules that grew out of diffusers' Transformer2DModel
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "dropout": anything(),
    "norm_elementwise_affine": False,
    "norm_num_groups": anything(),  # of discrete inputs
    "upcast_attention": anything(),  # float32 everywhere here
}


def _hidden(o: Options, heads: int, head_dim: int) -> tuple[int, int]:
    num_heads = o.take("num_attention_heads", heads)
    return num_heads * o.take("attention_head_dim", head_dim), num_heads


def _learns_sigma(o: Options, channels: int, default: int | None) -> bool:
    out = o.maybe("out_channels", default) or channels
    if out not in (channels, 2 * channels):
        raise NotOurs(f"out_channels is {out} for {channels} in_channels")
    return out == 2 * channels


def _dit(o: Options) -> Architecture:
    hidden, heads = _hidden(o, 16, 72)
    channels = o.take("in_channels", 4)
    params = dit.Params(
        in_channels=channels,
        patch_size=o.take("patch_size", 2),
        hidden_size=hidden,
        depth=o.take("num_layers", 28),
        num_heads=heads,
        num_classes=o.take("num_embeds_ada_norm", 1000),
        learn_sigma=_learns_sigma(o, channels, None),
        frequency_shift=1,
        norm2_eps=o.take("norm_eps", 1e-5),
    )
    size = sample_size(o) or 32
    o.finish(_PLAIN | {"norm_type": "ada_norm_zero"})
    return Architecture(family="dit", params=params, size=size)


def _pixart(o: Options) -> Architecture:
    hidden, heads = _hidden(o, 16, 72)
    channels, patch = o.take("in_channels", 4), o.take("patch_size", 2)
    size = sample_size(o) or 128
    if o.take("cross_attention_dim", 1152) != hidden:
        raise NotOurs(f"cross_attention_dim is not the {hidden} channels of a token")
    sized = o.raw("use_additional_conditions", None)
    scale = o.raw("interpolation_scale", None)
    params = pixart.Params(
        in_channels=channels,
        patch_size=patch,
        hidden_size=hidden,
        depth=o.take("num_layers", 28),
        num_heads=heads,
        caption_channels=o.take("caption_channels", 0),
        base_size=size // patch,
        position_scale=float(max(size // 64, 1) if scale is None else scale),
        size_conditioning=size == 128 if sized is None else bool(sized),
        learn_sigma=_learns_sigma(o, channels, 8),
    )
    if not params.caption_channels:
        raise NotOurs("caption_channels is not given")
    neutral = {"norm_type": "ada_norm_single", "norm_eps": 1e-6, "num_embeds_ada_norm": anything()}
    o.finish(_PLAIN | neutral)
    return Architecture(family="pixart", params=params, size=size)


def _sd3(o: Options) -> Architecture:
    hidden, heads = _hidden(o, 18, 64)
    channels, patch = o.take("in_channels", 16), o.take("patch_size", 2)
    size = sample_size(o) or 128
    dual = o.take("dual_attention_layers", ())
    if o.take("caption_projection_dim", 1152) != hidden:
        raise NotOurs(f"caption_projection_dim is not the {hidden} channels of a token")
    if (o.maybe("out_channels", 16) or channels) != channels:
        raise NotOurs(f"out_channels is not the {channels} in_channels")
    if tuple(sorted(dual)) != tuple(range(len(dual))):
        raise NotOurs(f"dual_attention_layers is {dual}, not the first blocks")
    norms = {None: mmdit.QKNorm.NONE, "rms_norm": mmdit.QKNorm.RMS}
    norm = o.raw("qk_norm", None)
    if norm not in norms:
        raise NotOurs(f"qk_norm is {norm!r}")
    params = mmdit.Params(
        in_channels=channels,
        patch_size=patch,
        hidden_size=hidden,
        depth=o.take("num_layers", 18),
        num_heads=heads,
        context_dim=o.take("joint_attention_dim", 4096),
        pooled_dim=o.take("pooled_projection_dim", 2048),
        qk_norm=norms[norm],
        dual_attention=len(dual),
        pos_embed_max_size=o.take("pos_embed_max_size", 96),
        base_size=size // patch,
    )
    o.finish({})
    return Architecture(family="mmdit", params=params, size=size)


def _flux(o: Options) -> Architecture:
    hidden, heads = _hidden(o, 24, 128)
    channels = o.take("in_channels", 64)
    if (o.maybe("out_channels", None) or channels) != channels:
        raise NotOurs(f"out_channels is not the {channels} in_channels")
    params = flux.Params(
        in_channels=channels,
        vec_in_dim=o.take("pooled_projection_dim", 768),
        context_in_dim=o.take("joint_attention_dim", 4096),
        hidden_size=hidden,
        num_heads=heads,
        depth=o.take("num_layers", 19),
        depth_single_blocks=o.take("num_single_layers", 38),
        axes_dim=o.take("axes_dims_rope", (16, 56, 56)),
        guidance_embed=o.take("guidance_embeds", False),
    )
    o.finish({"patch_size": 1})
    return Architecture(family="flux", params=params, size=None)


def _hunyuan_dit(o: Options) -> Architecture:
    inner, heads = _hidden(o, 16, 88)
    channels, patch = o.take("in_channels", 0), o.take("patch_size", 0)
    if not channels or not patch:
        raise NotOurs("in_channels or patch_size is not given")
    if o.take("hidden_size", 1152) != inner:
        raise NotOurs(f"hidden_size is not the {inner} channels of a token")
    params = hunyuan_dit.Params(
        in_channels=channels,
        patch_size=patch,
        hidden_size=inner,
        depth=o.take("num_layers", 28),
        num_heads=heads,
        mlp_ratio=o.take("mlp_ratio", 4.0),
        clip_dim=o.take("cross_attention_dim", 1024),
        clip_tokens=o.take("text_len", 77),
        t5_dim=o.take("cross_attention_dim_t5", 2048),
        t5_tokens=o.take("text_len_t5", 256),
        pooled_dim=o.take("pooled_projection_dim", 1024),
        size_conditioning=o.take("use_style_cond_and_image_meta_size", True),
        learn_sigma=o.take("learn_sigma", True),
    )
    size = sample_size(o) or 32
    o.finish({"activation_fn": "gelu-approximate", "norm_type": "layer_norm"})
    return Architecture(family="hunyuan_dit", params=params, size=size)


def _latte(o: Options) -> Architecture:
    hidden, heads = _hidden(o, 16, 88)
    channels, patch = o.take("in_channels", 0), o.take("patch_size", 0)
    if not channels or not patch:
        raise NotOurs("in_channels or patch_size is not given")
    if o.take("cross_attention_dim", 0) != hidden:
        raise NotOurs(f"cross_attention_dim is not the {hidden} channels of a token")
    for name, needed in (("norm_type", "ada_norm_single"), ("activation_fn", "gelu-approximate")):
        if o.take(name, "") != needed:  # of these the class's defaults are other ones
            raise NotOurs(f"{name} is not {needed!r}")
    if not o.take("attention_bias", False) or o.take("norm_elementwise_affine", True):
        raise NotOurs("its attention has no bias or its norms have weights")
    if o.take("norm_eps", 1e-5) != 1e-6:
        raise NotOurs("norm_eps is not 1e-6")
    size = sample_size(o) or 64
    params = spacetime_dit.Params(
        in_channels=channels,
        patch_size=patch,
        hidden_size=hidden,
        depth=o.take("num_layers", 1),
        num_heads=heads,
        caption_channels=o.take("caption_channels", 0),
        base_size=size // patch,
        position_scale=float(max(size // 64, 1)),
        learn_sigma=_learns_sigma(o, channels, None),
    )
    if not params.caption_channels:
        raise NotOurs("caption_channels is not given")
    o.finish({"dropout": anything(), "num_embeds_ada_norm": anything(), "video_length": anything()})
    return Architecture(family="spacetime_dit", params=params, size=size)


def _ideogram4(o: Options) -> Architecture:
    hidden, heads = _hidden(o, 18, 256)
    time, rows, columns = o.take("mrope_section", (24, 20, 20))
    params = single_stream.Params(
        in_channels=o.take("in_channels", 128),
        hidden_size=hidden,
        depth=o.take("num_layers", 34),
        num_heads=heads,
        mlp_hidden=o.take("intermediate_size", 12_288),
        condition_dim=o.take("adaln_dim", 512),
        text_dim=o.take("llm_features_dim", 53_248),
        theta=o.take("rope_theta", 5_000_000.0),
        sections=(time, rows, columns),
        norm_eps=o.take("norm_eps", 1e-5),
    )
    o.finish({})
    return Architecture(family="single_stream", params=params, size=None)


READERS: dict[str, Callable[[Options], Architecture]] = {
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "Ideogram4Transformer2DModel": _ideogram4,
    "LatteTransformer3DModel": _latte,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
}
