"""Every family of pipelines against diffusers' own pipeline: same weights, same tokenizers, same noise."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
tiny_pipelines = pytest.importorskip("tiny_pipelines", exc_type=ImportError)

from lehr.export.eager_pipeline import eager_text_to_image  # noqa: E402
from lehr.export.own_scheduler import own_tables  # noqa: E402
from lehr.export.pipelines.read import read_pipeline  # noqa: E402
from lehr.export.source import resolve  # noqa: E402
from lehr.runtime.latents import ENCODED, MASKED  # noqa: E402
from lehr.runtime.noise import START, batch_normal  # noqa: E402
from lehr.runtime.text_to_image import PictureRequest, TextToImage  # noqa: E402

SEED, STEPS, SIZE = 5, 4, 32
LATENT_DB, PICTURE_DB = 100, 100
PROMPTS, NEGATIVE = ["a photo of the cat", "Red house, by the sea"], ["blue night", "a dog"]
NOISY_MODULES = (
    "models.autoencoders.vae",
    "pipelines.dit.pipeline_dit",
    "pipelines.flux.pipeline_flux_img2img",
    "pipelines.flux.pipeline_flux_inpaint",
    "pipelines.stable_diffusion.pipeline_stable_diffusion_img2img",
    "pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint",
    "pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img",
    "pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint",
    "pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img",
    "pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint",
    "schedulers.scheduling_euler_ancestral_discrete",
    "schedulers.scheduling_lcm",
)


# ------------------------------------------------------------------------------------------------ both sides


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline and what is asked of it.

    Attributes:
        pipeline: of ``tiny_pipelines``.
        request: what Lehr is asked besides prompts and size.
        call: what diffusers is asked besides prompts, size and noise.
        as_class: the diffusers class that draws, where it is not the saved one.
        encoded: streams of the noise with which the encoder's distribution is sampled, in diffusers' order.
        picture: whether the picture is compared, too; once for each autoencoder and way to its latent.
    """

    pipeline: str
    request: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    as_class: str | None = None
    encoded: tuple[int, ...] = ()
    size: int = SIZE
    picture: bool = True


@contextmanager
def shared_noise(encoded: tuple[int, ...]) -> Iterator[None]:
    """Lehr's noise in place of diffusers'; ``encoded`` holds the streams of what the autoencoder draws, in order."""
    drawn: dict[str, int] = {}

    def noise(module: str) -> Callable[..., Any]:
        def randn_tensor(shape: Any, **_: Any) -> Any:
            k = drawn[module] = drawn.get(module, -1) + 1
            stream = START if module.startswith("pipelines") else 1 + k
            if module.startswith("models"):
                stream = encoded[k]
            drawn_shape = tuple(shape[1:])
            if "flux" in module:  # drawn as cells there, as tokens here
                c, h, w = drawn_shape
                tokens = torch.from_numpy(batch_normal(SEED, range(shape[0]), (h * w // 4, c * 4), stream=stream))
                return diffusers.FluxPipeline._unpack_latents(tokens, h, w, 1)
            return torch.from_numpy(batch_normal(SEED, range(shape[0]), drawn_shape, stream=stream))

        return randn_tensor

    with pytest.MonkeyPatch.context() as patch:
        for name in NOISY_MODULES:
            patch.setattr(importlib.import_module(f"diffusers.{name}"), "randn_tensor", noise(name))
        yield


def lehr_pipeline(folder: Path, steps: int = STEPS) -> TextToImage:
    denoiser = resolve(str(folder), preset=None, seed=0, structure_only=False)
    tables = own_tables(str(folder), denoiser.spec, (steps,), progress=lambda text: None)
    found = read_pipeline(str(folder), denoiser)
    assert found is not None
    assert tables is not None
    return eager_text_to_image(found, tables.tables)


def peak_db(ours: np.ndarray, theirs: np.ndarray) -> float:
    """PSNR with the oracle's own range as the peak."""
    assert ours.shape == theirs.shape
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    peak = float(theirs.max() - theirs.min())
    assert peak > 0.1
    return 10 * np.log10(peak**2 / max(error, 1e-30))


def drawn_by_diffusers(case: Case, ours: TextToImage) -> list[np.ndarray]:
    """Latents and pictures, (N, C, H, W) each."""
    pipe = tiny_pipelines.pipeline(case.pipeline)
    if case.as_class is not None:
        pipe = getattr(diffusers, case.as_class)(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
    if "sized" in case.pipeline:
        pipe.transformer.register_to_config(sample_size=128)  # by which the pipeline tells that it takes sizes
    call = {"num_inference_steps": STEPS, **case.call}
    if case.pipeline == "DiTPipeline":
        # The pipeline's number of "no class" is 1000; the tiny model's is its last one.
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "class_labels": kwargs["class_labels"].clamp(max=10)}),
            with_kwargs=True,
        )
    else:
        call |= {"prompt": PROMPTS}
        if "image" not in call or "Inpaint" in type(pipe).__name__:
            call |= {"height": case.size, "width": case.size}
    if "image" not in call and case.pipeline != "DiTPipeline":
        sizes = ours._family.sizes(case.size, case.size)
        shape = ours.model.sample_shape(1, **sizes)[1:]
        call["latents"] = torch.from_numpy(batch_normal(SEED, range(2), shape))
    if "PixArt" in case.pipeline:
        call["use_resolution_binning"] = False
    found = []
    if case.pipeline != "DiTPipeline":
        with shared_noise(case.encoded):
            latents = pipe(**call, output_type="latent").images
        if case.pipeline.startswith("Flux"):
            latents = pipe._unpack_latents(latents, case.size, case.size, pipe.vae_scale_factor)
        found.append(latents.numpy())
    if case.picture:
        with shared_noise(case.encoded):
            picture = pipe(**call, output_type="np").images
        found.append(np.asarray(picture).transpose(0, 3, 1, 2))
    return found


rng = np.random.default_rng(0)
SMOOTH = np.clip(rng.uniform(size=(2, 3, 8, 8)).repeat(4, axis=2).repeat(4, axis=3), 0, 1).astype(np.float32)
MASK = np.zeros((SIZE, SIZE), dtype=np.float32)
MASK[8:28, 4:20] = 1.0
# diffusers takes its pictures as tensors in [0, 1], as it does masks.
IMAGE, HOLE = torch.from_numpy(SMOOTH), torch.from_numpy(MASK)[None, None]

GUIDED = {"negative_prompt": NEGATIVE, "guidance_scale": 4.0}
GUIDED_HERE = {"negative_prompts": NEGATIVE, "guidance_scale": 4.0}
UNGUIDED = {"guidance_scale": 0.0}


CASES = {
    "stable diffusion 1": Case(pipeline="StableDiffusionPipeline", request=GUIDED_HERE, call=GUIDED),
    "stable diffusion 1 by default": Case(pipeline="StableDiffusionPipeline", picture=False),
    "stable diffusion 2": Case(pipeline="StableDiffusionPipeline 2", request=GUIDED_HERE, call=GUIDED),
    "img2img": Case(
        pipeline="StableDiffusionImg2ImgPipeline",
        request={"init": SMOOTH, "num_inference_steps": 10},
        call={"image": IMAGE, "num_inference_steps": 10},
        encoded=(ENCODED,),
    ),
    "inpainting": Case(
        pipeline="StableDiffusionPipeline",
        as_class="StableDiffusionInpaintPipeline",
        request={"init": SMOOTH, "mask": MASK},
        call={"image": IMAGE, "mask_image": HOLE},
        encoded=(ENCODED, MASKED),
    ),
    "inpainting from some strength": Case(
        pipeline="StableDiffusionPipeline",
        as_class="StableDiffusionInpaintPipeline",
        request={"init": SMOOTH, "mask": MASK, "strength": 0.7, "num_inference_steps": 10},
        call={"image": IMAGE, "mask_image": HOLE, "strength": 0.7, "num_inference_steps": 10},
        encoded=(ENCODED, MASKED),
        picture=False,
    ),
    "inpainting with nine channels": Case(
        pipeline="StableDiffusionInpaintPipeline",
        request={"init": SMOOTH, "mask": MASK, **GUIDED_HERE},
        call={"image": IMAGE, "mask_image": HOLE, **GUIDED},
        encoded=(MASKED,),
    ),
    "latent consistency": Case(pipeline="LatentConsistencyModelPipeline"),
    "latent consistency with a scale": Case(
        pipeline="LatentConsistencyModelPipeline",
        request={"guidance_scale": 3.0},
        call={"guidance_scale": 3.0},
        picture=False,
    ),
    "sdxl": Case(pipeline="StableDiffusionXLPipeline", request=GUIDED_HERE, call=GUIDED),
    "sdxl with nothing to subtract": Case(pipeline="StableDiffusionXLPipeline", picture=False),
    "sdxl turbo": Case(pipeline="StableDiffusionXLPipeline turbo", request=UNGUIDED, call=UNGUIDED),
    "sdxl refiner": Case(
        pipeline="StableDiffusionXLImg2ImgPipeline refiner",
        request={"init": SMOOTH, "num_inference_steps": 10},
        call={"image": IMAGE, "num_inference_steps": 10},
        encoded=(ENCODED,),
    ),
    "sdxl inpainting with nine channels": Case(
        pipeline="StableDiffusionXLInpaintPipeline",
        request={"init": SMOOTH, "mask": MASK},
        call={"image": IMAGE, "mask_image": HOLE, "strength": 1.0, "guidance_scale": 5.0},
        encoded=(MASKED,),
        picture=False,
    ),
    "sd3": Case(pipeline="StableDiffusion3Pipeline", request=GUIDED_HERE, call=GUIDED),
    "sd3 without t5": Case(pipeline="StableDiffusion3Pipeline without t5", picture=False),
    "sd3 at another size": Case(pipeline="StableDiffusion3Pipeline", size=48, picture=False),
    "sd3 img2img": Case(
        pipeline="StableDiffusion3Pipeline",
        as_class="StableDiffusion3Img2ImgPipeline",
        request={"init": SMOOTH, "strength": 0.33, "num_inference_steps": 10},
        call={"image": IMAGE, "strength": 0.33, "num_inference_steps": 10},
        encoded=(ENCODED,),
        picture=False,
    ),
    "sd3 inpainting": Case(
        pipeline="StableDiffusion3Pipeline",
        as_class="StableDiffusion3InpaintPipeline",
        request={"init": SMOOTH, "mask": MASK},
        call={"image": IMAGE, "mask_image": HOLE, "strength": 1.0},
        encoded=(ENCODED, MASKED),
        picture=False,  # that pipeline leaves the autoencoder's shift out
    ),
    "flux dev": Case(pipeline="FluxPipeline dev", size=64),
    "flux schnell": Case(pipeline="FluxPipeline schnell", call={"max_sequence_length": 256}, size=64),
    "flux with true guidance": Case(
        pipeline="FluxPipeline dev",
        request={"negative_prompts": NEGATIVE, "true_guidance_scale": 2.5, "guidance_scale": 3.0},
        call={"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5, "guidance_scale": 3.0},
        size=48,
        picture=False,
    ),
    "flux img2img": Case(
        pipeline="FluxPipeline dev",
        as_class="FluxImg2ImgPipeline",
        request={"init": SMOOTH, "num_inference_steps": 6, "guidance_scale": 7.0},
        call={"image": IMAGE, "num_inference_steps": 6, "height": SIZE, "width": SIZE},
        encoded=(ENCODED,),
        picture=False,
    ),
    "flux inpainting": Case(
        pipeline="FluxPipeline dev",
        as_class="FluxInpaintPipeline",
        request={"init": SMOOTH, "mask": MASK, "strength": 0.8, "num_inference_steps": 5, "guidance_scale": 7.0},
        call={"image": IMAGE, "mask_image": HOLE, "strength": 0.8, "num_inference_steps": 5},
        encoded=(ENCODED, MASKED),
        picture=False,
    ),
    "pixart": Case(
        pipeline="PixArtAlphaPipeline",
        request=GUIDED_HERE,
        call={**GUIDED, "clean_caption": True},
    ),
    "pixart of many sizes": Case(pipeline="PixArtAlphaPipeline sized", size=48, picture=False),
    "pixart sigma": Case(pipeline="PixArtSigmaPipeline"),
    "dit": Case(pipeline="DiTPipeline", request={"class_labels": [3, "cat"]}, call={"class_labels": [3, 4]}),
    "dit without guidance": Case(
        pipeline="DiTPipeline",
        request={"class_labels": [7, 1], "guidance_scale": 1.0},
        call={"class_labels": [7, 1], "guidance_scale": 1.0},
    ),
}


# of diffusers' Euler schedulers, which hand tensors to numpy
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_draws_what_diffusers_draws(name: str, tiny_pipeline: Callable[[str], Path]) -> None:
    case = CASES[name]
    ours = lehr_pipeline(tiny_pipeline(case.pipeline), case.request.get("num_inference_steps", STEPS))
    request = {"num_inference_steps": STEPS, "height": case.size, "width": case.size, **case.request}
    if ours.prompted:
        request["prompts"] = PROMPTS
    latents = ours.latents(PictureRequest(seed=SEED, **request))
    theirs = drawn_by_diffusers(case, ours)
    if case.pipeline != "DiTPipeline":
        assert peak_db(latents, theirs.pop(0)) >= LATENT_DB
    if theirs:
        assert peak_db(ours.decode(latents), theirs[0]) >= PICTURE_DB
