"""ControlNets against diffusers': the network, the graphs, and whole pipelines with the same weights and noise."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file
from torch import nn

from lehr import cli
from lehr.engines.build import build
from lehr.engines.stages import build_stage
from lehr.engines.target import target
from lehr.export.adapters import Adapters
from lehr.export.checkpoints.controlnet import read_controlnet, with_residuals
from lehr.export.eager import evaluate
from lehr.export.eager_pipeline import eager_text_to_image
from lehr.export.own_scheduler import own_tables
from lehr.export.package import Options, export
from lehr.export.pipelines.read import read_pipeline
from lehr.export.source import Source, resolve
from lehr.export.stages import EagerStages, StageSource
from lehr.runtime import engine as engines
from lehr.runtime.backends.base import Session
from lehr.runtime.bundle import Bundle
from lehr.runtime.controlnet import Steering, controlled, residuals
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import InvalidInput
from lehr.runtime.golden import Tier
from lehr.runtime.hoisted import PROMPT, SCHEDULE, STEP, hoisted_denoiser
from lehr.runtime.latents import STEERED
from lehr.runtime.noise import batch_normal
from lehr.runtime.pipeline import Pipeline, Request, open_denoiser
from lehr.runtime.recipe import recipe
from lehr.runtime.spec import ModelSpec
from lehr.runtime.stages import Stages, StageSet
from lehr.runtime.text_to_image import PictureRequest, TextToImage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SEED, STEPS, SIZE = 5, 4, 32
PROMPTS, NEGATIVE = ["a photo of the cat", "Red house, by the sea"], ["blue night", "a dog"]
CLASSES = {
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
}
LEAST_DB = 50.0

Folder = Callable[[str], Path]


def control_of(unet: nn.Module, seed: int) -> Any:
    """A ControlNet beside a U-Net, its own layers random too, for pictures 4 times as large as the latent."""
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 and name.startswith("controlnet_"):
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.copy_(0.3 * noise / math.sqrt(parameter[0].numel()))
    return made.eval()


@pytest.fixture(scope="module")
def control_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    root = tmp_path_factory.mktemp("controlnets")

    def folder(name: str, seed: int = 3) -> Path:
        path = root / f"{name}-{seed}"
        if not path.is_dir():
            control_of(tiny_pipelines.pipeline(name).unet, seed).save_pretrained(path)
        return path

    return folder


def denoiser(folder: Path) -> Source:
    return resolve(str(folder), preset=None, seed=0, structure_only=False)


def steered(folder: Path, controls: Sequence[Path]) -> tuple[TextToImage, list[StageSource]]:
    """The pipeline with ControlNets, eager throughout."""
    found = denoiser(folder)
    tables = own_tables(str(folder), found.spec, (STEPS,), progress=lambda text: None)
    pipeline = read_pipeline(str(folder), found)
    assert pipeline is not None
    assert tables is not None
    stages = [
        read_controlnet(path, found, name="controlnet" if k == 0 else f"controlnet_{k + 1}")
        for k, path in enumerate(controls)
    ]
    whole = replace(pipeline, denoiser=with_residuals(found, stages), stages=(*pipeline.stages, *stages))
    return eager_text_to_image(whole, tables.tables), stages


rng = np.random.default_rng(0)
PICTURES = rng.uniform(size=(2, 3, SIZE, SIZE)).astype(np.float32)


def draw(ours: TextToImage, request: PictureRequest, steering: Sequence[Steering]) -> np.ndarray:
    return ours(replace(request, controls=tuple(steering)))


def drawn_by_diffusers(name: str, controls: Sequence[Path], **call: Any) -> np.ndarray:
    parts = dict(tiny_pipelines.pipeline(name).components)
    made: Any = [diffusers.ControlNetModel.from_pretrained(path).eval() for path in controls]
    pipe = getattr(diffusers, CLASSES[name])(**parts, controlnet=made if len(made) > 1 else made[0])
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(batch_normal(SEED, range(2), (4, SIZE // 4, SIZE // 4)))
    options = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "negative_prompt": NEGATIVE}
    pictures = pipe(prompt=PROMPTS, latents=latents, output_type="np", **options, **call).images
    return np.asarray(pictures).transpose(0, 3, 1, 2)


def decibels(expected: np.ndarray, actual: np.ndarray) -> float:
    error = float(np.linalg.norm(expected.astype(np.float64) - actual))
    return 20 * math.log10(float(np.linalg.norm(expected)) / max(error, 1e-30))


REQUEST = PictureRequest(
    prompts=PROMPTS,
    negative_prompts=NEGATIVE,
    seed=SEED,
    height=SIZE,
    width=SIZE,
    num_inference_steps=STEPS,
    guidance_scale=4.0,
)

# ------------------------------------------------------------------------------------------------ whole pipelines


@pytest.mark.parametrize("name", list(CLASSES))
def test_steered_pictures_equal_diffusers(
    name: str, tiny_pipeline: Folder, control_folder: Callable[..., Path]
) -> None:
    ours, _ = steered(tiny_pipeline(name), [control_folder(name)])
    mine = draw(ours, REQUEST, [Steering(picture=PICTURES, scale=0.8)])
    image = torch.from_numpy(PICTURES)
    theirs = drawn_by_diffusers(
        name, [control_folder(name)], image=image, guidance_scale=4.0, controlnet_conditioning_scale=0.8
    )
    without = draw(ours, REQUEST, [Steering(picture=PICTURES, scale=0.0)])
    assert decibels(theirs, without) < 35  # the ControlNet changes the picture, so agreement says something
    assert decibels(theirs, mine) > LEAST_DB


def test_two_controlnets_that_act_for_a_while_equal_diffusers(
    tiny_pipeline: Folder, control_folder: Callable[..., Path]
) -> None:
    name = "StableDiffusionPipeline"
    controls = [control_folder(name, 3), control_folder(name, 4)]
    ours, _ = steered(tiny_pipeline(name), controls)
    steering = [
        Steering(picture=PICTURES[0], scale=0.9, start=0.0, end=0.5),
        Steering(picture=PICTURES, scale=0.4, start=0.25, end=1.0),
    ]
    mine = draw(ours, REQUEST, steering)
    first = torch.from_numpy(PICTURES[:1]).expand(2, -1, -1, -1)
    theirs = drawn_by_diffusers(
        name,
        controls,
        image=[first, torch.from_numpy(PICTURES)],
        guidance_scale=4.0,
        controlnet_conditioning_scale=[0.9, 0.4],
        control_guidance_start=[0.0, 0.25],
        control_guidance_end=[0.5, 1.0],
    )
    assert decibels(theirs, mine) > LEAST_DB


def test_flux_steered_by_a_shorter_flux_equals_diffusers(
    tiny_pipeline: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipelines.pipeline("FluxPipeline dev")
    config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1}
    accepted = inspect.signature(diffusers.FluxControlNetModel.__init__).parameters
    control: Any = diffusers.FluxControlNetModel(**{key: value for key, value in config.items() if key in accepted})
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in control.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            wide = parameter.ndim > 1
            parameter.copy_(noise / math.sqrt(parameter[0].numel()) if wide else key.endswith("weight") + noise / 4)
    control.save_pretrained(tmp_path / "control")
    module = importlib.import_module("diffusers.models.autoencoders.vae")

    def encoded(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        return torch.from_numpy(batch_normal(SEED, range(shape[0]), tuple(shape[1:]), stream=STEERED))

    monkeypatch.setattr(module, "randn_tensor", encoded)
    steering_pipe: Any = diffusers.FluxControlNetPipeline(**pipe.components, controlnet=control.eval())
    steering_pipe.set_progress_bar_config(disable=True)
    ours, _ = steered(tiny_pipeline("FluxPipeline dev"), [tmp_path / "control"])
    shape = ours.model.sample_shape(1, **ours._family.sizes(SIZE, SIZE))[1:]
    theirs = steering_pipe(
        prompt=PROMPTS,
        control_image=torch.from_numpy(2 * PICTURES - 1),  # tensors are taken as they are
        controlnet_conditioning_scale=0.7,
        control_guidance_end=0.8,
        latents=torch.from_numpy(batch_normal(SEED, range(2), shape)),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        height=SIZE,
        width=SIZE,
        output_type="np",
    ).images.transpose(0, 3, 1, 2)
    request = replace(REQUEST, negative_prompts=None, guidance_scale=3.0)
    mine = draw(ours, request, [Steering(picture=PICTURES, scale=0.7, end=0.8)])
    assert decibels(theirs, draw(ours, request, [])) < 35
    assert decibels(theirs, mine) > LEAST_DB


def test_pictures_and_controlnets_must_be_of_one_number(
    tiny_pipeline: Folder, control_folder: Callable[..., Path]
) -> None:
    name = "StableDiffusionPipeline"
    ours, _ = steered(tiny_pipeline(name), [control_folder(name)])
    with pytest.raises(InvalidInput, match="1 ControlNets"):
        draw(ours, REQUEST, [Steering(picture=PICTURES)] * 2)
    with pytest.raises(InvalidInput, match="3 pictures"):
        draw(ours, REQUEST, [Steering(picture=np.zeros((3, 3, SIZE, SIZE), np.float32))])


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.5, 0.5), (0.6, 0.2), (0.0, 1.5)])
def test_a_controlnet_that_never_acts_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(InvalidInput, match="start < end"):
        Steering(picture=PICTURES, start=interval[0], end=interval[1])


# ----------------------------------------------------------------------------------------------------- engines


@pytest.fixture(scope="module")
def built(
    tiny_pipeline: Folder, control_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A U-Net with its ControlNet, exported and built; and the U-Net's folder."""
    name = "StableDiffusionXLPipeline"
    bundle, unet = tmp_path_factory.mktemp("steered") / "steered.lehr", tiny_pipeline(name) / "unet"
    options = Options(tier=Tier.NONE, adapters=Adapters(controlnets=(control_folder(name),)))
    export(str(unet), bundle, options, progress=lambda text: None)
    build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime")
    build_stage(bundle, "controlnet", target("cpu"), recipe("fp32"), library="onnxruntime")
    return bundle, unet


def test_engines_of_both_networks_draw_what_eager_draws(
    built: tuple[Path, Path], control_folder: Callable[..., Path]
) -> None:
    path, unet = built
    bundle = Bundle.open(path)
    model, num = bundle.manifest.model, 2
    conditions = {
        tensor.name: normal
        for tensor in model.fixed
        for normal in [_rows(tensor.sizes(model.default_sizes(batch=num)))]
    }
    request = Request(
        num=num,
        num_inference_steps=3,
        conditions=conditions,
        unconditional={"encoder_hidden_states": -conditions["encoder_hidden_states"]},
        guidance_scale=3.0,
    )
    side = 4 * model.dim("height").default
    picture = np.random.default_rng(1).uniform(size=(num, 3, side, side)).astype(np.float32)
    steering = [Steering(picture=picture, scale=0.7, end=0.7)]

    def drawn(network: Denoiser, stages: StageSet) -> np.ndarray:
        pipeline = Pipeline(network)
        with controlled(model, stages, steering, pipeline.table(request), num) as steered:
            return pipeline(request, per_evaluation=steered)

    found = denoiser(unet)
    stage = read_controlnet(control_folder("StableDiffusionXLPipeline"), found)
    module = with_residuals(found, [stage]).runnable().float()
    eager = Denoiser(model, lambda feeds: evaluate(module, model, feeds))
    expected = drawn(eager, EagerStages([stage]))
    assert decibels(expected, drawn(open_denoiser(path), Stages(bundle))) > 100
    assert (
        decibels(expected, Pipeline(open_denoiser(path))(replace(request, conditions={**conditions, **_none(model)})))
        < 40
    )


def _rows(shape: tuple[int, ...]) -> np.ndarray:
    return batch_normal(3, range(shape[0]), shape[1:])


def _none(model: ModelSpec) -> dict[str, np.ndarray]:
    sizes = model.default_sizes(batch=2)
    return {tensor.name: np.zeros(tensor.sizes(sizes), np.float32) for tensor in residuals(model)}


def test_what_a_prompt_fixes_stays_out_of_the_step(built: tuple[Path, Path]) -> None:
    graphs = Bundle.open(built[0]).manifest.graphs
    made = {tensor.name for tensor in residuals(Bundle.open(built[0]).manifest.model)}
    inputs = {name: {tensor.name for tensor in graph.signature.inputs} for name, graph in graphs.items()}
    assert set(inputs) == {PROMPT, SCHEDULE, STEP}
    assert made <= inputs[STEP]
    assert not made & (inputs[PROMPT] | inputs[SCHEDULE])
    assert not {"encoder_hidden_states", "timestep", "text_embeds"} & inputs[STEP]


def test_prompts_are_computed_once_though_residuals_change(built: tuple[Path, Path]) -> None:
    bundle = Bundle.open(built[0])
    model, ran = bundle.manifest.model, []
    record = engines.find(bundle, "cpu", "fp32")

    def load(name: str) -> Session:
        session = engines.load(bundle, record, name)
        return SimpleNamespace(run=lambda feeds: (ran.append(name), session.run(feeds))[1])

    signatures = {name: graph.signature for name, graph in bundle.manifest.graphs.items()}
    network = hoisted_denoiser(model, signatures, load)
    sizes = model.default_sizes(batch=2)
    conditions = {tensor.name: _rows(tensor.sizes(sizes)) for tensor in model.fixed}
    network.prepare([900.0, 500.0], model.sample_shape(1)[1:], [conditions])
    for k, timestep in enumerate((900.0, 500.0)):
        given = {tensor.name: (k + 1) * _rows(tensor.sizes(sizes)) for tensor in residuals(model)}
        network(_rows(model.sample_shape(2)), timestep, {**conditions, **given})
    assert ran.count(PROMPT) <= 2  # a sample first, to learn how large its results are
    assert ran.count(STEP) == 2


# ------------------------------------------------------------------------------------------------------- files


def test_the_authors_file_is_the_folder_under_other_names(
    tiny_pipeline: Folder, control_folder: Callable[..., Path], tmp_path: Path
) -> None:
    name = "StableDiffusionPipeline"
    found, folder = denoiser(tiny_pipeline(name)), control_folder(name)
    stage = read_controlnet(folder, found)
    assert stage.weights is not None
    tensors = {}
    for key in stage.weights.names():
        array = torch.from_numpy(np.array(stage.weights.read(key)))
        tensors[f"control_model.{key.removeprefix('unet.')}"] = array
    tensors |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(10)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "control.safetensors")
    wide = (16, 32, 96, 256)
    with pytest.raises(InvalidInput, match="input_hint_block"):  # of pictures 8 times as large, as published ones are
        read_controlnet(tmp_path / "control.safetensors", found)
    rng = torch.Generator().manual_seed(0)
    hint = {key: tensor for key, tensor in tensors.items() if "input_hint_block" not in key}
    channels = found.module.params.model_channels  # type: ignore[union-attr]
    shapes = [(3, wide[0]), *[pair for a, b in pairwise(wide) for pair in ((a, a), (a, b))], (wide[-1], channels)]
    for k, (narrow, out) in enumerate(shapes):
        hint[f"control_model.input_hint_block.{2 * k}.weight"] = torch.randn(out, narrow, 3, 3, generator=rng)
        hint[f"control_model.input_hint_block.{2 * k}.bias"] = torch.randn(out, generator=rng)
    save_file({key: value.contiguous() for key, value in hint.items()}, tmp_path / "control.safetensors")
    whole = read_controlnet(tmp_path / "control.safetensors", found)
    assert whole.weights is not None
    assert set(whole.weights.names()) == set(whole.module.state_dict())
    key = "unet.middle_block.0.in_layers.2.weight"
    assert np.array_equal(np.asarray(whole.weights.read(key)), np.asarray(stage.weights.read(key)))


def test_a_controlnet_of_another_model_is_refused(tiny_pipeline: Folder, control_folder: Callable[..., Path]) -> None:
    xl = control_folder("StableDiffusionXLPipeline")
    with pytest.raises(InvalidInput, match="another model"):
        read_controlnet(xl, denoiser(tiny_pipeline("StableDiffusionPipeline")))


def test_a_network_without_skip_connections_takes_no_controlnet(control_folder: Callable[..., Path]) -> None:
    found = resolve("digits-dit", preset=None, seed=0, structure_only=False)
    with pytest.raises(InvalidInput, match="U-Nets of Stable Diffusion"):
        read_controlnet(control_folder("StableDiffusionPipeline"), found)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("controlnet_conditioning_channel_order", "bgr", "bgr"),
        ("class_embed_type", "timestep", "class_embed_type"),
        ("_class_name", "AutoencoderKL", "expected a ControlNetModel"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(
    option: str,
    value: str,
    reason: str,
    tiny_pipeline: Folder,
    control_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    name = "StableDiffusionPipeline"
    shutil.copytree(control_folder(name), tmp_path / "changed")
    config = json.loads((tmp_path / "changed/config.json").read_text()) | {option: value}
    (tmp_path / "changed/config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=reason):
        read_controlnet(tmp_path / "changed", denoiser(tiny_pipeline(name)))


@pytest.mark.long
def test_recorded_results_of_both_networks_hold_for_their_engines(
    tiny_pipeline: Folder, control_folder: Callable[..., Path], tmp_path: Path
) -> None:
    name = "StableDiffusionPipeline"
    options = Options(tier=Tier.FULL, adapters=Adapters(controlnets=(control_folder(name),)))
    export(str(tiny_pipeline(name) / "unet"), tmp_path / "m.lehr", options, progress=lambda text: None)
    for arguments in (["build", "--library", "onnxruntime"], ["verify"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([arguments[0], str(tmp_path / "m.lehr"), "--target", "cpu", *arguments[1:]])
        assert not ended.value.code
