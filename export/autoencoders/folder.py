"""An autoencoder out of files: a diffusers folder, or a single file of its authors'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lehr.engines.graph.weights import WeightSource
from lehr.export.autoencoders import kl, maps, tiny
from lehr.export.autoencoders.stages import DECODER, ENCODER, USUAL_SIZE, Half
from lehr.export.checkpoints.config import NAME as CONFIG
from lehr.export.checkpoints.config import NotOurs, Options, anything, read_config
from lehr.export.checkpoints.files import Pickles, open_component, open_file
from lehr.export.checkpoints.mapped import Layout, MappedSource, fit, mapped, shapes
from lehr.export.checkpoints.rules import Origin
from lehr.export.stages import StageSource
from lehr.runtime.errors import InvalidInput
from lehr.runtime.pipeline_spec import LatentSpec

Params: TypeAlias = kl.Params | tiny.Params

KL, TINY = "autoencoder_kl", "autoencoder_tiny"
_MODULES: Mapping[type, tuple[type[nn.Module], type[nn.Module]]] = {  # decoder, encoder
    kl.Params: (kl.KLDecoder, kl.KLEncoder),
    tiny.Params: (tiny.TinyDecoder, tiny.TinyEncoder),
}
_GROUPS = 32  # of every norm in the authors' code; a file does not store it
_TINY_DEPTH = 32  # layers that a numbered file may have

# ------------------------------------------------------------------------------------------------ configurations


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoencoder:
    """An autoencoder read from files, as two stages. ``encoder`` is None where the files hold the decoder alone."""

    decoder: StageSource
    encoder: StageSource | None
    latent: LatentSpec


def kl_params(config: Mapping[str, Any]) -> tuple[kl.Params, LatentSpec]:
    """diffusers' ``config.json`` of an ``AutoencoderKL``.

    Raises:
        NotOurs: an option that the module does not have.
    """
    o = Options(config)
    widths = o.take("block_out_channels", (64,))
    for option, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if o.take(option, (kind,)) != (kind,) * len(widths):
            raise NotOurs(f"{option} are not {len(widths)} times {kind}")
    params = _params(
        kl.Params,
        in_channels=o.take("in_channels", 3),
        out_channels=o.take("out_channels", 3),
        latent_channels=o.take("latent_channels", 4),
        block_out_channels=widths,
        layers_per_block=o.take("layers_per_block", 1),
        norm_num_groups=o.take("norm_num_groups", 32),
        mid_attention=o.take("mid_block_add_attention", True),
        quant_conv=o.take("use_quant_conv", True),
        post_quant_conv=o.take("use_post_quant_conv", True),
    )
    latent = _latent(o, params, 0.18215)
    neutral = {"act_fn": ["silu", "swish"], "latents_mean": None, "latents_std": None}
    o.finish(neutral | dict.fromkeys(("sample_size", "force_upcast"), anything()))
    return params, latent


def tiny_params(config: Mapping[str, Any]) -> tuple[tiny.Params, LatentSpec]:
    """diffusers' ``config.json`` of an ``AutoencoderTiny``.

    Raises:
        NotOurs: an option that the module does not have.
    """
    o = Options(config)
    encoder, decoder = (o.take(f"{part}_block_out_channels", (64,) * 4) for part in ("encoder", "decoder"))
    if len({*encoder, *decoder}) != 1:
        raise NotOurs(f"block_out_channels differ: {encoder} and {decoder}")
    params = _params(
        tiny.Params,
        in_channels=o.take("in_channels", 3),
        out_channels=o.take("out_channels", 3),
        latent_channels=o.take("latent_channels", 4),
        channels=encoder[0],
        encoder_blocks=o.take("num_encoder_blocks", (1, 3, 3, 3)),
        decoder_blocks=o.take("num_decoder_blocks", (3, 3, 3, 1)),
    )
    latent = _latent(o, params, 1.0)
    unused = ("latent_magnitude", "latent_shift", "force_upcast", "block_out_channels")  # of pictures of latents
    neutral = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
    o.finish(neutral | dict.fromkeys(unused, anything()))
    return params, latent


def _params(kind: Any, **options: Any) -> Any:
    try:
        return kind(**options)
    except (ValueError, TypeError) as e:
        raise NotOurs(str(e)) from e


def _latent(o: Options, params: Params, scale: float) -> LatentSpec:
    shift = o.raw("shift_factor", None)
    if shift is not None and (isinstance(shift, bool) or not isinstance(shift, (int, float))):
        raise NotOurs(f"shift_factor is {shift!r}")
    return LatentSpec(
        channels=params.latent_channels,
        factor=params.factor,
        scaling_factor=o.take("scaling_factor", scale),
        shift_factor=0.0 if shift is None else float(shift),
    )


# ------------------------------------------------------------------------------------------------------- folders


def read_folder(folder: Path, *, size: int = USUAL_SIZE, pickles: Pickles = Pickles.REFUSED) -> Autoencoder:
    """What ``save_pretrained`` wrote of an ``AutoencoderKL`` or ``AutoencoderTiny``.

    Args:
        folder: with ``config.json``.
        size: latent cells along one side of a usual picture.
        pickles: whether pickled weights are read.

    Raises:
        InvalidInput: no such folder, damaged files, another class, an option that is not known, or weights that are
            not the configuration's.
    """
    config = read_config(folder)
    readers: Mapping[str, Callable[[Mapping[str, Any]], tuple[Params, LatentSpec]]] = {
        "AutoencoderKL": kl_params,
        "AutoencoderTiny": tiny_params,
    }
    name = config["_class_name"]
    if name not in readers:
        raise InvalidInput(
            f"{folder} holds the autoencoder {name}, which is not known here. Expected one of {', '.join(readers)}; "
            "export the denoiser alone with --denoiser-only."
        )
    try:
        params, latent = readers[name](config)
    except NotOurs as e:
        raise InvalidInput(
            f"{folder / CONFIG} describes an {name} that is not known here: {str(e).rstrip('.')}. "
            "Export the denoiser alone with --denoiser-only."
        ) from e
    return _autoencoder(params, latent, open_component(folder, pickles), f"weights of {folder.name}/", size)


def decoder_source(folder: Path, name: str = DECODER) -> StageSource:
    """The decoder of a folder's autoencoder; raises as :func:`read_folder`."""
    found = read_folder(folder).decoder
    return replace(found, spec=replace(found.spec, name=name))


def encoder_source(folder: Path, name: str = ENCODER) -> StageSource:
    """The encoder of a folder's autoencoder; raises as :func:`read_folder`."""
    found = read_folder(folder).encoder
    if found is None:  # a folder's module has both halves
        raise InvalidInput(f"{folder} holds no encoder.")
    return replace(found, spec=replace(found.spec, name=name))


def _autoencoder(params: Params, latent: LatentSpec, source: WeightSource, origin: str, size: int) -> Autoencoder:
    decoder, encoder = (_half(kind, params, latent, source, origin, size) for kind in _MODULES[type(params)])
    return Autoencoder(decoder=decoder.decoder(), encoder=encoder.encoder(), latent=latent)


def _half(kind: Any, params: Params, latent: LatentSpec, source: WeightSource, origin: str, size: int) -> Half:
    module = _hollow(kind, params)
    small, decodes = isinstance(params, tiny.Params), kind in (kl.KLDecoder, tiny.TinyDecoder)
    other = maps.ENCODER if decodes else maps.DECODER
    layouts = maps.tiny_layouts(_TINY_DEPTH, other) if small else maps.kl_layouts(params.factor.bit_length(), other)
    return Half(
        module=module,
        weights=_weights(module, source, layouts, origin),
        origin=origin,
        family=TINY if small else KL,
        latent=latent,
        channels=params.out_channels if decodes else params.in_channels,
        size=size,
        outputs=("mean",) if small else ("mean", "std"),
    )


def _hollow(kind: Any, params: Params) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = kind(params)
    return module.eval()


def _weights(module: nn.Module, source: WeightSource, layouts: Sequence[Layout], what: str) -> MappedSource:
    wanted = shapes(module)
    closest = min(layouts, key=lambda layout: fit(source, wanted, layout).problems)
    return mapped(source, wanted, closest, what=f"{type(module).__name__} ({what})")


# -------------------------------------------------------------------------------------------------- single files


def read_file(source: WeightSource, latent: LatentSpec, *, size: int = USUAL_SIZE) -> Autoencoder:
    """The autoencoder in a file under its authors' names: a whole pipeline, ``ae.safetensors``, a TAESD decoder.

    Args:
        source: the file.
        latent: what the family of pipelines does to a latent; files do not say it.
        size: latent cells along one side of a usual picture.

    Raises:
        InvalidInput: there is none in it, or it is not what ``latent`` expects.
    """
    names = frozenset(source.names())
    if names and all(name[0].isdigit() for name in names):
        return _numbered(source, latent, size)
    prefix = next((p for p in (*maps.PREFIXES, "") if f"{p}decoder.conv_in.weight" in names), None)
    if prefix is None:
        raise InvalidInput(
            f"{source} holds no autoencoder: none of its {len(names)} tensors is 'decoder.conv_in.weight'. Name a file "
            "or a diffusers folder that holds one with --vae."
        )
    inside = {name.removeprefix(prefix): Origin(parts=((name,),)) for name in names if name.startswith(prefix)}
    view = MappedSource(source, inside)
    params = params_of({name: view.info(name).shape for name in inside}, str(source))
    _check_latent(params, latent, source)
    return _autoencoder(params, latent, view, f"autoencoder of {source}", size)


def params_of(stored: Mapping[str, tuple[int, ...]], name: str) -> kl.Params:
    """The architecture that names and shapes of CompVis' layout give away.

    Raises:
        InvalidInput: they are of no such autoencoder.
    """

    def first(key: str) -> int:
        if key not in stored or not stored[key]:
            raise InvalidInput(f"{name} holds no whole autoencoder: {key!r} is missing. Download it again.")
        return stored[key][0]

    levels = len({key.split(".")[2] for key in stored if key.startswith("decoder.up.")})
    blocks = len({key.split(".")[4] for key in stored if key.startswith("decoder.up.0.block.")})
    entry = stored.get("decoder.conv_in.weight", ())
    if levels < 1 or blocks < 2 or len(entry) != 4:
        raise InvalidInput(
            f"{name} holds an autoencoder, but not under CompVis' names (decoder.up.0.block.0…). Expected the file of "
            "a whole pipeline or of its autoencoder alone; a folder that diffusers wrote is read as it is."
        )
    try:
        return kl.Params(
            in_channels=stored.get("encoder.conv_in.weight", (0, 3))[1],
            out_channels=first("decoder.conv_out.weight"),
            latent_channels=entry[1],
            block_out_channels=tuple(first(f"decoder.up.{i}.block.0.conv1.weight") for i in range(levels)),
            layers_per_block=blocks - 1,
            norm_num_groups=_GROUPS,
            mid_attention="decoder.mid.attn_1.q.weight" in stored,
            quant_conv="quant_conv.weight" in stored,
            post_quant_conv="post_quant_conv.weight" in stored,
        )
    except (ValueError, IndexError) as e:
        raise InvalidInput(f"the autoencoder of {name} is not known here: {e}") from e


def _numbered(source: WeightSource, latent: LatentSpec, size: int) -> Autoencoder:
    """TAESD's files: a stack of numbered layers, the decoder's beginning with the bound on the latent."""
    stored = {name: source.info(name).shape for name in source.names()}
    if "1.weight" not in stored:
        raise InvalidInput(
            f"{source} is the encoder of a tiny autoencoder. Expected its decoder, or the folder that holds both."
        )
    channels, held = stored["1.weight"][:2]
    up = sorted(int(name.split(".")[0]) for name in stored if name.endswith(".weight") and name.count(".") == 1)
    strided = up[1:-1]  # convolutions that follow a doubling; the last one makes the picture
    starts, ends = [3, *(i + 1 for i in strided)], [*(i - 1 for i in strided), up[-1]]
    params = tiny.Params(
        out_channels=stored[f"{up[-1]}.weight"][0],
        latent_channels=held,
        channels=channels,
        encoder_blocks=(1,) * len(starts),
        decoder_blocks=tuple(end - start for start, end in zip(starts, ends, strict=True)),
        pooled="3.pool.0.weight" in stored,
    )
    _check_latent(params, latent, source)
    own = replace(latent, scaling_factor=1.0, shift_factor=0.0)  # distilled from scaled latents
    half = _half(tiny.TinyDecoder, params, own, source, f"decoder of {source}", size)
    return Autoencoder(decoder=half.decoder(), encoder=None, latent=own)


def _check_latent(params: Params, latent: LatentSpec, source: WeightSource) -> None:
    if (params.latent_channels, params.factor) != (latent.channels, latent.factor):
        raise InvalidInput(
            f"the autoencoder of {source} has {params.latent_channels} latent channels and {params.factor} pixels a "
            f"cell, the pipeline's denoiser expects {latent.channels} and {latent.factor}. They do not belong together."
        )


def open_autoencoder(
    path: Path, latent: LatentSpec, *, size: int = USUAL_SIZE, pickles: Pickles = Pickles.REFUSED
) -> Autoencoder:
    """What a user names with ``--vae``: a folder, which says its scaling itself, or a file.

    Raises:
        InvalidInput: it cannot be used, or does not belong to a denoiser of such latents.
    """
    if not path.is_dir():
        return read_file(open_file(path, pickles), latent, size=size)
    found = read_folder(path, size=size, pickles=pickles)
    if (found.latent.channels, found.latent.factor) != (latent.channels, latent.factor):
        raise InvalidInput(
            f"the autoencoder of {path} has {found.latent.channels} latent channels and {found.latent.factor} pixels a "
            f"cell, the pipeline's denoiser expects {latent.channels} and {latent.factor}. They do not belong together."
        )
    return found
