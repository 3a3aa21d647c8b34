"""Hunyuan-DiT against diffusers' ``HunyuanDiT2DModel``, with the same random weights."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.models.activations
import diffusers.models.embeddings
import diffusers.models.normalization
import numpy as np
import pytest
import torch
from backbone_checks import EXACT, ROUNDED, assert_close, check_export, load_mapped, without_rounding
from diffusers import HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_from_grid
from diffusers.models.transformers import hunyuan_transformer_2d
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from small_backbones import normal, random_feeds, randomise
from torch import Tensor

from lehr.export.backbones import hunyuan_dit, presets
from lehr.export.backbones.hunyuan_dit import HunyuanDiT, Params
from lehr.export.checkpoints.config import NotOurs, architecture, read_config
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.folder import from_folder
from lehr.export.checkpoints.maps import hunyuan_dit as hunyuan_map
from lehr.runtime.prediction import V_PREDICTION

CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 3,
    "patch_size": 2,
    "hidden_size": 24,
    "num_layers": 6,
    "mlp_ratio": 4.3637,
    "cross_attention_dim": 20,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 13,
    "text_len": 5,
    "text_len_t5": 7,
    "sample_size": 16,
}
PARAMS = Params(
    in_channels=3,
    hidden_size=24,
    depth=6,
    num_heads=3,
    clip_dim=20,
    clip_tokens=5,
    t5_dim=16,
    t5_tokens=7,
    pooled_dim=13,
)
ROUNDING = (
    (diffusers.models.embeddings, "get_timestep_embedding"),
    (diffusers.models.embeddings, "get_1d_rotary_pos_embed"),
    (diffusers.models.embeddings, "get_2d_rotary_pos_embed"),
    (diffusers.models.embeddings, "apply_rotary_emb"),
    (diffusers.models.normalization.FP32LayerNorm, "forward"),
    (diffusers.models.activations.FP32SiLU, "forward"),
    (hunyuan_transformer_2d.AdaLayerNormShift, "forward"),
    (HunyuanDiT2DModel, "forward"),
)


@pytest.fixture(params=[ROUNDED, EXACT], ids=["rounded", "exact"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    if request.param == EXACT:
        without_rounding(monkeypatch, ROUNDING)
    return float(request.param)


def release_rotation(size: tuple[int, int], head: int, base: int = 32) -> tuple[Tensor, Tensor]:
    """The rotary table as the release makes it: numpy's linspace without its end over the centred region."""
    (top, left), (bottom, right) = get_resize_crop_region_for_grid(size, base)
    rows = np.linspace(top, bottom, size[0], endpoint=False)
    columns = np.linspace(left, right, size[1], endpoint=False)
    grid = torch.from_numpy(np.stack(np.meshgrid(columns, rows, indexing="xy")))
    return get_2d_rotary_pos_embed_from_grid(head, grid[:, None], use_real=True)


def feeds(size: tuple[int, int]) -> dict[str, Tensor]:
    masks = torch.ones(2, 12, dtype=torch.int64)
    masks[0, 3:5], masks[0, 9:], masks[1, 6:] = 0, 0, 0
    return {
        "hidden_states": normal(2, 3, *size),
        "timestep": torch.tensor([3.0, 870.0], dtype=torch.float64),
        "encoder_hidden_states": normal(2, 5, 20, seed=1),
        "text_embedding_mask": masks[:, :5],
        "encoder_hidden_states_t5": normal(2, 7, 16, seed=2),
        "text_embedding_mask_t5": masks[:, 5:],
    }


def meta_size() -> Tensor:
    return torch.tensor([[1024, 768, 1024, 1024, 0, 20], [512, 512, 768, 1280, 7, 0]], dtype=torch.float64)


def pair(params: Params, config: dict[str, Any]) -> tuple[HunyuanDiT, HunyuanDiT2DModel]:
    reference = HunyuanDiT2DModel(**config).double().eval()
    randomise(reference, dtype=torch.float64)
    ours = HunyuanDiT(params).double().eval()
    load_mapped(ours, reference, hunyuan_map.DIFFUSERS, hunyuan_map.DIFFUSERS_IGNORED)
    return ours, reference


@pytest.mark.parametrize("size", [(16, 16), (6, 20), (20, 14)])
@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_network_equals_diffusers_with_the_same_weights(version: str, size: tuple[int, int], tolerance: float) -> None:
    sized = version == "1.1"
    ours, reference = pair(
        replace(PARAMS, size_conditioning=sized), CONFIG | {"use_style_cond_and_image_meta_size": sized}
    )
    given = feeds(size)
    extra = {"image_meta_size": meta_size()} if sized else {}
    with torch.no_grad():
        expected = reference(
            **given,
            **extra,
            style=torch.zeros(2, dtype=torch.int64),
            image_rotary_emb=release_rotation((size[0] // 2, size[1] // 2), 8),
            return_dict=False,
        )[0]
        got = ours(**given, **extra)
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("tokens", [3, 16, 32, 64])
def test_positions_of_a_square_picture_are_those_of_diffusers_pipeline(tokens: int) -> None:
    """Of other pictures diffusers stretches the grid by a fraction of a token, where its start is not zero."""
    region = get_resize_crop_region_for_grid((tokens, tokens), 32)
    cos, sin = get_2d_rotary_pos_embed(8, region, (tokens, tokens))
    ids = hunyuan_dit.positions(tokens, tokens, 32, like=torch.zeros(1))
    ours = hunyuan_dit.rotary(ids, (4, 4), 10_000.0, dtype=torch.float32)
    for table, expected in zip(ours, (cos, sin), strict=True):
        torch.testing.assert_close(table.repeat_interleave(2, dim=1), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [(32, 24), (17, 64), (96, 40), (61, 64), (33, 7)])
def test_positions_are_the_release_ones_at_every_shape(size: tuple[int, int]) -> None:
    ids = hunyuan_dit.positions(*size, 32, like=torch.zeros(1))
    ours = hunyuan_dit.rotary(ids, (4, 4), 10_000.0, dtype=torch.float32)
    for table, expected in zip(ours, release_rotation(size, 8), strict=True):
        torch.testing.assert_close(table.repeat_interleave(2, dim=1), expected, rtol=0, atol=1e-5)


def test_every_input_reaches_the_output() -> None:
    ours, _ = pair(replace(PARAMS, size_conditioning=True), CONFIG)
    given = feeds((8, 8)) | {"image_meta_size": meta_size()}
    with torch.no_grad():
        before = ours(**given)
        for key, value in given.items():
            changed = 1 - value if value.dtype == torch.int64 else value + 0.3 * normal(*value.shape, seed=9)
            assert not torch.allclose(ours(**(given | {key: changed})), before, rtol=1e-4), f"{key} has no influence"


def test_a_size_input_that_the_version_lacks_is_refused_and_one_that_it_needs_demanded() -> None:
    with pytest.raises(ValueError, match="takes no image_meta_size"):
        HunyuanDiT(PARAMS).double()(**feeds((8, 8)), image_meta_size=meta_size())
    with pytest.raises(ValueError, match="needs image_meta_size"):
        HunyuanDiT(replace(PARAMS, size_conditioning=True)).double()(**feeds((8, 8)))


@pytest.mark.parametrize("version", [pytest.param("1.1"), pytest.param("1.2", marks=pytest.mark.long)])
def test_an_export_computes_the_same_at_shapes_it_was_not_traced_at(version: str, tmp_path: Path) -> None:
    params = replace(PARAMS, depth=4, size_conditioning=version == "1.1")
    module = HunyuanDiT(params).eval()
    randomise(module)
    spec = hunyuan_dit.spec("tiny", params, size=16, path=presets()[f"hunyuan-dit-{version}"].spec.path)
    read = check_export(module, spec, tmp_path, random_feeds(spec, {"batch": 3, "height": 6, "width": 20}))
    kept = {name.partition(".")[0] for name in read["step"]}
    assert not kept & {"mlp_t5", "pooler", "extra_embedder", "t_embedder", "text_embedding_padding"}
    assert "blocks.0.attn2.kv_proj.weight" not in read["step"], "keys and values of the text are computed once a prompt"


@pytest.mark.parametrize("sized", [False, True])
def test_a_folder_of_diffusers_is_read_with_its_weights(sized: bool, tmp_path: Path) -> None:
    config = CONFIG | {"use_style_cond_and_image_meta_size": sized}
    reference = HunyuanDiT2DModel(**config).eval()
    reference.save_pretrained(tmp_path)
    found = from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)
    assert found.route == "checkpoint"
    assert found.module.params == replace(PARAMS, size_conditioning=sized)
    assert found.spec.sample_shape(2) == (2, 3, 16, 16)
    ours, _ = pair(replace(PARAMS, size_conditioning=sized), config)
    assert set(found.weights.names()) == set(ours.state_dict())


def test_another_activation_is_none_of_our_architectures(tmp_path: Path) -> None:
    HunyuanDiT2DModel(**CONFIG, activation_fn="geglu").save_pretrained(tmp_path)
    with pytest.raises(NotOurs, match="activation_fn is 'geglu'"):
        architecture(read_config(tmp_path))


@pytest.mark.parametrize(("name", "thousands"), [("hunyuan-dit-1.1", 1_516_534), ("hunyuan-dit-1.2", 1_499_952)])
def test_presets_have_the_published_number_of_parameters(name: str, thousands: int) -> None:
    found = presets()[name]
    with torch.device("meta"):
        module = found.module()
    assert round(sum(p.numel() for p in module.parameters()) / 1000) == thousands
    assert found.spec.prediction == V_PREDICTION
    arguments = list(inspect.signature(module.forward).parameters)
    declared = [tensor.name for tensor in found.spec.inputs]
    assert declared == arguments[: len(declared)]


@pytest.mark.parametrize(
    ("settings", "message"), [({"hidden_size": 30}, "multiple of 4 x num_heads"), ({"t5_dim": 20}, "multiple of 8")]
)
def test_params_refuse_sizes_that_do_not_fit(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **settings)
