"""Published LoRA files as layers: every naming that is in use, before anything is known of the model it is for.

    diffusers, peft     unet.down_blocks.0.….to_q.lora_A.weight, transformer.…, text_encoder.…, base_model.model.…
    older diffusers     unet.….attn1.processor.to_q_lora.down.weight, ….lora.down.weight, ….lora_linear_layer.…
    sd-scripts, LyCORIS lora_unet_down_blocks_0_…_to_q.lora_down.weight with .alpha, lora_te_, lora_te1_, lora_te2_
    authors' names      lora_unet_input_blocks_4_1_…, lora_unet_double_blocks_0_img_attn_qkv, diffusion_model.…
    XLabs               double_blocks.0.processor.qkv_lora1.down.weight

A convolution of rank r is a k x k convolution into r channels and a 1 x 1 one out of them; LyCORIS' ``lora_mid`` puts
the k x k one between two 1 x 1. What is no LoRA (DoRA, LoHa, LoKr, differences of whole weights) is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.engines.graph.tensor_file import SafetensorsFile
from lehr.export.checkpoints.mapped import listed
from lehr.runtime.errors import InvalidInput
from lehr.runtime.lora import DENOISER

Array = npt.NDArray[Any]

METADATA = "lora_adapter_metadata"  # diffusers' key in the header: peft's configuration as JSON

# How a component is called where names keep their dots, and where dots have become underscores.
_DOTTED = (
    ("text_encoder_3.", ("text_encoder_3",)),
    ("text_encoder_2.", ("text_encoder_2",)),
    ("text_encoder.", ("text_encoder",)),
    ("unet.", (DENOISER,)),
    ("transformer.", (DENOISER,)),
    ("base_model.model.", (DENOISER,)),
    ("model.diffusion_model.", (DENOISER,)),
    ("diffusion_model.", (DENOISER,)),
)
_FLAT = (
    ("lora_unet_", (DENOISER,)),
    ("lora_transformer_", (DENOISER,)),
    ("lora_te1_", ("text_encoder",)),
    ("lora_te2_", ("text_encoder_2",)),
    ("lora_te3_", ("text_encoder_3", "text_encoder_2")),  # the third of SD3's, and FLUX's T5, which diffusers calls 2
    ("lora_te_", ("text_encoder",)),
)

_PARTS: tuple[tuple[re.Pattern[str], Mapping[str, str]], ...] = (  # (pattern, the part of each of its words)
    (re.compile(r"(?P<name>.+)\.lora_(?P<part>A|B)(?:\.(?!weight)[\w-]+)?\.weight"), {"A": "down", "B": "up"}),
    (re.compile(r"(?P<name>.+)\.lora_(?P<part>down|up|mid)\.weight"), {}),
    (re.compile(r"(?P<name>.+)\.(?:lora|lora_linear_layer)\.(?P<part>down|up)\.weight"), {}),
    (re.compile(r"(?P<name>.+_lora[12]?)\.(?P<part>down|up)\.weight"), {}),
    (re.compile(r"(?P<name>.+)\.(?P<part>alpha)"), {}),
)
_REFUSED = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA, which scales columns by their norm"),
    (re.compile(r"\.hada_[wt]\d"), "LoHa, a product of two low-rank matrices"),
    (re.compile(r"\.lokr_[wt]\d"), "LoKr, a Kronecker product"),
    (re.compile(r"\.oft_|\.boft_|oft_blocks"), "OFT, a rotation of the weights"),
    (re.compile(r"\.ia3_|\.on_input$"), "IA3, a scaling of activations"),
    (re.compile(r"\.diff(_b)?$|\.w_norm$|\.b_norm$"), "differences of whole weights"),
    (re.compile(r"\.lora_B(\.[\w-]+)?\.bias$"), "an adapter of biases"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayer:
    """The low-rank change of one layer, under the file's name for it.

    Attributes:
        components: those it may belong to, the likeliest first.
        name: the layer's, without what names the component; dots may have become underscores.
        up: (R, r).
        down: (r, C): a convolution's kernel is flattened.
        kernel: the sizes behind the input channels, () for a linear layer or a 1 x 1 convolution.
        scale: alpha / r.
    """

    components: tuple[str, ...]
    name: str
    up: Array
    down: Array
    kernel: tuple[int, ...]
    scale: float


@dataclass(slots=True)
class _Found:
    keys: dict[str, str] = field(default_factory=dict)  # part -> key


def read_layers(file: SafetensorsFile) -> list[LoraLayer]:
    """Every layer of a LoRA file.

    Raises:
        InvalidInput: another kind of adapter, keys of no naming that is known, a layer without its counterpart, or
            tensors of shapes that do not go together.
    """
    groups: dict[str, _Found] = {}
    unknown = []
    for key in file.names():
        refused = next((why for pattern, why in _REFUSED if pattern.search(key)), None)
        if refused is not None:
            raise InvalidInput(
                f"{file} is no LoRA: {key!r} is {refused}. Expected pairs of low-rank matrices alone. Merge it in the "
                "tool that it was trained with, and export the merged model."
            )
        match = next(((words, m) for pattern, words in _PARTS if (m := pattern.fullmatch(key))), None)
        if match is None:
            unknown.append(key)
            continue
        words, m = match
        part = str(m["part"])
        groups.setdefault(m["name"], _Found()).keys[words.get(part, part)] = key
    if unknown:
        raise InvalidInput(
            f"{file} holds {len(unknown)} tensors of no LoRA naming that is known: {listed(sorted(unknown))}. Expected "
            "the names of diffusers, peft, sd-scripts or the model's authors."
        )
    scale = _scales(file)
    layers = [layer for name, found in groups.items() for layer in _layers(file, name, found.keys, scale)]
    if not layers:
        raise InvalidInput(
            f"{file} holds no LoRA layer. Expected pairs such as NAME.lora_A.weight, NAME.lora_B.weight."
        )
    return layers


def _layers(
    file: SafetensorsFile, name: str, keys: Mapping[str, str], scale: Callable[[str, int], float]
) -> Iterator[LoraLayer]:
    if missing := {"up", "down"} - set(keys):
        raise InvalidInput(f"{file}: layer {name!r} has {sorted(keys)} and lacks {sorted(missing)}. Download it again.")
    up, down = file.read(keys["up"]), file.read(keys["down"])
    rank = down.shape[0] if down.ndim else 0
    if min(up.ndim, down.ndim) < 2 or any(size != 1 for size in up.shape[2:]) or up.shape[1] != rank or not rank:
        raise InvalidInput(
            f"{file}: layer {name!r} has matrices of shapes {up.shape} and {down.shape}, of no one rank."
        )
    kernel: tuple[int, ...] = down.shape[2:]
    flat = down.reshape(rank, -1)
    if "mid" in keys:
        mid = file.read(keys["mid"])
        if mid.ndim != 4 or mid.shape[:2] != (rank, rank) or flat.shape[1] != down.shape[1]:
            raise InvalidInput(f"{file}: layer {name!r} has a middle of shape {mid.shape} for rank {rank}.")
        kernel = mid.shape[2:]
        wide = np.einsum("rskl,si->rikl", mid.astype(np.float32), flat.astype(np.float32))
        flat = wide.reshape(rank, -1)
    if "alpha" in keys:
        alpha = file.read(keys["alpha"])
        if alpha.size != 1:
            raise InvalidInput(f"{file}: {keys['alpha']!r} has shape {alpha.shape}, expected one number.")
        factor = float(alpha.astype(np.float64).reshape(())) / rank
    else:
        factor = scale(name, rank)
    parts = up.reshape(len(up), rank)
    for components, layer, share in _named(name, parts):
        yield LoraLayer(
            components=components,
            name=layer,
            up=share,
            down=flat,
            kernel=() if all(size == 1 for size in kernel) else kernel,
            scale=factor,
        )


# ---------------------------------------------------------------------------------------------------- names


def _named(name: str, up: Array) -> Iterator[tuple[tuple[str, ...], str, Array]]:
    """The layers that a file's name stands for: one, or the three projections of a XLabs single block."""
    flat = next(((prefix, found) for prefix, found in _FLAT if name.startswith(prefix)), None)
    if flat is not None:
        yield flat[1], name.removeprefix(flat[0]), up
        return
    prefix, components = next((row for row in _DOTTED if name.startswith(row[0])), ("", (DENOISER,)))
    layer = name.removeprefix(prefix)
    if match := re.fullmatch(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora([12])", layer):
        yield components, f"{match[1]}.{'img' if match[3] == '1' else 'txt'}_attn.{match[2]}", up
    elif match := re.fullmatch(r"single_blocks\.(\d+)\.processor\.proj_lora", layer):
        yield components, f"single_blocks.{match[1]}.linear2", up
    elif match := re.fullmatch(r"single_blocks\.(\d+)\.processor\.qkv_lora", layer):
        if len(up) % 3:
            raise InvalidInput(f"layer {name!r} has {len(up)} rows for three projections. Download the file again.")
        for part, share in zip("qkv", np.split(up, 3), strict=True):  # the first rows of a joined projection
            yield components, f"single_transformer_blocks.{match[1]}.attn.to_{part}", share
    else:
        yield components, _of_processor(layer, components), up


def _of_processor(layer: str, components: tuple[str, ...]) -> str:
    """``attn1.processor.to_out_lora``, diffusers' names before peft, as the layer that is meant."""
    match = re.fullmatch(r"(.+?)(?:\.processor)?\.(to|add)_(\w+?)_lora", layer)
    if match is None:
        return layer
    owner, kind, part = match.groups()
    if components[0] != DENOISER:
        return f"{owner}.{part}_proj"
    if kind == "add":
        return f"{owner}.add_{part}"
    return f"{owner}.to_out.0" if part == "out" else f"{owner}.to_{part}"


def _scales(file: SafetensorsFile) -> Callable[[str, int], float]:
    """alpha / r of layers without an alpha of their own, from peft's configuration if the header holds it."""
    text = file.metadata.get(METADATA)
    if text is None:
        return lambda name, rank: 1.0
    try:
        config = json.loads(text)
    except ValueError as e:
        raise InvalidInput(f"{file}: {METADATA} in its header is no JSON ({e}). Save it again.") from e
    if not isinstance(config, dict):
        raise InvalidInput(f"{file}: {METADATA} in its header is a JSON {type(config).__name__}, expected an object.")

    def scale(name: str, rank: int) -> float:
        prefix = next((row[0] for row in _DOTTED if name.startswith(row[0])), "")
        own = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        if own.get("use_dora"):
            raise InvalidInput(
                f"{file} is a DoRA by its header, which scales columns by their norm; only LoRA is read."
            )
        layer = name.removeprefix(prefix)
        patterns = own.get("alpha_pattern") or {}
        matching = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
        alpha = next(matching, own.get("lora_alpha", rank))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise InvalidInput(f"{file}: the header gives {layer!r} the alpha {alpha!r}, expected a number.")
        return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)

    return scale
