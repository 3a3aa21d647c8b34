"""Checkpoints: tiny random models written by diffusers, read back by us, in folders and in single files.

A single file is made from the folder's module by the family's key map, read backwards, so both hold the same
weights. Single files are recognised among presets; a tiny preset is registered for each test that reads one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lehr import cli
from lehr.export.backbones import adm, dit, presets
from lehr.export.backbones.preset import Preset
from lehr.export.checkpoints import config as configs
from lehr.export.checkpoints.conventions import conventions
from lehr.export.checkpoints.diffusers_module import derive
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.folder import from_folder
from lehr.export.checkpoints.layouts import layouts, recognise
from lehr.export.checkpoints.rules import Transform, origin
from lehr.export.graphs import Cut
from lehr.export.package import Options, export
from lehr.export.source import Route, resolve
from lehr.runtime.errors import InvalidInput, MissingExtra, UnknownName
from lehr.runtime.golden import Tier
from lehr.runtime.paths import EDM, VE, VP, BetaSchedule, LinearFlow
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, SCORE, V_PREDICTION
from lehr.runtime.spec import DType, ModelSpec, Varies

TOLERANCE = 1e-4  # relative to the largest output, float32

# -------------------------------------------------------------------------------------------- one model a family


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A small configuration of one of diffusers' classes and the family it belongs to."""

    kind: str
    family: str
    config: Mapping[str, Any]
    added: tuple[str, ...] = ()  # inputs that diffusers wants in a dictionary
    shared: bool = False  # diffusers' DiT: embedders made equal in all blocks


_UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_LATENT = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
_TOKENS = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}

TINY = {
    "unet": Tiny(
        kind="UNet2DModel",
        family="unet",
        config=_UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
    ),
    "ncsnpp": Tiny(
        kind="UNet2DModel",
        family="ncsnpp",
        config=_UNET
        | {
            "down_block_types": ("SkipDownBlock2D", "SkipDownBlock2D"),
            "up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D"),
            "time_embedding_type": "fourier",
            "norm_eps": 1e-6,
            "norm_num_groups": None,
            "mid_block_scale_factor": 2**0.5,
            "attention_head_dim": None,
        },
    ),
    "latent_unet": Tiny(kind="UNet2DConditionModel", family="latent_unet", config=_LATENT),
    "sdxl": Tiny(
        kind="UNet2DConditionModel",
        family="sdxl",
        config=_LATENT
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 7 + 6 * 4,
        },
        added=("text_embeds", "time_ids"),
    ),
    "dit": Tiny(
        kind="DiTTransformer2DModel",
        family="dit",
        config=_TOKENS | {"in_channels": 3, "out_channels": 6, "num_embeds_ada_norm": 7},
        shared=True,
    ),
    "pixart": Tiny(
        kind="PixArtTransformer2DModel",
        family="pixart",
        config=_TOKENS
        | {
            "in_channels": 3,
            "out_channels": 6,
            "cross_attention_dim": 24,
            "caption_channels": 20,
            "use_additional_conditions": True,
        },
        added=("resolution", "aspect_ratio"),
    ),
    "mmdit": Tiny(
        kind="SD3Transformer2DModel",
        family="mmdit",
        config=_TOKENS
        | {
            "in_channels": 5,
            "out_channels": 5,
            "num_layers": 3,
            "joint_attention_dim": 20,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 13,
            "pos_embed_max_size": 11,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 1),
        },
    ),
    "flux": Tiny(
        kind="FluxTransformer2DModel",
        family="flux",
        config={
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 10,
            "num_attention_heads": 3,
            "joint_attention_dim": 20,
            "pooled_projection_dim": 13,
            "axes_dims_rope": (4, 2, 4),
            "guidance_embeds": True,
        },
    ),
}


def make(tiny: Tiny, **changes: Any) -> nn.Module:
    """diffusers' module with random weights, those that start at zero or one included."""
    module = getattr(diffusers, tiny.kind)(**{**tiny.config, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        scale = (parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    if tiny.shared:
        first, *others = module.transformer_blocks
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return module


def feeds_of(spec: ModelSpec, batch: int = 3, **sizes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = tensor.sizes(spec.default_sizes(batch=batch) | sizes)
        if tensor.name == "class_labels":
            feeds[tensor.name] = rng.integers(0, spec.num_classes, shape)
        elif tensor.dtype is DType.INT64:
            feeds[tensor.name] = np.ones(shape, np.int64)
        else:
            values = rng.uniform(0.1, 0.9, shape) if tensor is spec.timestep else rng.standard_normal(shape)
            if tensor is spec.timestep and spec.path.first_timestep > 1:
                values = values * spec.path.first_timestep
            if tensor.name == "time_ids":
                values = np.round(100 * np.abs(values))
            feeds[tensor.name] = values.astype(np.float32)
    return feeds


def expected(tiny: Tiny, module: nn.Module, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in feeds.items()}
    if tiny.added:
        tensors["added_cond_kwargs"] = {name: tensors.pop(name) for name in tiny.added}
    if tiny.kind == "DiTTransformer2DModel" and "sample" in tensors:
        tensors["hidden_states"] = tensors.pop("sample")
    with torch.no_grad():
        return module(**tensors, return_dict=False)[0].numpy()


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def run(bundle: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(bundle / "model" / "step.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))[0]


def exported(source: Path, bundle: Path, **options: Any) -> Path:
    options = {"tier": Tier.NONE, "cut": Cut.NONE, **options}
    export(str(source), bundle, Options(**options), progress=lambda text: None)
    return bundle


def digests(bundle: Path) -> dict[str, str]:
    listed = json.loads((bundle / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in listed.items()}


# ----------------------------------------------------------------------------------------------- single files


def original(folder: Path, family: str) -> dict[str, Tensor]:
    """The folder's weights as the authors' single file names them."""
    found = from_folder(folder, name=None, pickles=Pickles.REFUSED)
    ours = {name: torch.from_numpy(np.array(found.weights.read(name))) for name in found.weights.names()}
    layout = layouts(family, found.module.params)[0]
    assert layout.name == "original"
    stored: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        source = origin(layout.rules, name, ())
        assert len(source.keys) == 1, "no original layout is split further than ours"
        if source.transform is None:
            stored[source.keys[0]] = tensor.contiguous()
        elif source.transform is Transform.GRID_ROWS:
            rows, columns = ours["pos_embed.rows"], ours["pos_embed.columns"]
            grid = [[torch.cat([column, row]) for column in columns] for row in rows]
            stored[source.keys[0]] = torch.stack([torch.stack(line) for line in grid]).flatten(0, 1)[None]
    return stored


EXTRAS = {  # what single files hold besides the denoiser
    "latent_unet": ("betas", "first_stage_model.decoder.conv_in.weight", "cond_stage_model.transformer.x.weight"),
    "sdxl": ("denoiser.sigmas", "first_stage_model.decoder.conv_in.weight", "conditioner.embedders.0.x.weight"),
    "mmdit": ("first_stage_model.decoder.conv_in.weight", "text_encoders.clip_l.transformer.x.weight"),
    "dit": ("pos_embed",),
    "pixart": ("pos_embed", "y_embedder.y_embedding"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module]]:
    """Each family's folder and module, made once."""
    made: dict[str, tuple[Path, nn.Module]] = {}

    def get(name: str) -> tuple[Path, nn.Module]:
        if name not in made:
            module, folder = make(TINY[name]), tmp_path_factory.mktemp("folders") / name
            module.save_pretrained(folder)
            made[name] = folder, module
        return made[name]

    return get


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Preset]:
    """Make what a folder holds a preset."""

    def add(folder: Path, name: str | None = None) -> Preset:
        found = from_folder(folder, name=None, pickles=Pickles.REFUSED)
        name = name or found.spec.name
        spec = replace(found.spec, name=name)
        preset = Preset(params=found.module.params, build=type(found.module), spec=spec)
        monkeypatch.setitem(presets(), name, preset)
        return preset

    return add


def single_file(name: str, folder: Path, path: Path) -> Path:
    tensors = original(folder, TINY[name].family)
    save_file(tensors | {key: torch.zeros(3) for key in EXTRAS.get(name, ())}, path)
    return path


def sizes(name: str) -> dict[str, int]:
    """Of feeds: not the configuration's, but for diffusers' DiT, which takes squares of one size only."""
    return {"dit": {}, "flux": {"image_tokens": 15}}.get(name, {"height": 12})


def eager(module: nn.Module, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).numpy()


@pytest.mark.parametrize("name", TINY)
def test_a_folder_and_a_single_file_are_one_model_which_computes_what_diffusers_does(
    name: str, written: Any, register: Any, tmp_path: Path
) -> None:
    """One graph and one weights file follow: a graph depends on parameters and spec alone (test_trace)."""
    tiny, (folder, module) = TINY[name], written(name)
    register(folder)
    single = single_file(name, folder, tmp_path / "single.safetensors")
    first, second = (resolve(str(path), preset=None, seed=0, structure_only=False) for path in (folder, single))
    assert first.route is second.route is Route.CHECKPOINT
    assert first.spec == second.spec
    assert first.spec.family == tiny.family
    assert first.module.params == second.module.params
    assert first.weights is not None
    assert second.weights is not None
    for key in first.module.state_dict():
        assert first.weights.info(key) == second.weights.info(key)
        assert np.array_equal(first.weights.read(key), second.weights.read(key))
    feeds = feeds_of(first.spec, **sizes(name))
    assert error(eager(first.runnable(), feeds), expected(tiny, module, feeds)) <= TOLERANCE


@pytest.mark.parametrize("name", ["dit", *(pytest.param(n, marks=pytest.mark.long) for n in TINY if n != "dit")])
def test_a_folder_and_a_single_file_give_the_same_bundle(
    name: str, written: Any, register: Any, tmp_path: Path
) -> None:
    folder, module = written(name)
    spec = register(folder).spec
    single = single_file(name, folder, tmp_path / "single.safetensors")
    bundles = [exported(source, tmp_path / f"{source.stem}.lehr") for source in (folder, single)]
    first, second = (digests(bundle) for bundle in bundles)
    assert first.keys() >= {"model/step.onnx", "model/weights.safetensors"}
    assert first == second
    feeds = feeds_of(spec, **sizes(name))
    assert error(run(bundles[0], feeds), expected(TINY[name], module, feeds)) <= TOLERANCE


def test_an_original_adm_file_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = adm.Params(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_downsampling=(2,))
    spec = adm.spec("tiny-adm", params, size=8, classes=1000, path=VP(), prediction=EPSILON)
    chosen = Preset(params=params, build=adm.ADM, spec=spec)
    monkeypatch.setitem(presets(), "tiny-adm", chosen)
    save_file(chosen.module().state_dict(), tmp_path / "adm.safetensors")
    found = resolve(str(tmp_path / "adm.safetensors"), preset=None, seed=0, structure_only=False)
    assert (found.spec.name, found.route) == ("tiny-adm", Route.CHECKPOINT)


def test_a_file_in_our_own_layout_is_recognised(written: Any, register: Any, tmp_path: Path) -> None:
    folder, _ = written("mmdit")
    register(folder)
    found = from_folder(folder, name=None, pickles=Pickles.REFUSED)
    ours = {name: torch.from_numpy(np.array(found.weights.read(name))) for name in found.weights.names()}
    save_file(ours, tmp_path / "ours.safetensors")
    source = resolve(str(tmp_path / "ours.safetensors"), preset=None, seed=0, structure_only=False)
    assert source.spec == found.spec
    assert "lehr layout" in source.origin


def test_shipped_weights_are_recognised_without_a_preset() -> None:
    from lehr.export.source import shipped_weights

    source = resolve(str(shipped_weights("digits-dit")), preset=None, seed=0, structure_only=False)
    assert source.spec.name == "digits-dit"


@pytest.mark.parametrize("name", ["flux", "mmdit", "dit", "pixart", "sdxl"])
def test_a_denoiser_is_found_inside_a_file_with_a_whole_pipeline(
    name: str, written: Any, register: Any, tmp_path: Path
) -> None:
    folder, _ = written(name)
    register(folder)
    alone = from_folder(folder, name=None, pickles=Pickles.REFUSED)
    stored = original(folder, TINY[name].family)
    prefix = "model.diffusion_model."
    inside = {key if key.startswith(prefix) else prefix + key: tensor for key, tensor in stored.items()}
    others = {f"{part}.x.weight": torch.zeros(2) for part in ("vae.decoder", "text_encoders.t5xxl", "cond_stage_model")}
    if name in ("dit", "flux", "pixart"):
        others["vae.step"] = torch.zeros(1, dtype=torch.int64)
    if name in ("mmdit", "sdxl"):  # published so, with parts under these names
        others = {f"{key}.x.weight": torch.zeros(2) for key in ("first_stage_model", "conditioner", "text_encoders")}
        others.pop("conditioner.x.weight" if name == "mmdit" else "text_encoders.x.weight")
    save_file(inside | others, tmp_path / "all.safetensors")
    found = resolve(str(tmp_path / "all.safetensors"), preset=None, seed=0, structure_only=False)
    assert found.route is Route.CHECKPOINT
    assert found.weights is not None
    for key in alone.module.state_dict():
        assert np.array_equal(found.weights.read(key), alone.weights.read(key))
    named = resolve(str(tmp_path / "all.safetensors"), preset=found.spec.name, seed=0, structure_only=False)
    assert named.origin.partition(";")[0] == found.origin.partition(";")[0]


def test_what_is_missing_in_a_whole_pipeline_is_told_of_the_denoiser(
    written: Any, register: Any, tmp_path: Path
) -> None:
    folder, _ = written("flux")
    name = register(folder).spec.name
    stored = {f"model.diffusion_model.{key}": tensor for key, tensor in original(folder, "flux").items()}
    del stored["model.diffusion_model.img_in.weight"]
    save_file(stored | {"vae.x": torch.zeros(2)}, tmp_path / "all.safetensors")
    with pytest.raises(InvalidInput, match=r"missing \(1\): img_in\.weight\. "):
        resolve(str(tmp_path / "all.safetensors"), preset=name, seed=0, structure_only=False)


@pytest.mark.parametrize("name", ["latent_unet", "sdxl"])
def test_an_inpainting_folder_samples_four_channels_and_takes_the_mask_as_a_condition(
    name: str, tmp_path: Path
) -> None:
    tiny = TINY[name]
    module = make(tiny, in_channels=9)
    module.save_pretrained(tmp_path / "inpainting")
    found = from_folder(tmp_path / "inpainting", name=None, pickles=Pickles.REFUSED)
    assert found.route == "checkpoint"
    assert found.spec.sample.shape[1] == 4
    (joined,) = (tensor for tensor in found.spec.inputs if tensor.name == "sample_cond")
    assert (joined.shape, joined.varies) == (("batch", 5, "height", "width"), Varies.PROMPT)
    source = resolve(str(tmp_path / "inpainting"), preset=None, seed=0, structure_only=False)
    feeds = feeds_of(found.spec, height=12)
    theirs = {name: value for name, value in feeds.items() if name != "sample_cond"}
    theirs["sample"] = np.concatenate([feeds["sample"], feeds["sample_cond"]], axis=1)
    assert error(eager(source.runnable(), feeds), expected(tiny, module, theirs)) <= TOLERANCE


def test_joined_channels_of_another_architecture_are_refused() -> None:
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 7, "out_channels": 4}
    with pytest.raises(InvalidInput, match=r"takes 7 channels and returns 4.*FACTORY"):
        derive(diffusers.UNet2DConditionModel, config, None)


# --------------------------------------------------------------------------------------- shards, damaged, foreign


def test_a_sharded_folder_is_one_checkpoint(written: Any, tmp_path: Path) -> None:
    folder, module = written("latent_unet")
    module.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (from_folder(f, name=None, pickles=Pickles.REFUSED) for f in (folder, tmp_path / "sharded"))
    assert whole.spec == sharded.spec
    for name in whole.weights.names():
        assert np.array_equal(whole.weights.read(name), sharded.weights.read(name))


def altered(folder: Path, copy: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(folder, copy)
    file = copy / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file)
    return copy


def test_what_does_not_fit_is_listed_to_ten_and_counted(written: Any, tmp_path: Path) -> None:
    folder, _ = written("latent_unet")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        lost = [key for key in tensors if ".attn1." in key]
        kept = {key: tensor for key, tensor in tensors.items() if key not in lost}
        return kept | {f"surplus.{i}": torch.zeros(1) for i in range(13)} | {"conv_in.bias": torch.zeros(5)}

    count = sum(".attn1." in key for key in load_file(folder / "diffusion_pytorch_model.safetensors"))
    with pytest.raises(InvalidInput) as raised:
        from_folder(altered(folder, tmp_path / "x", change), name=None, pickles=Pickles.REFUSED)
    text = str(raised.value)
    assert f"missing ({count})" in text
    assert f"and {count - 10} more" in text
    assert "unexpected (13): surplus.0" in text
    assert "and 3 more" in text
    assert "conv_in.bias is float32 (5,), expected floating point (32,)" in text


def test_integers_are_no_weights(written: Any, tmp_path: Path) -> None:
    folder, _ = written("unet")
    copy = altered(folder, tmp_path / "x", lambda tensors: tensors | {"conv_in.bias": torch.zeros(8, dtype=torch.int8)})
    with pytest.raises(InvalidInput, match=r"conv_in\.bias is int8 \(8,\), expected floating point"):
        from_folder(copy, name=None, pickles=Pickles.REFUSED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "no readable configuration"),
        (b"[1]", "expected an object"),
        (b"{}", "names no class"),
        (b'{"_class_name": "UNet99Model"}', "unknown diffusers class"),
        (b'{"_class_name": "__builtins__"}', "unknown diffusers class"),
        (b'{"_class_name": "DiffusionPipeline"}', "is no model of diffusers"),
        (b'{"_class_name": "AutoencoderKL"}', "AutoencoderKL is no denoiser"),
        (b'{"_class_name": "HunyuanDiT2DModel"}', "image_rotary_emb"),
        (b'{"_class_name": "UNet2DModel", "act_fn": "mish", "sample_size": -1}', "sample_size is -1"),
        (b'{"_class_name": "UNet2DModel", "act_fn": "mish"}', "sample_size is None"),
        (b'{"_class_name": "UNet2DModel", "act_fn": "mish", "sample_size": 8, "layers_per_block": "x"}', "UNet2DModel"),
    ],
)
def test_a_hostile_or_foreign_configuration_is_refused_with_the_reason(
    config: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(config)
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InvalidInput, match=re.escape(message)):
        from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)


def test_a_folder_without_weights_and_a_file_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InvalidInput, match="holds no weights"):
        from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)
    save_file({"lora.down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(InvalidInput, match=r"no layout that is known.*'lora\.down\.weight'"):
        resolve(str(tmp_path / "lora.safetensors"), preset=None, seed=0, structure_only=False)


def test_a_file_that_is_almost_a_preset_is_told_which(tmp_path: Path) -> None:
    from lehr.export.source import shipped_weights

    tensors = load_file(str(shipped_weights("digits-dit")))
    del tensors["final_layer.linear.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InvalidInput, match=r"closest is 'digits-dit'.*missing \(1\): final_layer\.linear\.bias"):
        resolve(str(tmp_path / "x.safetensors"), preset=None, seed=0, structure_only=False)


# ------------------------------------------------------------------------------------------ which preset it is


def test_presets_of_one_shape_are_told_apart_by_the_user(
    written: Any, register: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = written("latent_unet")
    single = single_file("latent_unet", folder, tmp_path / "single.safetensors")
    base = register(folder, "tiny-base")
    spec = replace(base.spec, name="tiny-v", prediction=V_PREDICTION)
    monkeypatch.setitem(presets(), "tiny-v", replace(base, spec=spec))
    for source in (folder, single):
        with pytest.raises(InvalidInput, match=r"several presets.*tiny-base, tiny-v.*--preset"):
            resolve(str(source), preset=None, seed=0, structure_only=False)
        for name, prediction in (("tiny-base", EPSILON), ("tiny-v", V_PREDICTION)):
            found = resolve(str(source), preset=name, seed=0, structure_only=False)
            assert (found.spec.name, found.spec.prediction) == (name, prediction)
    with pytest.raises(InvalidInput, match="another architecture than preset 'dit-s-2'"):
        resolve(str(folder), preset="dit-s-2", seed=0, structure_only=False)
    with pytest.raises(UnknownName, match="Did you mean 'tiny-base'"):
        resolve(str(single), preset="tiny-bass", seed=0, structure_only=False)


def test_a_file_that_is_dit_and_sit_alike_is_refused_with_both_names() -> None:
    class Headers:
        """The shapes of facebook's file, without 2.7 GB of zeros."""

        with torch.device("meta"):
            tensors = presets()["dit-xl-2"].module().state_dict()

        def names(self) -> tuple[str, ...]:
            return tuple(self.tensors)

        def info(self, name: str) -> Any:
            from lehr.engines.graph.tensor_file import TensorInfo

            return TensorInfo(np.dtype(np.float32), tuple(self.tensors[name].shape))

        def read(self, name: str) -> np.ndarray:
            raise AssertionError(f"{name} was read to recognise a file")

        def __str__(self) -> str:
            return "DiT-XL-2-256x256.safetensors"

    with pytest.raises(InvalidInput, match=r"dit-xl-2, sit-xl-2, sit-xl-2-gvp, sit-xl-2-vp"):
        recognise(Headers(), None)
    assert recognise(Headers(), "sit-xl-2").preset is presets()["sit-xl-2"]


PUBLISHED = {  # diffusers' published configurations, what differs from the class's defaults
    "sd-1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}),
    "sd-2.1": (
        "UNet2DConditionModel",
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
    ),
    "sdxl-base": (
        "UNet2DConditionModel",
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
    ),
    "sdxl-refiner": (
        "UNet2DConditionModel",
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [6, 12, 24, 24],
            "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "projection_class_embeddings_input_dim": 2560,
            "sample_size": 128,
            "transformer_layers_per_block": 4,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
    ),
    "ddpm-cifar10": (
        "UNet2DModel",
        {
            "attention_head_dim": None,
            "block_out_channels": [128, 256, 256, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "sample_size": 32,
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        },
    ),
    "dit-xl-2": ("DiTTransformer2DModel", {"out_channels": 8, "sample_size": 32}),
    "pixart-xl-2-1024": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": True},
    ),
    "sd3-medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "flux-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_its_preset(name: str) -> None:
    kind, config = PUBLISHED[name]
    found = configs.architecture({"_class_name": kind, "_diffusers_version": "0.42.1", **config})
    params = found.params
    if isinstance(params, dit.Params):  # diffusers' own conventions, which its folders are exported with
        assert (params.frequency_shift, params.norm2_eps) == (1, 1e-5)
        params = replace(params, frequency_shift=0, norm2_eps=1e-6)
    chosen = presets()[name]
    assert (found.family, params) == (chosen.spec.family, chosen.params)
    if found.size is not None:
        assert chosen.spec.dim("height").default == found.size


# ---------------------------------------------------------------------------------------------------- pipelines


def pipeline(folder: Path, root: Path, component: str, scheduler: Any) -> Path:
    shutil.copytree(folder, root / component)
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    if scheduler is not None:
        (root / "scheduler").mkdir()
        text = scheduler if isinstance(scheduler, str) else scheduler.to_json_string()
        (root / "scheduler" / "scheduler_config.json").write_text(text)
    return root


def test_a_pipeline_gives_its_denoiser_with_its_schedulers_conventions(written: Any, tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.001,
        beta_end=0.013,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    root = pipeline(written("latent_unet")[0], tmp_path / "p", "unet", scheduler)
    path = VP(schedule=BetaSchedule.SCALED_LINEAR, beta_start=0.001, beta_end=0.013, zero_terminal_snr=True)
    for source in (root, root / "unet"):
        found = resolve(str(source), preset=None, seed=0, structure_only=False)
        assert (found.spec.path, found.spec.prediction, found.route) == (path, V_PREDICTION, Route.CHECKPOINT)


def test_a_flow_pipeline_keeps_its_numbering_and_notes_its_shift(written: Any, tmp_path: Path) -> None:
    sd3 = pipeline(
        written("mmdit")[0], tmp_path / "sd3", "transformer", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flux = pipeline(written("flux")[0], tmp_path / "flux", "transformer", dynamic)
    for root, steps, shift in ((sd3, 1000, "3"), (flux, 1, "dynamic")):
        spec = resolve(str(root), preset=None, seed=0, structure_only=True).spec
        assert spec.path == LinearFlow(num_train_timesteps=steps)
        assert spec.prediction == FLOW_PREDICTION
        assert spec.notes == {"flow_shift": shift}


@pytest.mark.parametrize(
    ("scheduler", "path", "prediction"),
    [
        (diffusers.DDPMScheduler(), VP(), "epsilon"),
        (diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="sample"), None, "sample"),
        (diffusers.ScoreSdeVeScheduler(sigma_max=348.0), VE(sigma_max=348.0), "score"),
        (diffusers.EDMEulerScheduler(sigma_data=0.7), EDM(), "edm"),
        (
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            LinearFlow(),
            None,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedulers_are_read_as_path_and_prediction(scheduler: Any, path: Any, prediction: str | None) -> None:
    found = conventions({"_class_name": type(scheduler).__name__, **scheduler.config})
    assert path is None or found.path == path
    assert prediction is None or found.prediction.kind.value == prediction


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("{}", "no path that is known"),
        ("no JSON", "no readable configuration"),
        ('{"beta_schedule": "sigmoid"}', "sigmoid"),
        ('{"beta_schedule": "linear", "trained_betas": [0.1]}', "trained_betas"),
        ('{"beta_schedule": "linear", "beta_start": []}', "not what diffusers writes"),
    ],
)
def test_a_scheduler_without_a_known_path_is_refused(
    scheduler: str, message: str, written: Any, tmp_path: Path
) -> None:
    root = pipeline(written("unet")[0], tmp_path / "p", "unet", scheduler)
    with pytest.raises(InvalidInput, match=message):
        resolve(str(root), preset=None, seed=0, structure_only=False)


def test_a_pipeline_without_a_denoiser_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InvalidInput, match="no denoisers"):
        resolve(str(tmp_path), preset=None, seed=0, structure_only=False)


def test_a_score_model_is_known_by_its_configuration(written: Any) -> None:
    spec = resolve(str(written("ncsnpp")[0]), preset=None, seed=0, structure_only=False).spec
    assert (spec.path, spec.prediction) == (VE(), SCORE)


# ------------------------------------------------------------------------------------------------------ pickles


def test_pickles_are_refused_unless_allowed(written: Any, register: Any, tmp_path: Path) -> None:
    folder, _ = written("unet")
    register(folder, "tiny-unet")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "f").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "f")
    torch.save(tensors, tmp_path / "f" / "diffusion_pytorch_model.bin")
    for suffix, content in (
        (".pt", {"ema": tensors, "step": 5}),
        (".ckpt", {"state_dict": tensors}),
        (".pth", tensors),
    ):
        torch.save(content, tmp_path / f"model{suffix}")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("f", "model.pt", "model.ckpt", "model.pth", "old.pt"):
        with pytest.raises(InvalidInput, match=r"is a pickle.*--allow-pickle"):
            resolve(str(tmp_path / name), preset=None, seed=0, structure_only=False)
        found = resolve(str(tmp_path / name), preset=None, seed=0, structure_only=False, pickles=Pickles.ALLOWED)
        assert found.weights is not None
        assert np.array_equal(found.weights.read("conv_in.weight"), tensors["conv_in.weight"].numpy())


def test_an_allowed_pickle_still_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "noise.pt").write_bytes(b"not a pickle")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in (("trap", "tensors alone"), ("noise", "tensors alone"), ("list", "no named tensors")):
        with pytest.raises(InvalidInput, match=message):
            resolve(str(tmp_path / f"{name}.pt"), preset=None, seed=0, structure_only=False, pickles=Pickles.ALLOWED)
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------- diffusers' own modules

FOREIGN = {
    "DiT with an embedder a block": (replace(TINY["dit"], shared=False), {}),
    "U-Net with ResNet sampling": (
        TINY["unet"],
        {"downsample_type": "resnet", "upsample_type": "resnet", "num_class_embeds": 5},
    ),
    "latent U-Net with another activation": (TINY["latent_unet"], {"act_fn": "gelu"}),
    "SD3 with dual attention at the end": (TINY["mmdit"], {"dual_attention_layers": (1, 2)}),
    "Sana": (
        Tiny(
            kind="SanaTransformer2DModel",
            family="diffusers",
            config={
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 4,
                "num_layers": 1,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 4,
                "cross_attention_dim": 8,
                "caption_channels": 8,
                "sample_size": 8,
                "patch_size": 1,
            },
        ),
        {},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "embedder" in name else [pytest.mark.long]) for name in FOREIGN]
)
def test_another_class_of_diffusers_is_exported_as_it_is(name: str, tmp_path: Path) -> None:
    tiny, changes = FOREIGN[name]
    module = make(tiny, **changes)
    module.save_pretrained(tmp_path / "model")
    found = resolve(str(tmp_path / "model"), preset=None, seed=0, structure_only=False)
    assert found.route is Route.DIFFUSERS
    assert found.spec.family == "diffusers"
    assert tiny.kind in found.origin
    feeds = feeds_of(found.spec)
    bundle = exported(tmp_path / "model", tmp_path / "m.lehr")
    assert error(run(bundle, feeds), expected(tiny, module, feeds)) <= TOLERANCE


def test_without_diffusers_only_its_own_modules_are_out_of_reach(
    written: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(replace(TINY["dit"], shared=False)).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert from_folder(written("unet")[0], name=None, pickles=Pickles.REFUSED).route == "checkpoint"
    with pytest.raises(MissingExtra, match=r"lehr\[diffusers\]"):
        from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)


def test_a_class_whose_samples_are_no_pictures_is_refused(tmp_path: Path) -> None:
    module = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    module.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="UNet3DConditionModel cannot be exported: it does not run"):
        from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)


def test_a_folder_exported_on_the_command_line_is_built_and_verified(
    written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "u.lehr"
    out: dict[str, Any] = {}
    for arguments in (["export", written("unet")[0], "-o", bundle], ["build", bundle], ["verify", bundle]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([*map(str, arguments), "--json"])
        out = {**out, arguments[0]: json.loads(capsys.readouterr().out)}
        assert not stopped.value.code, out
    assert out["export"]["route"] == "checkpoint"
    assert out["export"]["golden"] == "full"
    assert out["verify"]["passed"] is True
