"""Pictures of diffusers' own pipelines, with and without an engine in a module's place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lehr.export.autoencoders.folder import decoder_source, encoder_source
from lehr.export.eager import eager
from lehr.export.source import resolve
from lehr.export.stages import EagerStages
from lehr.runtime.errors import BundleError, InvalidInput, UnknownName

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from lehr.export import as_diffusers  # noqa: E402  # needs what was just asked for
from lehr.export.drop_in import (  # noqa: E402
    AutoencoderDropIn,
    TransformerDropIn,
    UNetDropIn,
    denoiser_module,
)
from lehr.runtime.pipeline_spec import LatentSpec  # noqa: E402

logging.getLogger("diffusers").setLevel(logging.ERROR)
logging.getLogger("transformers").setLevel(logging.ERROR)

OF_DIFFUSERS = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore:__array__ implementation:DeprecationWarning"
)
Folder = Callable[[str], Path]
STEPS = 3
CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"prompt": "a red house", "negative_prompt": "blue", "guidance_scale": 5.0},
    "LatentConsistencyModelPipeline": {"prompt": "a cat", "guidance_scale": 6.0},
    "StableDiffusionXLPipeline": {"prompt": "a red house", "guidance_scale": 5.0},
    "StableDiffusion3Pipeline": {"prompt": "a red house", "guidance_scale": 5.0, "max_sequence_length": 32},
    "FluxPipeline dev": {"prompt": "a red house", "guidance_scale": 3.5, "max_sequence_length": 32},
    "PixArtAlphaPipeline": {"prompt": "a red house", "use_resolution_binning": False},
    "DiTPipeline": {"class_labels": [1, 7], "guidance_scale": 1.0},  # it knows no other null class than 1000
}


def opened(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, name: str, **changes: Any) -> np.ndarray:
    settings = {"num_inference_steps": STEPS, "output_type": "np", **CALLS[name], **changes}
    if "DiT" not in name:
        settings |= {"height": 32, "width": 32}
    return np.asarray(pipe(generator=torch.Generator().manual_seed(0), **settings).images)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((first - second) ** 2) + 1e-20))


def swap(pipe: Any, folder: Path) -> None:
    """The denoiser and the autoencoder in PyTorch, behind the calls that an engine is behind."""
    role = "unet" if hasattr(pipe, "unet") else "transformer"
    found = resolve(str(folder), preset=None, seed=0, structure_only=False)
    module = denoiser_module(eager(found.runnable(), found.spec))
    assert isinstance(module, UNetDropIn if role == "unet" else TransformerDropIn)
    setattr(pipe, role, module)
    halves = [decoder_source(folder / "vae"), encoder_source(folder / "vae")]
    config = pipe.vae.config
    latent = LatentSpec(
        channels=config.latent_channels,
        factor=4,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
    )
    pipe.vae = AutoencoderDropIn(EagerStages(halves), latent)


@OF_DIFFUSERS
@pytest.mark.parametrize("name", list(CALLS))
def test_a_pipelines_picture_stays_when_its_modules_are_replaced(name: str, tiny_pipeline: Folder) -> None:
    folder = tiny_pipeline(name)
    pipe = opened(folder)
    expected = draw(pipe, name)
    assert expected.std() > 0.01
    swap(pipe, folder)
    assert psnr(draw(pipe, name), expected) >= 50


@OF_DIFFUSERS
def test_pictures_are_encoded_and_inpainted_with_the_replaced_modules(tiny_pipeline: Folder) -> None:
    folder = tiny_pipeline("StableDiffusionInpaintPipeline")
    pipe = opened(folder)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    settings = {
        "prompt": "a red house",
        "image": picture,
        "mask_image": mask,
        "num_inference_steps": 4,
        "strength": 0.7,
        "height": 32,
        "width": 32,
        "output_type": "np",
    }
    expected = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
    swap(pipe, folder)
    assert pipe.unet.config.in_channels == 9
    assert psnr(pipe(**settings, generator=torch.Generator().manual_seed(0)).images, expected) >= 50


@pytest.mark.long
@OF_DIFFUSERS
def test_an_exported_and_built_bundle_draws_the_pipelines_picture(tiny_pipeline: Folder, tmp_path: Path) -> None:
    """Through ONNX Runtime, both modules, with nothing but the bundle's name."""
    from lehr.engines.build import build
    from lehr.engines.stages import build_stage
    from lehr.engines.target import target
    from lehr.export.package import Options, export
    from lehr.runtime.golden import Tier
    from lehr.runtime.recipe import recipe

    folder = tiny_pipeline("StableDiffusionPipeline")
    pipe = opened(folder)
    expected = draw(pipe, "StableDiffusionPipeline")
    bundle = tmp_path / "sd.lehr"
    export(str(folder), bundle, Options(tier=Tier.NONE), progress=lambda text: None)
    with pytest.raises(BundleError, match="lehr build"):
        as_diffusers(bundle)
    build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime")
    build_stage(bundle, "vae_decoder", target("cpu"), recipe("fp32"), library="onnxruntime")
    pipe.unet, pipe.vae = as_diffusers(bundle), as_diffusers(str(bundle), component="vae")
    assert psnr(draw(pipe, "StableDiffusionPipeline"), expected) >= 50
    # A pipeline that is put together with the engine in it, and in half precision around it.
    whole = diffusers.DiffusionPipeline.from_pretrained(folder, unet=pipe.unet, local_files_only=True)
    whole.set_progress_bar_config(disable=True)
    assert psnr(draw(whole, "StableDiffusionPipeline"), expected) >= 50
    assert pipe.unet.to(torch.bfloat16).dtype is torch.bfloat16
    latent = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    text = torch.zeros(2, 77, 32, dtype=torch.bfloat16)
    assert pipe.unet(latent, 10, encoder_hidden_states=text).sample.dtype is torch.bfloat16


# ------------------------------------------------------------------------------------------------- one module


@pytest.fixture(scope="module")
def module(tiny_pipeline: Folder) -> Any:
    found = resolve(str(tiny_pipeline("StableDiffusionPipeline")), preset=None, seed=0, structure_only=False)
    return denoiser_module(eager(found.runnable(), found.spec))


def test_samples_with_timesteps_of_their_own_are_evaluated_at_them(module: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 32, generator=generator)
    together = module(x, torch.tensor([10, 700, 10]), encoder_hidden_states=text).sample
    for row, time in enumerate((10, 700, 10)):
        alone = module(x[row : row + 1], time, text[row : row + 1], return_dict=False)[0]
        assert torch.allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"mid_block_additional_residual": torch.zeros(1)}, "mid_block_additional_residual"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
        ({"encoder_hidden_states": None}, "leaves out encoder_hidden_states"),
        ({"added_cond_kwargs": {"time_ids": torch.zeros(1, 6)}}, "time_ids"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_by_name(module: Any, more: dict[str, Any], named: str) -> None:
    settings = {"encoder_hidden_states": torch.zeros(1, 5, 32), **more}
    with pytest.raises(InvalidInput, match=named):
        module(torch.zeros(1, 4, 8, 8), 10, **settings)


def test_a_stand_in_says_its_configuration_device_and_dtype_and_is_not_saved(module: Any, tmp_path: Path) -> None:
    config = module.config
    assert (config.in_channels, config.out_channels, config.sample_size) == (4, 4, 8)
    assert config.time_cond_proj_dim is None
    assert module.dtype is torch.float32
    assert module.device == torch.device("cpu")
    assert not list(module.parameters())
    with pytest.raises(InvalidInput, match="Keep the bundle"):
        module.save_pretrained(tmp_path)


def test_a_bundle_without_an_autoencoder_and_an_unknown_component_are_refused(dit_bundle: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no autoencoder"):
        as_diffusers(dit_bundle, component="vae")
    with pytest.raises(UnknownName, match="denoiser"):
        as_diffusers(dit_bundle, component="unet")
    module = as_diffusers(dit_bundle)
    assert isinstance(module, TransformerDropIn)
    assert module.config.num_embeds_ada_norm == 10
