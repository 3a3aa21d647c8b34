"""Space-time transformers: Latte against diffusers' module, the class-conditional one against DiT."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import diffusers.models.embeddings
import numpy as np
import onnxruntime as ort
import pytest
import torch
from backbone_checks import EXACT, ROUNDED, assert_close, check_export, load_mapped, without_rounding
from diffusers import LatteTransformer3DModel
from small_backbones import normal, random_feeds, randomise
from torch import Tensor

from lehr.export.backbones import dit, presets, spacetime_dit
from lehr.export.backbones.spacetime_dit import ClassParams, Latte, Params, SpaceTimeDiT
from lehr.export.checkpoints.config import NotOurs, architecture, read_config
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.folder import from_folder
from lehr.export.checkpoints.maps import spacetime_dit as spacetime_map

CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "sample_size": 10,
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "num_embeds_ada_norm": 1000,
    "video_length": 5,
}
PARAMS = Params(in_channels=3, hidden_size=24, depth=2, num_heads=3, caption_channels=20, base_size=5)
PICTURE = dit.Params(in_channels=3, hidden_size=24, depth=2, num_heads=3, num_classes=7)
ROUNDING = (
    (diffusers.models.embeddings, "get_timestep_embedding"),
    (diffusers.models.embeddings, "get_2d_sincos_pos_embed"),
    (diffusers.models.embeddings, "PatchEmbed"),
)


def exact_frames(length: int, dim: int) -> Tensor:
    """Latte's table of frames in float64, written anew: sines, then cosines."""
    phase = np.arange(length)[:, None] / 10_000 ** (np.arange(dim // 2) / (dim // 2))
    return torch.from_numpy(np.concatenate([np.sin(phase), np.cos(phase)], axis=1))[None]


@pytest.fixture(params=[ROUNDED, EXACT], ids=["rounded", "exact"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    if request.param == EXACT:
        without_rounding(monkeypatch, ROUNDING)
    return float(request.param)


def feeds(*size: int) -> dict[str, Tensor]:
    return {
        "hidden_states": normal(2, 3, *size),
        "timestep": torch.tensor([3.0, 870.0], dtype=torch.float64),
        "encoder_hidden_states": normal(2, 7, 20, seed=1),
    }


def pair(params: Params, config: dict[str, object]) -> tuple[Latte, LatteTransformer3DModel]:
    reference = LatteTransformer3DModel(**config).double().eval()
    randomise(reference, dtype=torch.float64)
    ours = Latte(params).double().eval()
    load_mapped(ours, reference, spacetime_map.DIFFUSERS, spacetime_map.DIFFUSERS_IGNORED)
    return ours, reference


@pytest.mark.parametrize("size", [(5, 10, 10), (5, 4, 14), (1, 10, 10)], ids=["video", "other size", "one frame"])
def test_latte_equals_diffusers_with_the_same_weights(size: tuple[int, int, int], tolerance: float) -> None:
    ours, reference = pair(PARAMS, CONFIG)
    if tolerance == EXACT:
        reference.temp_pos_embed = exact_frames(5, 24)
    given = feeds(*size)
    with torch.no_grad():
        expected, got = reference(**given, return_dict=False)[0], ours(**given)
    assert_close(got, expected, tolerance)


def test_latte_takes_another_duration_than_diffusers_table_was_made_for() -> None:
    ours, reference = pair(PARAMS, CONFIG)
    reference.temp_pos_embed = exact_frames(9, 24)
    given = feeds(9, 4, 6)
    with torch.no_grad():
        assert_close(ours(**given), reference(**given, return_dict=False)[0], ROUNDED)


def class_model(patch_frames: int = 1) -> SpaceTimeDiT:
    module = SpaceTimeDiT(ClassParams(picture=PICTURE, patch_frames=patch_frames)).double().eval()
    randomise(module, dtype=torch.float64)
    return module


LABELS = {"timestep": torch.tensor([3.0, 870.0], dtype=torch.float64), "class_labels": torch.tensor([1, 7])}


def test_with_one_frame_the_class_conditional_model_is_dit() -> None:
    video, picture = class_model(), dit.DiT(PICTURE).double().eval()
    picture.load_state_dict(video.state_dict())
    sample = normal(2, 3, 6, 10)
    with torch.no_grad():
        expected = picture(sample, **LABELS)
        assert_close(video(sample.unsqueeze(2), **LABELS).squeeze(2), expected, 1e-14)
        assert not torch.allclose(video(torch.stack([sample] * 2, dim=2), **LABELS)[:, :, 0], expected, rtol=1e-3)


def test_a_patch_of_two_frames_keeps_each_frame_in_its_place() -> None:
    """Input and output of the two frames are told apart: exchanging their weights exchanges the frames."""
    module, sample = class_model(patch_frames=2), normal(2, 3, 4, 6, 4)
    assert module.x_embedder.proj.weight.shape == (24, 6, 2, 2)
    with torch.no_grad():
        expected = module(sample, **LABELS)
        assert expected.shape == (2, 6, 4, 6, 4)
        taken = module.x_embedder.proj.weight.unflatten(1, (3, 2)).flip(2).flatten(1, 2)
        module.x_embedder.proj.weight.copy_(taken)
        last = module.final_layer.linear
        for values in (last.weight, last.bias):  # rows: (2, 2) pixels of a patch, then 6 channels of 2 frames
            values.copy_(values.unflatten(0, (4, 6, 2)).flip(2).flatten(0, 2))

        def exchanged(x: Tensor) -> Tensor:
            return x.unflatten(2, (2, 2)).flip(3).flatten(2, 3)

        assert_close(exchanged(module(exchanged(sample), **LABELS)), expected, 1e-12)


def test_frames_see_each_other_and_their_order_matters() -> None:
    ours, _ = pair(PARAMS, CONFIG)
    video, given = class_model(), feeds(4, 6, 4)
    for module, name, rest in (
        (ours, "hidden_states", {key: value for key, value in given.items() if key != "hidden_states"}),
        (video, "sample", LABELS),
    ):
        sample = given["hidden_states"]
        changed = sample.clone()
        changed[:, :, 3] += 1.0
        with torch.no_grad():
            before = module(**{name: sample}, **rest)
            assert not torch.allclose(module(**{name: changed}, **rest)[:, :, 0], before[:, :, 0], rtol=1e-6)
            flipped = module(**{name: sample.flip(2)}, **rest).flip(2)
            assert not torch.allclose(flipped, before, rtol=1e-3)


@pytest.mark.parametrize("kind", ["latte", pytest.param("class", marks=pytest.mark.long)])
def test_an_export_computes_the_same_at_shapes_it_was_not_traced_at(kind: str, tmp_path: Path) -> None:
    if kind == "latte":
        latte = replace(PARAMS, depth=1)
        module, spec = Latte(latte).eval(), spacetime_dit.spec("tiny", latte, size=8, frames=4)
    else:
        params = ClassParams(picture=replace(PICTURE, depth=1), patch_frames=2)
        module, spec = SpaceTimeDiT(params).eval(), spacetime_dit.class_spec("tiny", params, size=8, frames=4)
    randomise(module)
    sizes = {"batch": 3, "frames": 6, "height": 4, "width": 12} | ({"text_tokens": 5} if kind == "latte" else {})
    read = check_export(module, spec, tmp_path, random_feeds(spec, sizes))
    assert not [name for name in read["step"] if "adaLN_modulation" in name or "embedder.mlp" in name]
    assert "blocks.0.cross_attn.kv_linear.weight" not in read["step"]
    one = random_feeds(spec, sizes | {"frames": spec.dim("frames").multiple})  # one frame, or one group of frames
    check_session(tmp_path / "whole.onnx", module, one)


def check_session(path: Path, module: torch.nn.Module, given: dict[str, np.ndarray]) -> None:
    got = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, given)[0]
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(value) for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_of_diffusers_is_read_with_its_weights(tmp_path: Path) -> None:
    LatteTransformer3DModel(**CONFIG).save_pretrained(tmp_path)
    found = from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)
    assert (found.route, found.module.params) == ("checkpoint", PARAMS)
    assert found.spec.sample_shape(2) == (2, 3, 16, 10, 10)
    assert set(found.weights.names()) == set(Latte(PARAMS).state_dict())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"attention_bias": False}, "no bias"),
    ],
)
def test_other_options_are_none_of_our_architectures(option: dict[str, object], message: str, tmp_path: Path) -> None:
    LatteTransformer3DModel(**(CONFIG | option)).save_pretrained(tmp_path)
    with pytest.raises(NotOurs, match=message):
        architecture(read_config(tmp_path))


def test_latte_has_the_published_number_of_parameters_and_the_class_model_that_of_dit() -> None:
    counts = {}
    for name in ("latte", "spacetime-dit-xl-2", "dit-xl-2"):
        with torch.device("meta"):
            module = presets()[name].module()
        counts[name] = sum(p.numel() for p in module.parameters())
        arguments = list(inspect.signature(module.forward).parameters)
        assert [tensor.name for tensor in presets()[name].spec.inputs] == arguments
    assert counts["latte"] == 1_057_246_880  # diffusers' module at the configuration of maxin-cn/Latte-1
    assert counts["spacetime-dit-xl-2"] == counts["dit-xl-2"] - (1000 - 101) * 1152


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(PARAMS, num_heads=5), "multiple of num_heads"),
        (lambda: replace(PARAMS, hidden_size=30), "multiple of 4"),
        (lambda: ClassParams(patch_frames=0), "at least 1"),
        (lambda: ClassParams(picture=replace(PICTURE, conditioning=dit.Conditioning.IN_CONTEXT)), "adaln_zero"),
    ],
)
def test_params_refuse_what_does_not_fit(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
