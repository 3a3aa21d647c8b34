"""Stable Video Diffusion against diffusers' ``UNetSpatioTemporalConditionModel``, with the same random weights."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import diffusers.models.embeddings
import numpy as np
import pytest
import torch
from backbone_checks import EXACT, ROUNDED, assert_close, check_export, load_mapped, without_rounding
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from small_backbones import normal, random_feeds, randomise
from torch import Tensor

from lehr.export.backbones import presets, video_unet
from lehr.export.backbones.video_unet import Params, VideoUNet
from lehr.export.checkpoints.config import NotOurs, architecture, read_config
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.folder import from_folder
from lehr.export.checkpoints.maps import video_unet as video_map

CONFIG = {
    "sample_size": 8,
    "in_channels": 5,
    "out_channels": 3,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "block_out_channels": (32, 64),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "num_attention_heads": (2, 4),
}
PARAMS = Params(
    in_channels=5,
    out_channels=3,
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(0,),
    num_heads=(2, 4),
    context_dim=12,
    time_id_dim=8,
)
ROUNDING = ((diffusers.models.embeddings, "get_timestep_embedding"),)


@pytest.fixture(params=[ROUNDED, EXACT], ids=["rounded", "exact"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    if request.param == EXACT:
        without_rounding(monkeypatch, ROUNDING)
    return float(request.param)


def feeds(frames: int, height: int, width: int, tokens: int = 1) -> dict[str, Tensor]:
    return {
        "sample": normal(2, frames, 3, height, width),
        "timestep": torch.tensor([-1.25, 1.5], dtype=torch.float64),
        "encoder_hidden_states": normal(2, tokens, 12, seed=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [24.0, 30.0, 0.5]], dtype=torch.float64),
        "sample_cond": normal(2, 2, height, width, seed=2),
    }


def pair() -> tuple[VideoUNet, UNetSpatioTemporalConditionModel]:
    reference = UNetSpatioTemporalConditionModel(**CONFIG).double().eval()
    randomise(reference, dtype=torch.float64)
    ours = VideoUNet(PARAMS).double().eval()
    load_mapped(ours, reference, video_map.DIFFUSERS, video_map.DIFFUSERS_IGNORED)
    return ours, reference


@pytest.mark.parametrize(("frames", "tokens"), [(5, 1), (1, 1), (3, 4)])
def test_network_equals_diffusers_with_the_same_weights(frames: int, tokens: int, tolerance: float) -> None:
    ours, reference = pair()
    given = feeds(frames, 6, 10, tokens)
    plain = {name: value for name, value in given.items() if name != "sample_cond"}
    picture = given["sample_cond"].unsqueeze(1).repeat(1, frames, 1, 1, 1)
    plain["sample"] = torch.cat([given["sample"], picture], dim=2)
    with torch.no_grad():
        expected, got = reference(**plain, return_dict=False)[0], ours(**given)
    assert_close(got, expected, tolerance)


def test_every_input_reaches_the_output_and_every_frame_the_others() -> None:
    ours, _ = pair()
    given = feeds(4, 4, 6)
    with torch.no_grad():
        before = ours(**given)
        for key, value in given.items():
            changed = value + 0.3 * normal(*value.shape, seed=9)
            assert not torch.allclose(ours(**(given | {key: changed})), before, rtol=1e-4), f"{key} has no influence"
        last = given["sample"].clone()
        last[:, 3] += 1.0
        assert not torch.allclose(ours(**(given | {"sample": last}))[:, 0], before[:, 0], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers
def test_the_spec_denoises_as_the_scheduler_of_the_release_does() -> None:
    """c_in, the timestep and D of the spec are those of diffusers' continuous Euler scheduler."""
    spec = presets()["svd-xt"].spec
    scheduler = EulerDiscreteScheduler(
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        timestep_spacing="leading",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )
    scheduler.set_timesteps(25)
    t = scheduler.timesteps[7]
    sigma = float(scheduler.sigmas[7])
    alpha, found = spec.path.alpha_sigma(float(t))
    assert (float(alpha), float(found)) == (1.0, pytest.approx(sigma, rel=1e-5))
    sample, output = normal(2, 3, 3, 4, 4) * sigma, normal(2, 3, 3, 4, 4, seed=1)
    scale = spec.prediction.input_scale(1.0, sigma)
    torch.testing.assert_close(scheduler.scale_model_input(sample, t), sample * scale, rtol=1e-6, atol=1e-6)
    on_sample, on_output = spec.prediction.denoised_coefficients(1.0, sigma)
    scheduler._step_index = 7
    expected = scheduler.step(output, t, sample).pred_original_sample
    got = on_sample * sample + on_output * output
    torch.testing.assert_close(got, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [1, pytest.param(2, marks=pytest.mark.long)])
def test_an_export_computes_the_same_at_shapes_it_was_not_traced_at(levels: int, tmp_path: Path) -> None:
    params = replace(PARAMS, block_out_channels=PARAMS.block_out_channels[:levels], num_heads=(2, 4)[:levels])
    module = VideoUNet(params).eval()
    randomise(module)
    spec = video_unet.spec("tiny", params, height=8, width=12, frames=4)
    given = random_feeds(spec, {"batch": 3, "frames": 6, "height": 4, "width": 10})
    read = check_export(module, spec, tmp_path, given)
    hoisted = ("time_embedding", "add_embedding", "time_emb_proj", "time_pos_embed", "attn2.to_k", "attn2.to_v")
    assert not [name for name in read["step"] if any(part in name for part in hoisted)]


def test_a_pipeline_of_diffusers_is_read_with_weights_and_conventions(tmp_path: Path) -> None:
    UNetSpatioTemporalConditionModel(**CONFIG).save_pretrained(tmp_path / "unet")
    EulerDiscreteScheduler(
        sigma_min=0.01, sigma_max=500.0, timestep_type="continuous", prediction_type="v_prediction"
    ).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableVideoDiffusionPipeline"}))
    found = from_folder(tmp_path, name=None, pickles=Pickles.REFUSED)
    assert (found.route, found.module.params) == ("checkpoint", PARAMS)
    assert found.spec.prediction == video_unet.V_OF_EDM
    assert found.spec.path.to_json() == {"kind": "edm", "sigma_min": 0.01, "sigma_max": 500.0}
    assert found.spec.sample_shape(2) == (2, 14, 3, 4, 8)
    assert set(found.weights.names()) == set(VideoUNet(PARAMS).state_dict())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"transformer_layers_per_block": 2}, "transformer_layers_per_block"),
        ({"projection_class_embeddings_input_dim": 20}, "no multiple of 8"),
    ],
)
def test_other_options_are_none_of_our_architectures(option: dict[str, int], message: str, tmp_path: Path) -> None:
    UNetSpatioTemporalConditionModel(**(CONFIG | option)).save_pretrained(tmp_path)
    with pytest.raises(NotOurs, match=message):
        architecture(read_config(tmp_path))


def test_presets_have_the_published_number_of_parameters() -> None:
    for name, frames in (("svd", 14), ("svd-xt", 25)):
        with torch.device("meta"):
            module = presets()[name].module()
        assert sum(p.numel() for p in module.parameters()) == 1_524_623_082
        spec = presets()[name].spec
        assert [tensor.name for tensor in spec.inputs] == list(inspect.signature(module.forward).parameters)
        assert spec.sample_shape(1) == (1, frames, 4, 72, 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 3}, "and a picture's"),
        ({"num_heads": (2,)}, "one number a level"),
        ({"num_heads": (3, 4)}, "and of 3 heads"),
    ],
)
def test_params_refuse_what_does_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **settings)


def test_a_blend_that_is_all_spatial_treats_a_video_as_its_frames() -> None:
    ours, _ = pair()
    for module in ours.modules():
        if isinstance(module, video_unet.Blend):
            module.mix_factor.data.fill_(np.inf)
    given = feeds(3, 4, 4)
    with torch.no_grad():
        video = ours(**given)
        for frame in range(3):
            alone = ours(**(given | {"sample": given["sample"][:, frame : frame + 1]}))
            assert_close(video[:, frame : frame + 1], alone, 1e-12)
