"""Ideogram 4 against diffusers' ``Ideogram4Transformer2DModel``, with the same random weights."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import diffusers.models.normalization
import numpy as np
import pytest
import torch
from backbone_checks import EXACT, ROUNDED, assert_close, check_export, load_mapped, without_rounding
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.models.transformers import transformer_ideogram4
from small_backbones import normal, random_feeds, randomise
from torch import Tensor

from lehr.export.backbones import presets, single_stream
from lehr.export.backbones.single_stream import Params, SingleStream, Text
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.folder import from_folder
from lehr.export.checkpoints.maps import single_stream as single_stream_map

CONFIG = {
    "in_channels": 6,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "adaln_dim": 10,
    "llm_features_dim": 24,
    "rope_theta": 10_000,
    "mrope_section": (4, 2, 2),
}
PARAMS = Params(
    in_channels=6,
    hidden_size=32,
    depth=2,
    num_heads=2,
    mlp_hidden=40,
    condition_dim=10,
    text_dim=24,
    theta=10_000.0,
    sections=(4, 2, 2),
)
ROUNDING = (
    (diffusers.models.normalization.RMSNorm, "forward"),
    (transformer_ideogram4, "_sinusoidal_embedding"),
    (transformer_ideogram4.Ideogram4EmbedScalar, "forward"),
    (transformer_ideogram4.Ideogram4MRoPE, "forward"),
)
LENGTHS, TOKENS, ROWS, COLUMNS = [5, 3], 5, 3, 4
FAR, NEAR = 65_536, 9  # where picture positions begin: of the release, and where float32 phases are still exact to 1e-6


@pytest.fixture(params=[(ROUNDED, NEAR), (EXACT, FAR)], ids=["rounded", "exact"])
def bar(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[float, int]:
    """Tolerance, and the offset of picture positions at which diffusers' roundings stay below it."""
    if request.param[0] == EXACT:
        without_rounding(monkeypatch, ROUNDING)
    monkeypatch.setattr("diffusers.pipelines.ideogram4.pipeline_ideogram4.IMAGE_POSITION_OFFSET", request.param[1])
    tolerance, offset = request.param
    return tolerance, offset


def pair(params: Params) -> tuple[SingleStream, Ideogram4Transformer2DModel]:
    reference = Ideogram4Transformer2DModel(**CONFIG).double().eval()
    randomise(reference, dtype=torch.float64)
    reference.rotary_emb.inv_freq = 10_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    ours = SingleStream(params).double().eval()
    load_mapped(ours, reference, single_stream_map.DIFFUSERS, single_stream_map.DIFFUSERS_IGNORED)
    return ours, reference


def image_ids() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(ROWS * COLUMNS, 3).double()


def feeds() -> dict[str, Tensor]:
    mask = torch.zeros(2, TOKENS, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, TOKENS - length :] = 1  # padded on the left, as diffusers' pipeline does
    return {
        "hidden_states": normal(2, ROWS * COLUMNS, 6),
        "timestep": torch.tensor([0.5, 0.9375], dtype=torch.float64),  # the sinusoid sees 10,000 (1 - s)
        "img_ids": image_ids(),
        "encoder_hidden_states": normal(2, TOKENS, 24, seed=1),
        "encoder_attention_mask": mask,
    }


def test_network_equals_diffusers_with_the_packed_layout_of_its_pipeline(bar: tuple[float, int]) -> None:
    tolerance, offset = bar
    ours, reference = pair(replace(PARAMS, image_offset=offset))
    given = feeds()
    positions, segments, indicator = Ideogram4Pipeline._prepare_ids(
        LENGTHS, ROWS, COLUMNS, max_text_tokens=TOKENS, device=torch.device("cpu")
    )
    assert int(positions.max()) == offset + COLUMNS - 1
    packed = torch.cat([normal(2, TOKENS, 6, seed=5), given["hidden_states"]], dim=1)  # what stands at text is ignored
    text = torch.cat([given["encoder_hidden_states"], normal(2, ROWS * COLUMNS, 24, seed=6)], dim=1)
    with torch.no_grad():
        expected = reference(packed, 1 - given["timestep"], text, positions, segments, indicator, return_dict=False)[0]
        got = ours(**given)
    assert_close(-got, expected[:, TOKENS:], tolerance)


def test_network_without_text_equals_diffusers_on_the_picture_alone(bar: tuple[float, int]) -> None:
    tolerance, offset = bar
    ours, reference = pair(replace(PARAMS, text=Text.NONE, image_offset=offset))
    given = {name: value for name, value in feeds().items() if not name.startswith("encoder")}
    positions, segments, indicator = (
        part[:, TOKENS:]
        for part in Ideogram4Pipeline._prepare_ids(
            LENGTHS, ROWS, COLUMNS, max_text_tokens=TOKENS, device=torch.device("cpu")
        )
    )
    none = torch.zeros(2, ROWS * COLUMNS, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(
            given["hidden_states"], 1 - given["timestep"], none, positions, segments, indicator, return_dict=False
        )[0]
        assert_close(-ours(**given), expected, tolerance)


def test_float32_phases_are_exact_where_diffusers_lose_three_digits() -> None:
    ids = torch.tensor([[0.0, 63.0, 127.0]])
    exact = single_stream.phases(ids.double() + FAR, PARAMS, offset=0)
    ours = single_stream.phases(ids, PARAMS, offset=FAR)

    def turn(difference: Tensor) -> float:
        return float(torch.remainder(difference + torch.pi, 2 * torch.pi).sub(torch.pi).abs().max())

    assert ours.dtype == torch.float32
    assert turn(ours.double() - exact) < 2e-5
    naive = single_stream.phases(ids + FAR, PARAMS, offset=0)
    assert turn(naive.double() - exact) > 1e-4


def test_padding_on_either_side_changes_nothing() -> None:
    ours, _ = pair(PARAMS)
    given = feeds()
    right = given | {
        "encoder_hidden_states": torch.cat([given["encoder_hidden_states"][1:, 2:], normal(1, 4, 24, seed=7)], dim=1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]),
        "hidden_states": given["hidden_states"][1:],
        "timestep": given["timestep"][1:],
    }
    with torch.no_grad():
        assert_close(ours(**right), ours(**given)[1:], 1e-12)


def test_every_input_reaches_the_output_and_text_goes_with_the_model() -> None:
    ours, _ = pair(PARAMS)
    given = feeds()
    with torch.no_grad():
        before = ours(**given)
        for key, value in given.items():
            if value.dtype == torch.int64:
                changed = torch.ones_like(value)
            else:
                changed = value + 0.3 * normal(*value.shape, seed=9)
            assert not torch.allclose(ours(**(given | {key: changed})), before, rtol=1e-4), f"{key} has no influence"
    bare = SingleStream(replace(PARAMS, text=Text.NONE)).double()
    with pytest.raises(ValueError, match="takes no text"):
        bare(**given)
    with pytest.raises(ValueError, match="needs text"):
        ours(given["hidden_states"], given["timestep"], given["img_ids"])


@pytest.mark.parametrize("text", [Text.JOINED, pytest.param(Text.NONE, marks=pytest.mark.long)])
def test_an_export_computes_the_same_at_shapes_it_was_not_traced_at(text: Text, tmp_path: Path) -> None:
    params = replace(PARAMS, text=text)
    module = SingleStream(params).eval()
    randomise(module)
    spec = single_stream.spec("tiny", params)
    sizes = {"batch": 3, "image_tokens": 12, "text_tokens": 7}
    given = random_feeds(spec, sizes if text is Text.JOINED else {"batch": 3, "image_tokens": 12})
    given["img_ids"] = image_ids().numpy().astype(np.float32)
    read = check_export(module, spec, tmp_path, given)
    assert not [name for name in read["step"] if "adaln_" in name or "llm_cond" in name or "t_embedding" in name]


def test_a_folder_of_diffusers_is_read_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ideogram4Transformer2DModel(**CONFIG).save_pretrained(tmp_path)
    found = from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)
    assert (found.route, found.module.params) == ("checkpoint", PARAMS)
    assert set(found.weights.names()) == set(SingleStream(PARAMS).state_dict())
    bare = replace(PARAMS, text=Text.NONE)  # the configuration is the same; the preset tells the networks apart
    monkeypatch.setitem(presets(), "tiny", single_stream._preset("tiny", bare))
    found = from_folder(tmp_path, name="tiny", pickles=Pickles.REFUSED)
    assert (found.route, found.module.params) == ("checkpoint", bare)
    assert [tensor.name for tensor in found.spec.conditions] == ["img_ids"]


def test_presets_have_the_published_number_of_parameters() -> None:
    counts = {}
    for name in ("ideogram-4", "ideogram-4-unconditional"):
        with torch.device("meta"):
            module = presets()[name].module()
        counts[name] = sum(p.numel() for p in module.parameters())
        declared = [tensor.name for tensor in presets()[name].spec.inputs]
        assert declared == list(inspect.signature(module.forward).parameters)[: len(declared)]
    assert counts["ideogram-4"] == 9_279_288_448  # diffusers' module with its default configuration
    assert counts["ideogram-4"] - counts["ideogram-4-unconditional"] == 53_248 + (53_248 + 1) * 4608
    assert len({presets()[name].spec.prediction for name in counts}) == 1  # as guidance with two engines demands


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_heads": 3}, "multiple of 2 x num_heads"), ({"sections": (2, 3, 2)}, "a third")]
)
def test_params_refuse_sizes_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **settings)
