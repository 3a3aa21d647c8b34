"""The Gaussian DiT as a function of a set, and its renderer against one written anew, pixel by pixel."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_checks import assert_close, check_export
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from small_backbones import normal, random_feeds, randomise
from torch import Tensor

from lehr.engines.stages import build_stage
from lehr.engines.target import target
from lehr.export.backbones import _splat_renderer, gaussian_dit, presets
from lehr.export.backbones._splat_renderer import (
    CHANNELS,
    LOG_SCALE,
    MAX_ALPHA,
    RenderParams,
    SplatRenderer,
    example_feeds,
    stage_spec,
)
from lehr.export.backbones.gaussian_dit import GaussianDiT, Params
from lehr.export.stages import StageSource, export_stage
from lehr.export.weights import TorchModuleSource
from lehr.runtime.bundle import Bundle
from lehr.runtime.recipe import recipe
from lehr.runtime.stages import Stages
from lehr.runtime.views import look_at

PARAMS = Params(hidden_size=24, depth=2, num_heads=3, context_dim=12)


@pytest.fixture(scope="module")
def module() -> GaussianDiT:
    made = GaussianDiT(PARAMS).double().eval()
    randomise(made, dtype=torch.float64)
    return made.requires_grad_(False)


def feeds(gaussians: int = 9) -> dict[str, Tensor]:
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    return {
        "hidden_states": normal(2, gaussians, CHANNELS),
        "timestep": torch.tensor([3.0, 870.0], dtype=torch.float64),
        "encoder_hidden_states": normal(2, 5, 12, seed=1),
        "encoder_attention_mask": mask,
    }


# ------------------------------------------------------------------------------------------------ the denoiser


def test_exchanging_gaussians_of_the_input_exchanges_them_in_the_output(module: GaussianDiT) -> None:
    given = feeds()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    expected = module(**given)[:, order]
    assert_close(module(**(given | {"hidden_states": given["hidden_states"][:, order]})), expected, 1e-13)
    assert not torch.allclose(expected, module(**given), rtol=1e-2)


def test_exchanging_tokens_of_the_condition_with_their_mask_changes_nothing(module: GaussianDiT) -> None:
    given = feeds()
    order = torch.tensor([4, 2, 0, 3, 1])
    changed = {key: given[key][:, order] for key in ("encoder_hidden_states", "encoder_attention_mask")}
    assert_close(module(**(given | changed)), module(**given), 1e-13)


def test_gaussians_see_each_other_and_every_input_matters(module: GaussianDiT) -> None:
    given = feeds()
    before = module(**given)
    for key, value in given.items():
        changed = 1 - value if value.dtype == torch.int64 else value + 0.3 * normal(*value.shape, seed=9)
        assert not torch.allclose(module(**(given | {key: changed})), before, rtol=1e-4), f"{key} has no influence"
    last = given["hidden_states"].clone()
    last[:, -1] += 1.0
    assert not torch.allclose(module(**(given | {"hidden_states": last}))[:, 0], before[:, 0], rtol=1e-6)
    padded = given["encoder_hidden_states"].clone()
    padded[1, 3:] += 5.0
    assert_close(module(**(given | {"encoder_hidden_states": padded})), before, 1e-13)


def test_an_export_computes_the_same_at_shapes_it_was_not_traced_at(tmp_path: Path) -> None:
    made = GaussianDiT(PARAMS).eval()
    randomise(made)
    spec = gaussian_dit.spec("tiny", PARAMS, gaussians=8)
    read = check_export(made, spec, tmp_path, random_feeds(spec, {"batch": 3, "gaussians": 11, "context_tokens": 6}))
    hoisted = ("adaLN_modulation", "t_embedder", "y_embedder", "kv_linear")
    assert not [name for name in read["step"] if any(part in name for part in hoisted)]


def test_the_preset_has_the_size_of_dit_b_and_cross_attention() -> None:
    found = presets()["gaussian-dit-b"]
    with torch.device("meta"):
        made = found.module()
        dit_b = presets()["dit-b-2"].module()
    d = 768
    cross = 12 * (4 * (d * d + d) + 2 * d)  # q, k, v, out and a norm in each block
    ends = (CHANNELS * d + d) + (d * CHANNELS + CHANNELS) + (1024 * d + d) + (d * d + d)
    theirs = sum(p.numel() for name, p in dit_b.named_parameters() if name.startswith(("blocks", "t_embedder")))
    last = sum(p.numel() for p in dit_b.final_layer.adaLN_modulation.parameters())
    assert sum(p.numel() for p in made.parameters()) == theirs + last + cross + ends
    assert [tensor.name for tensor in found.spec.inputs] == list(inspect.signature(made.forward).parameters)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        Params(num_heads=7)


# ------------------------------------------------------------------------------------------------ the renderer


def reference(splats: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray, p: RenderParams) -> np.ndarray:
    """One picture by the definition: for each pixel, Gaussians from near to far, each hiding those behind."""
    fx, fy, cx, cy = intrinsics
    turn, shift = pose[:3, :3], pose[:3, 3]
    drawn = []
    for splat in splats:
        x, y, z = turn @ splat[:3] + shift
        if z <= _splat_renderer.NEAR:
            continue
        w, *imaginary = splat[6:10]
        axes = Rotation.from_quat([*imaginary, w]).as_matrix() @ np.diag(np.exp(splat[3:6] + LOG_SCALE))
        jacobian = np.array([[fx / z, 0, -fx * x / z**2], [0, fy / z, -fy * y / z**2]])
        covariance = jacobian @ turn @ axes @ axes.T @ turn.T @ jacobian.T + 0.3 * np.eye(2)
        centre = np.array([fx * x / z + cx, fy * y / z + cy])
        drawn.append((z, centre, np.linalg.inv(covariance), 1 / (1 + np.exp(-splat[10])), np.clip(splat[11:], -1, 1)))
    picture = np.empty((3, p.height, p.width))
    for row in range(p.height):
        for column in range(p.width):
            light, colour = 1.0, np.zeros(3)
            for _, centre, inverse, opacity, tint in sorted(drawn, key=lambda item: item[0]):
                d = np.array([column + 0.5, row + 0.5]) - centre
                alpha = min(MAX_ALPHA, opacity * np.exp(-0.5 * d @ inverse @ d))
                colour += light * alpha * tint
                light *= 1 - alpha
            picture[:, row, column] = colour + light * p.background
    return picture


def drawn(p: RenderParams, given: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.from_numpy(value).double() for name, value in given.items()}
    return SplatRenderer(p)(**tensors).numpy()


@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 12), background=st.floats(-1, 1))
def test_a_picture_is_the_definition_evaluated_pixel_by_pixel(seed: int, count: int, background: float) -> None:
    p = RenderParams(height=7, width=9, background=background)
    example = example_feeds(p, gaussians=count)(seed)
    example["latent_sample"][0, 0, :3] = [0.0, 4.0, 20.0]  # behind the camera or far off the picture
    pictures = drawn(p, example)
    for i in range(2):
        expected = reference(*(example[name][i].astype(float) for name in example), p)
        np.testing.assert_allclose(pictures[i], expected, atol=1e-9)


def test_a_gaussian_in_front_hides_the_one_behind_from_either_side() -> None:
    p = RenderParams(height=9, width=9)
    splats = np.zeros((1, 2, CHANNELS), np.float32)
    splats[..., 3:6], splats[..., 6], splats[..., 10] = 2.5, 1.0, 20.0  # large, upright, opaque
    splats[0, 0, 2], splats[0, 0, 11:] = 0.5, [1, -1, -1]  # red at z = .5
    splats[0, 1, 2], splats[0, 1, 11:] = -0.5, [-1, -1, 1]  # blue at z = -.5
    middles = []
    for side in (3.0, -3.0):
        pose = look_at(np.array([0.0, 0.0, side]), np.zeros(3))[None]
        picture = drawn(p, {"latent_sample": splats, "world_to_camera": pose, "intrinsics": CENTRED[None]})
        middles.append(picture[0, :, 4, 4])
    np.testing.assert_allclose(middles[0], [1, -1, -1], atol=0.05)
    np.testing.assert_allclose(middles[1], [-1, -1, 1], atol=0.05)


CENTRED = np.array([12.0, 12.0, 4.5, 4.5], np.float32)


def test_a_camera_sees_what_is_up_above_and_what_is_right_to_the_right() -> None:
    p = RenderParams(height=9, width=9, background=-1.0)
    pose = look_at(np.array([0.0, 0.0, 3.0]), np.zeros(3))[None]
    for axis, (row, column) in ((0, (4, 7)), (1, (1, 4))):  # +x is to the right of this camera, +y above
        splats = np.zeros((1, 1, CHANNELS), np.float32)
        splats[0, 0, axis], splats[0, 0, 6], splats[0, 0, 10], splats[0, 0, 11:] = 0.7, 1.0, 20.0, 1.0
        picture = drawn(p, {"latent_sample": splats, "world_to_camera": pose, "intrinsics": CENTRED[None]})
        assert np.unravel_index(picture[0, 0].argmax(), (9, 9)) == (row, column)


def test_turning_object_and_camera_together_changes_nothing() -> None:
    p = RenderParams(height=8, width=8)
    example = example_feeds(p, gaussians=6)(3)
    turn = Rotation.from_rotvec([0.3, -1.1, 0.7])
    turned = {name: value.astype(float) for name, value in example.items()}
    splats = turned["latent_sample"]
    for b, i in np.ndindex(splats.shape[:2]):
        splats[b, i, :3] = turn.apply(splats[b, i, :3])
        x, y, z, w = (turn * Rotation.from_quat([*splats[b, i, 7:10], splats[b, i, 6]])).as_quat()
        splats[b, i, 6:10] = w, x, y, z
    turned["world_to_camera"][:, :3, :3] = turned["world_to_camera"][:, :3, :3] @ turn.as_matrix().T
    np.testing.assert_allclose(drawn(p, turned), drawn(p, example), atol=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    p = RenderParams(height=5, width=4)
    example = {name: torch.from_numpy(v).double() for name, v in example_feeds(p, gaussians=3)(1).items()}
    rest = (example["world_to_camera"][:1], example["intrinsics"][:1])
    splats = example["latent_sample"][:1].clamp(-0.9, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SplatRenderer(p)(x, *rest), (splats,), atol=1e-5, rtol=1e-4)


def test_the_renderer_is_a_stage_that_a_bundle_holds_and_runs(dit_bundle: Path, tmp_path: Path) -> None:
    p = RenderParams(height=12, width=10)
    made = SplatRenderer(p)
    source = StageSource(
        spec=stage_spec(p, gaussians=16),
        module=made,
        weights=TorchModuleSource(made),
        origin="no weights",
        feeds=example_feeds(p, gaussians=16),
    )
    root = Path(shutil.copytree(dit_bundle, tmp_path / "g.lehr"))
    with Bundle.open(root).edit() as edit:
        entry = export_stage(edit, source, tier=None, device="cpu", progress=lambda text: None)
        edit.set_manifest(stages={entry.spec.name: entry})
    build_stage(root, "vae_decoder", target("cpu"), recipe("fp32"), library="onnxruntime")
    other = example_feeds(p, gaussians=23)(7)  # other Gaussians, other viewpoints, another number
    with Stages(Bundle.open(root)).using("vae_decoder") as run:
        got = run(other)["sample"]
    assert got.shape == (2, 3, 12, 10)
    np.testing.assert_allclose(got, drawn(p, other), atol=1e-4)


@pytest.mark.parametrize(
    ("settings_", "message"), [({"height": 0}, "at least 1"), ({"background": 2.0}, "between -1 and 1")]
)
def test_impossible_pictures_are_refused(settings_: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RenderParams(**settings_)
