"""LoRAs merged on the way through the exporter against diffusers' ``fuse_lora``, in every naming that is in use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers.loaders import (
    FluxLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lehr.engines.graph.tensor_file import SafetensorsFile
from lehr.export.adapters import Adapters, adapted
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.lora import METADATA, read_layers
from lehr.export.checkpoints.lora_merge import denoiser_targets, merge_into
from lehr.export.checkpoints.lora_targets import Targets, read_lora, write_adapter
from lehr.export.eager_pipeline import eager_text_to_image
from lehr.export.own_scheduler import own_tables
from lehr.export.pipelines.read import read_pipeline
from lehr.export.source import Source, resolve
from lehr.runtime.errors import InvalidInput
from lehr.runtime.lora import Applied, merged, read_adapter, split_scale
from lehr.runtime.noise import batch_normal
from lehr.runtime.text_to_image import PictureRequest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SCALE = 0.7
LEAST_DB = 60.0


# -------------------------------------------------------------------------------------------------- tiny models


def _unet(**extra: Any) -> nn.Module:
    options: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 8,
        "sample_size": 8,
    }
    return diffusers.UNet2DConditionModel(**(options | extra))


def _sdxl() -> nn.Module:
    return _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    loader: Any
    prefix: str
    inputs: Mapping[str, tuple[int, ...]]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


_TEXT = {"encoder_hidden_states": (2, 5, 12)}
MODELS = {
    "sd": Model(_unet, StableDiffusionLoraLoaderMixin, "unet", {"sample": (2, 4, 8, 8), **_TEXT}),
    "sdxl": Model(
        _sdxl,
        StableDiffusionXLLoraLoaderMixin,
        "unet",
        {"sample": (2, 4, 8, 8), **_TEXT, "text_embeds": (2, 16), "time_ids": (2, 6)},
    ),
    "sd3": Model(
        _sd3, SD3LoraLoaderMixin, "transformer", {"hidden_states": (2, 4, 8, 8), **_TEXT, "pooled_projections": (2, 10)}
    ),
    "flux": Model(
        _flux,
        FluxLoraLoaderMixin,
        "transformer",
        {
            "hidden_states": (2, 16, 8),
            **_TEXT,
            "pooled_projections": (2, 10),
            "img_ids": (16, 3),
            "txt_ids": (5, 3),
            "guidance": (2,),
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder as ``save_pretrained`` writes it for each of the tiny models."""
    root, made = tmp_path_factory.mktemp("denoisers"), {}

    def folder(name: str) -> Path:
        if name not in made:
            module = MODELS[name].make()
            rng = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for key, parameter in module.named_parameters():
                    noise = torch.randn(parameter.shape, generator=rng)
                    wide = parameter.ndim > 1
                    parameter.copy_(
                        noise / math.sqrt(parameter[0].numel()) if wide else key.endswith("weight") + noise / 4
                    )
            module.save_pretrained(root / name)
            made[name] = root / name
        return made[name]

    return folder


def source(folder: Path) -> Source:
    return resolve(str(folder), preset=None, seed=0, structure_only=False)


def ours(found: Source, model: Model) -> Tensor:
    feeds = {name: _normal(*shape, seed=k) for k, (name, shape) in enumerate(model.inputs.items())}
    with torch.no_grad():
        output: Tensor = found.runnable()(timestep=torch.full((2,), 0.6), **feeds)
    return output


def theirs(module: nn.Module, model: Model) -> Tensor:
    feeds = {name: _normal(*shape, seed=k) for k, (name, shape) in enumerate(model.inputs.items())}
    if "text_embeds" in feeds:
        feeds["added_cond_kwargs"] = {name: feeds.pop(name) for name in ("text_embeds", "time_ids")}  # type: ignore[assignment]
    with torch.no_grad():
        output: Tensor = module(timestep=torch.full((2,), 0.6), **feeds, return_dict=False)[0]
    return output


def decibels(expected: Tensor, actual: Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (expected - actual).norm().clamp_min(1e-30)))


# ---------------------------------------------------------------------------------------------------- LoRA files


def pairs(module: nn.Module, pattern: Callable[[str], bool], rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """down and up of every linear layer and convolution that ``pattern`` takes, under diffusers' names."""
    made = {}
    for k, (name, layer) in enumerate(module.named_modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not pattern(name):
            continue
        down = (rank, *layer.weight.shape[1:])
        up = (layer.weight.shape[0], rank, *[1] * (layer.weight.ndim - 2))
        fan = math.prod(down[1:])
        made[name] = _normal(*down, seed=2 * k) / math.sqrt(fan), _normal(*up, seed=2 * k + 1) / math.sqrt(rank)
    assert made
    return made


def peft_file(path: Path, layers: Mapping[str, tuple[Tensor, Tensor]], prefix: str, **metadata: Any) -> Path:
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    header = {"format": "pt"}
    if metadata:
        header[METADATA] = json.dumps({f"{prefix}.{key}": value for key, value in metadata.items()})
    save_file(tensors, path, metadata=header)
    return path


def kohya_file(path: Path, layers: Mapping[str, tuple[Tensor, Tensor]], prefix: str, alpha: float) -> Path:
    tensors = {}
    for name, (down, up) in layers.items():
        flat = f"{prefix}{name.replace('.', '_')}"
        tensors |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(alpha),
        }
    save_file(tensors, path)
    return path


def fused(folder: Path, model: Model, file: Path, scale: float = SCALE) -> nn.Module:
    """diffusers' module with the file loaded and fused."""
    module = model.make().from_pretrained(folder)
    options: dict[str, Any] = {"unet_config": module.config} if "XL" in model.loader.__name__ else {}
    if model.loader is FluxLoraLoaderMixin:
        options["return_alphas"] = True
    state, *others = model.loader.lora_state_dict(str(file), return_lora_metadata=True, **options)
    alphas, metadata = others if len(others) == 2 else (None, others[0])
    if model.prefix == "unet":
        model.loader.load_lora_into_unet(state, network_alphas=alphas, unet=module, metadata=metadata)
    elif "Flux" in model.loader.__name__:
        model.loader.load_lora_into_transformer(state, network_alphas=alphas, transformer=module, metadata=metadata)
    else:
        model.loader.load_lora_into_transformer(state, transformer=module, metadata=metadata)
    module.fuse_lora(lora_scale=scale)
    return module.eval()


def with_lora(found: Source, file: Path, scale: float = SCALE) -> Source:
    adapter, absent = read_lora(file, {"denoiser": denoiser_targets(found)})
    assert not absent
    return merge_into(found, [Applied(adapter=adapter, scale=scale)])


def attention(name: str) -> bool:
    return any(part in name for part in ("to_q", "to_k", "to_v", "to_out"))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_lora_of_every_layer_equals_diffusers_fused_one(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = folders(name), MODELS[name]
    layers = pairs(model.make(), lambda layer: "pos_embed" not in layer)
    file = peft_file(tmp_path / "style.safetensors", layers, model.prefix)
    plain = source(folder)
    expected, before = theirs(fused(folder, model, file), model), ours(plain, model)
    assert decibels(expected, before) < 30  # it changes the picture, so agreement says something
    assert decibels(expected, ours(with_lora(source(folder), file), model)) > LEAST_DB


@pytest.mark.parametrize("metadata", [{"r": 3, "lora_alpha": 5}, {"r": 3, "lora_alpha": 5, "use_rslora": True}])
def test_alpha_in_the_header_is_heeded(
    metadata: dict[str, Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = folders("sd"), MODELS["sd"]
    whole = {"peft_type": "LORA", "target_modules": ["to_q", "to_k", "to_v"], "alpha_pattern": {"attn2.to_q": 2}}
    layers = pairs(model.make(), lambda name: name.endswith(("to_q", "to_k", "to_v")))
    file = peft_file(tmp_path / "a.safetensors", layers, model.prefix, **(metadata | whole))
    expected = theirs(fused(folder, model, file), model)
    assert decibels(expected, ours(with_lora(source(folder), file), model)) > LEAST_DB


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_file_of_sd_scripts_with_diffusers_names_equals_diffusers(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = folders(name), MODELS[name]
    layers = pairs(model.make(), lambda layer: attention(layer) or "proj_" in layer or "ff.net" in layer)
    file = kohya_file(tmp_path / "k.safetensors", layers, "lora_unet_", alpha=2.0)
    expected = theirs(fused(folder, model, file), model)
    assert decibels(expected, ours(with_lora(source(folder), file), model)) > LEAST_DB


def test_a_file_of_sd_scripts_with_the_authors_names_equals_diffusers(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = folders("sdxl"), MODELS["sdxl"]
    found = source(folder)
    layers = pairs(found.module.to_empty(device="cpu"), lambda name: name.startswith(("input_", "middle_", "output_")))
    file = kohya_file(tmp_path / "k.safetensors", layers, "lora_unet_", alpha=2.0)
    expected = theirs(fused(folder, model, file), model)
    assert decibels(expected, ours(with_lora(source(folder), file), model)) > LEAST_DB


@pytest.mark.parametrize("dialect", ["sd-scripts", "xlabs"])
def test_files_with_joined_projections_of_flux_equal_diffusers(
    dialect: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = folders("flux"), MODELS["flux"]
    found = source(folder)
    layers = pairs(found.module.to_empty(device="cpu"), lambda name: "_blocks." in name, rank=4)
    file = tmp_path / "f.safetensors"
    if dialect == "sd-scripts":  # diffusers reads linear1 at the width of the published models alone
        kohya_file(file, {k: v for k, v in layers.items() if "linear1" not in k}, "lora_unet_", alpha=2.0)
    else:
        tensors = {}
        names = {
            "img_attn.qkv": "qkv_lora1",
            "txt_attn.qkv": "qkv_lora2",
            "img_attn.proj": "proj_lora1",
            "txt_attn.proj": "proj_lora2",
            "linear1": "qkv_lora",
            "linear2": "proj_lora",
        }
        for name, (down, up) in layers.items():
            block, _, part = name.partition(".")[2].partition(".")
            if part in names:
                key = f"{name.partition('.')[0]}.{block}.processor.{names[part]}"
                tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up[:48] if part == "linear1" else up}
        save_file(tensors, file)
    expected = theirs(fused(folder, model, file), model)
    assert decibels(expected, ours(with_lora(source(folder), file), model)) > LEAST_DB


@pytest.mark.parametrize("leaves", [("lora.down", "lora.up"), ("processor.{}_lora.down", "processor.{}_lora.up")])
def test_names_of_older_diffusers_mean_the_same(
    leaves: tuple[str, str], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, model = folders("sd"), MODELS["sd"]
    layers = pairs(model.make(), attention)
    new = peft_file(tmp_path / "new.safetensors", layers, "unet")
    old = {}
    for name, matrices in layers.items():
        owner, _, part = name.removesuffix(".0").rpartition(".")
        for leaf, matrix in zip(leaves, matrices, strict=True):
            old[f"unet.{owner}.{leaf.format(part)}.weight" if "{}" in leaf else f"unet.{name}.{leaf}.weight"] = matrix
    save_file(old, tmp_path / "old.safetensors")
    found = source(folder)
    a, b = (read_lora(path, {"denoiser": denoiser_targets(found)})[0] for path in (new, tmp_path / "old.safetensors"))
    assert a.changes.keys() == b.changes.keys()
    assert {name: [u.start for u in us] for name, us in a.of("denoiser").items()} == {
        name: [u.start for u in us] for name, us in b.of("denoiser").items()
    }


def test_a_middle_convolution_is_the_three_convolutions_in_turn(tmp_path: Path) -> None:
    down, mid, up = _normal(3, 5, 1, 1), _normal(3, 3, 3, 3, seed=1), _normal(7, 3, 1, 1, seed=2)
    key = "lora_unet_conv"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    save_file(tensors, tmp_path / "m.safetensors")
    (layer,) = read_layers(SafetensorsFile(tmp_path / "m.safetensors"))
    name, update = Targets("user", {"conv.weight": (7, 5, 3, 3)}).find(layer) or pytest.fail("no such layer")
    weight = merged(np.zeros((7, 5, 3, 3), np.float32), [(update, 1.0)], name)
    x = _normal(2, 5, 6, 6, seed=3)
    conv = nn.functional.conv2d
    expected = conv(conv(conv(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv(x, torch.from_numpy(weight), padding=1), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_a.dora_scale", "DoRA"),
        ("unet.a.lora_magnitude_vector.weight", "DoRA"),
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("lora_unet_a.lokr_w1", "LoKr"),
        ("lora_unet_a.diff", "whole weights"),
        ("transformer.a.lora_B.bias", "biases"),
        ("lora_unet_a.something.else", "lora_unet_a.something.else"),
    ],
)
def test_what_is_no_lora_is_refused_by_name(key: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"unet.a.lora_A.weight": _normal(2, 4), "unet.a.lora_B.weight": _normal(4, 2), key: _normal(4)}, file)
    with pytest.raises(InvalidInput, match=reason):
        read_layers(SafetensorsFile(file))


def test_layers_that_the_model_has_not_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    file = peft_file(tmp_path / "x.safetensors", {"nowhere.to_q": (_normal(2, 4), _normal(4, 2))}, "unet")
    with pytest.raises(InvalidInput, match=r"nowhere\.to_q"):
        with_lora(source(folders("sd")), file)


def test_a_lora_of_another_model_is_refused_by_shape(folders: Callable[[str], Path], tmp_path: Path) -> None:
    layers = pairs(_unet(cross_attention_dim=20), attention)
    file = peft_file(tmp_path / "x.safetensors", layers, "unet")
    with pytest.raises(InvalidInput, match=r"another model"):
        with_lora(source(folders("sd")), file)


def test_a_lora_of_text_encoders_alone_says_what_is_missing(folders: Callable[[str], Path], tmp_path: Path) -> None:
    layers = {"text_model.encoder.layers.0.self_attn.q_proj": (_normal(2, 4), _normal(4, 2))}
    file = kohya_file(tmp_path / "t.safetensors", layers, "lora_te1_", alpha=1.0)
    with pytest.raises(InvalidInput, match="text_encoder"):
        with_lora(source(folders("sd")), file)


def test_a_converted_adapter_reads_back_as_it_was(folders: Callable[[str], Path], tmp_path: Path) -> None:
    layers = pairs(MODELS["flux"].make(), lambda name: "_blocks." in name)
    file = peft_file(tmp_path / "x.safetensors", layers, "transformer")
    adapter, _ = read_lora(file, {"denoiser": denoiser_targets(source(folders("flux")))})
    write_adapter(adapter, tmp_path / "x.lora.safetensors")
    again = read_adapter(tmp_path / "x.lora.safetensors")
    assert again.name == adapter.name
    assert again.of("denoiser").keys() == adapter.of("denoiser").keys()
    for name, updates in adapter.of("denoiser").items():
        for a, b in zip(
            sorted(updates, key=lambda u: u.start),
            sorted(again.of("denoiser")[name], key=lambda u: u.start),
            strict=True,
        ):
            assert (a.start, a.scale) == (b.start, b.scale)
            assert np.array_equal(a.up, b.up)
            assert np.array_equal(a.down, b.down)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:-0.5", ("a.safetensors", -0.5)),
        ("x/y:2", ("x/y", 2.0)),
    ],
)
def test_a_scale_stands_behind_a_colon(text: str, expected: tuple[str, float]) -> None:
    assert split_scale(text) == expected


def test_a_scale_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidInput, match="expected a number"):
        split_scale("a.safetensors:much")


# ------------------------------------------------------------------------------------------ whole pipelines


PICTURE = PictureRequest(
    prompts=["a photo of the cat"], seed=5, height=32, width=32, num_inference_steps=3, guidance_scale=4.0
)


def text_pairs(encoder: nn.Module, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    chosen = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    found = pairs(encoder, lambda name: name.endswith(chosen))
    return {
        f"text_model.{name.removeprefix('text_model.')}": (down * (1 + seed), up) for name, (down, up) in found.items()
    }


@pytest.mark.parametrize(
    ("name", "dialect"), [("StableDiffusionPipeline", "peft"), ("StableDiffusionXLPipeline", "sd-scripts")]
)
def test_a_lora_of_text_encoders_too_draws_what_diffusers_draws(
    name: str, dialect: str, tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, pipe = tiny_pipeline(name), tiny_pipelines.pipeline(name)
    encoders = {part: getattr(pipe, part) for part in ("text_encoder", "text_encoder_2") if hasattr(pipe, part)}
    file, tensors = tmp_path / "whole.safetensors", {}
    layers = {"unet": pairs(pipe.unet, lambda layer: attention(layer) or "ff.net" in layer)}
    layers |= {part: text_pairs(module, k) for k, (part, module) in enumerate(encoders.items())}
    flat = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for part, found in layers.items():
        one = tmp_path / f"{part}.safetensors"
        kohya_file(one, found, flat[part], alpha=2.0) if dialect == "sd-scripts" else peft_file(one, found, part)
        tensors |= load_file(one)
    save_file(tensors, file)
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=list(layers), lora_scale=SCALE)
    latents = torch.from_numpy(batch_normal(PICTURE.seed, range(1), (4, 8, 8)))
    options = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "np"}
    theirs = np.asarray(pipe(prompt=list(PICTURE.prompts), latents=latents, **options).images).transpose(0, 3, 1, 2)

    denoiser = source(folder)
    tables = own_tables(str(folder), denoiser.spec, (3,), progress=lambda text: None)
    pipeline = read_pipeline(str(folder), denoiser)
    assert pipeline is not None
    assert tables is not None
    before = eager_text_to_image(pipeline, tables.tables)(PICTURE)
    parts = adapted(
        denoiser,
        pipeline,
        Adapters(loras=(f"{file}:{SCALE}",)),
        pickles=Pickles.REFUSED,
        progress=pytest.fail,
    )
    whole = replace(pipeline, denoiser=parts.denoiser, stages=parts.stages)
    mine = eager_text_to_image(whole, tables.tables)(PICTURE)
    as_tensor = torch.from_numpy(theirs).double()
    assert decibels(as_tensor, torch.from_numpy(before).double()) < 30
    assert decibels(as_tensor, torch.from_numpy(mine).double()) > LEAST_DB
