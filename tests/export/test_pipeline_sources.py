"""Whole pipelines as sources: every part of a folder or of single files, held against diffusers' own objects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
tiny = pytest.importorskip("tiny_pipelines", exc_type=ImportError)
safetensors = pytest.importorskip("safetensors.torch")

from lehr import cli  # noqa: E402 - after the skips
from lehr.export.autoencoders import maps as vae_maps  # noqa: E402
from lehr.export.backbones import presets  # noqa: E402
from lehr.export.backbones.preset import Preset  # noqa: E402
from lehr.export.checkpoints.layouts import layouts  # noqa: E402
from lehr.export.checkpoints.rules import Rule, Transform, origin  # noqa: E402
from lehr.export.encoders import maps as text_maps  # noqa: E402
from lehr.export.encoders.maps import Known  # noqa: E402
from lehr.export.pipelines.families import CLASSES, FLUX_DEV, context_width, known_encoders, of_denoiser  # noqa: E402
from lehr.export.pipelines.parts import Parts, assign  # noqa: E402
from lehr.export.pipelines.read import read_pipeline  # noqa: E402
from lehr.export.pipelines.source import PipelineSource  # noqa: E402
from lehr.export.source import Route, resolve  # noqa: E402
from lehr.export.stages import EagerStages  # noqa: E402
from lehr.runtime.bundle import Bundle  # noqa: E402
from lehr.runtime.errors import InvalidInput  # noqa: E402
from lehr.runtime.pipelines import families, family_of  # noqa: E402
from lehr.runtime.stage import StageKind  # noqa: E402
from lehr.runtime.tokenizer import Tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

Folders = Callable[[str], Path]
PROMPT = "a photo of the red cat, 3 zebras"
EXACT = 1e-5  # relative to the largest value
VAE = ("vae_decoder", "vae_encoder")


def read(source: Path, parts: Parts | None = None, **options: Any) -> PipelineSource | None:
    denoiser = resolve(str(source), preset=None, seed=0, structure_only=options.get("structure_only", False))
    return read_pipeline(str(source), denoiser, parts=parts, **options)


def whole(source: Path, parts: Parts | None = None, **options: Any) -> PipelineSource:
    found = read(source, parts, **options)
    assert found is not None
    return found


def copied(folder: Path, to: Path) -> Path:
    """A folder whose files may be changed: configurations are copied, weights linked."""
    shutil.copytree(
        folder,
        to,
        copy_function=lambda a, b: Path(b).symlink_to(a) if a.endswith(".safetensors") else shutil.copy(a, b),
    )
    return to


def rewrite(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def error(one: np.ndarray, other: Any) -> float:
    theirs = other.detach().numpy()
    assert one.shape == theirs.shape
    return float(np.abs(one - theirs).max() / np.abs(theirs).max())


# -------------------------------------------------------------------------------------------------------- folders

STAGES = {
    "StableDiffusion3Pipeline": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "StableDiffusionXLImg2ImgPipeline refiner": ("text_encoder_2",),
    "DiTPipeline": (),
} | dict.fromkeys(
    (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLPipeline turbo",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusion3Pipeline without t5",
        "FluxPipeline dev",
        "FluxPipeline schnell",
    ),
    ("text_encoder", "text_encoder_2"),
)


@pytest.mark.parametrize("name", tiny.MAKERS)
def test_every_part_of_a_pipelines_folder_is_read_and_fits_the_rest(name: str, tiny_pipeline: Folders) -> None:
    found = whole(tiny_pipeline(name))
    encoders = STAGES.get(name, ("text_encoder",))
    assert tuple(stage.spec.name for stage in found.stages) == (*encoders, *VAE)
    assert found.spec.class_name == name.partition(" ")[0]
    assert set(found.tokenizers) == set(found.spec.tokenizers) == set(encoders)
    assert found.left_out == ()
    assert found.spec == type(found.spec).from_json(json.loads(json.dumps(found.spec.to_json())))
    pipe = tiny.pipeline(name)
    latent, vae = found.spec.latent, pipe.vae.config
    assert latent is not None
    assert (latent.channels, latent.factor) == (vae.latent_channels, tiny.FACTOR)
    assert (latent.scaling_factor, latent.shift_factor) == (vae.scaling_factor, vae.shift_factor or 0)
    cells = 128 if "Flux" in name else tiny.LATENT_SIZE  # FLUX's configuration does not say it
    assert family_of(found.spec, found.denoiser.spec).default_size() == (cells * tiny.FACTOR,) * 2
    for stage in found.stages:
        stage.spec.check_feeds(stage.feeds(0))
        assert all(dim.min <= dim.default <= dim.max for dim in stage.spec.dims)


@pytest.mark.parametrize("name", tiny.MAKERS)
def test_tokenizers_encoders_and_decoder_give_what_the_pipelines_own_do(name: str, tiny_pipeline: Folders) -> None:
    found, pipe = whole(tiny_pipeline(name)), tiny.pipeline(name)
    stages = EagerStages(found.stages)
    for stage, spec in found.spec.tokenizers.items():
        theirs = getattr(pipe, stage.replace("text_encoder", "tokenizer"))
        told = theirs([PROMPT], padding="max_length", max_length=spec.max_length, truncation=True, return_tensors="pt")
        tokens = Tokenizer(spec, found.tokenizers[stage])([PROMPT])
        assert np.array_equal(tokens.ids, told.input_ids.numpy())
        module = getattr(pipe, stage)
        feeds = {"input_ids": tokens.ids}
        with torch.no_grad():
            expected = module(told.input_ids, output_hidden_states=True)
        with stages.using(stage) as encoder:
            if len(encoder.spec.inputs) == 2:
                feeds["attention_mask"] = np.ones_like(tokens.ids)
            outputs = encoder(feeds)
        values = {"penultimate_hidden_state": expected.hidden_states[-2]} | dict(expected.items())
        assert outputs
        for output, value in outputs.items():
            assert error(value, values[output]) < EXACT
    latent = np.random.default_rng(0).standard_normal((1, found.spec.latent.channels, 6, 4)).astype(np.float32)
    with torch.no_grad(), stages.using("vae_decoder") as decoder:
        expected = pipe.vae.decode(torch.from_numpy(latent)).sample
        assert error(decoder({"latent_sample": latent})["sample"], expected) < EXACT


def test_lengths_of_prompts_are_those_of_the_classes(tiny_pipeline: Folders) -> None:
    expected = {
        "StableDiffusionPipeline": (77,),
        "StableDiffusion3Pipeline": (77, 77, 256),
        "FluxPipeline dev": (77, 512),
        "FluxPipeline schnell": (77, 256),
        "PixArtAlphaPipeline": (120,),
        "PixArtSigmaPipeline": (300,),
    }
    for name, lengths in expected.items():
        tokenizers = whole(tiny_pipeline(name)).spec.tokenizers
        assert tuple(spec.max_length for spec in tokenizers.values()) == lengths


def test_what_a_configuration_says_about_drawing_becomes_options(tiny_pipeline: Folders) -> None:
    base, refiner = (
        whole(tiny_pipeline(name)).spec.options
        for name in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline refiner")
    )
    assert base["force_zeros_for_empty_prompt"] is True
    assert refiner == {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    labels = json.loads(str(whole(tiny_pipeline("DiTPipeline")).spec.options["id2label"]))
    assert labels == {str(number): name for number, name in tiny.LABELS.items()}
    sd3 = whole(tiny_pipeline("StableDiffusion3Pipeline")).spec.options
    assert sd3["flow_shift"] == 3.0
    assert whole(tiny_pipeline("FluxPipeline dev")).spec.options["flow_max_shift"] == 1.15
    assert whole(tiny_pipeline("LatentConsistencyModelPipeline")).denoiser.spec.sampling.num_inference_steps == 4


@pytest.mark.parametrize("name", ["DiTPipeline", "PixArtAlphaPipeline"])
def test_folders_from_before_a_transformer_had_its_own_class_are_read(
    name: str, tiny_pipeline: Folders, tmp_path: Path
) -> None:
    folder = copied(tiny_pipeline(name), tmp_path / "old")
    before = whole(folder)
    old = {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False}
    text = {} if name.startswith("PixArt") else {"cross_attention_dim": None}
    rewrite(
        folder / "transformer" / "config.json",
        _class_name="Transformer2DModel",
        use_linear_projection=False,
        **old,
        **text,
    )
    found = whole(folder)
    assert found.denoiser.route is before.denoiser.route is Route.CHECKPOINT
    assert found.denoiser.spec == before.denoiser.spec
    assert found.denoiser.module.params == before.denoiser.module.params


def test_a_component_that_is_not_exported_is_named(tiny_pipeline: Folders, tmp_path: Path) -> None:
    folder = copied(tiny_pipeline("StableDiffusionPipeline"), tmp_path / "sd")
    rewrite(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    rewrite(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    assert set(whole(folder).left_out) == {"safety_checker", "image_encoder"}


def test_structure_alone_has_no_weights(tiny_pipeline: Folders) -> None:
    found = whole(tiny_pipeline("PixArtAlphaPipeline"), structure_only=True)
    assert [stage.weights for stage in found.stages] == [None] * 3


# ------------------------------------------------------------------------------------- denoisers that stand alone


def test_a_denoiser_and_its_scheduler_are_no_pipeline(tiny_pipeline: Folders, tmp_path: Path) -> None:
    folder = tiny_pipeline("StableDiffusionPipeline")
    assert read(folder / "unet") is None
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "X"]}
    alone = copied(folder / "unet", tmp_path / "pixels" / "unet").parent
    (alone / "model_index.json").write_text(json.dumps(index))
    assert read(alone) is None
    assert read(folder / "unet" / "diffusion_pytorch_model.safetensors") is None


def test_parts_beside_what_takes_none_are_refused(tiny_pipeline: Folders) -> None:
    for source in ("digits-dit", str(tiny_pipeline("StableDiffusionPipeline") / "unet")):
        denoiser = resolve(source, preset=None, seed=0, structure_only=True)
        with pytest.raises(InvalidInput, match="Leave them out"):
            read_pipeline(source, denoiser, parts=Parts(vae=Path("x")))


# ---------------------------------------------------------------------------------------------- damaged and foreign


def break_class(folder: Path) -> None:
    rewrite(folder / "model_index.json", _class_name="WuerstchenPipeline")


def break_text(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


def break_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()


def break_vae(folder: Path) -> None:
    rewrite(folder / "vae" / "config.json", latent_channels=8)


def break_vae_json(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")


def break_scheduler(folder: Path) -> None:
    rewrite(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler", shift="x")


def break_encoder(folder: Path) -> None:
    rewrite(folder / "text_encoder" / "config.json", model_type="gpt2")


def break_index(folder: Path) -> None:
    rewrite(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    shutil.rmtree(folder / "text_encoder")


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_class, "WuerstchenPipeline.*DiTPipeline.*StableDiffusionXLPipeline.*--denoiser-only"),
        (break_text, "lacks text_encoder/.*--denoiser-only"),
        (break_index, "lacks text_encoder/"),
        (break_tokenizer, "holds no tokenizer|names no longest prompt"),
        (break_vae, "does not hold the weights of KLDecoder"),
        (break_vae_json, "no readable configuration"),
        (break_scheduler, "scheduler_config.json is not what diffusers writes"),
        (break_encoder, "model_type 'gpt2' is no text encoder"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_with_what_to_do(
    damage: Callable[[Path], None], message: str, tiny_pipeline: Folders, tmp_path: Path
) -> None:
    folder = copied(tiny_pipeline("StableDiffusionPipeline"), tmp_path / "sd")
    denoiser = resolve(str(folder), preset=None, seed=0, structure_only=True)
    damage(folder)
    with pytest.raises(InvalidInput, match=message):
        read_pipeline(str(folder), denoiser)


def test_parts_of_two_pipelines_are_not_put_together(tiny_pipeline: Folders) -> None:
    folder, other = tiny_pipeline("StableDiffusionPipeline"), tiny_pipeline("StableDiffusion3Pipeline")
    with pytest.raises(InvalidInput, match=r"16 latent channels.*expects 4"):
        read(folder, Parts(vae=other / "vae"))
    with pytest.raises(InvalidInput, match=r"text of 32 channels, text_encoder give 72"):
        read(folder, Parts(text_encoders=(str(other / "text_encoder_3"),), tokenizers=(str(other / "tokenizer_3"),)))


def test_another_autoencoder_takes_the_place_of_the_folders(tiny_pipeline: Folders, tmp_path: Path) -> None:
    widths = (8,) * 3
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    small.save_pretrained(tmp_path / "tiny")
    found = whole(tiny_pipeline("StableDiffusionPipeline"), Parts(vae=tmp_path / "tiny"))
    assert {stage.spec.family for stage in found.stages} == {"clip_text", "autoencoder_tiny"}
    assert found.spec.latent is not None
    assert found.spec.latent.scaling_factor == 1.0


def test_every_class_is_one_of_diffusers_and_of_a_family_that_can_be_drawn_with() -> None:
    for name, kind in CLASSES.items():
        assert hasattr(diffusers, name)
        assert kind.family in families()


def test_paths_go_to_stages_by_name_and_then_in_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b=c"
    a.mkdir()
    b.mkdir()
    stages = ("text_encoder", "text_encoder_2")
    assert assign((str(b), f"text_encoder={a}"), stages, "--x") == {"text_encoder": a, "text_encoder_2": b}
    for given, message in (
        ((f"text_encoder_9={a}",), "unknown stage 'text_encoder_9'.*Did you mean"),
        ((f"text_encoder={a}", f"text_encoder={a}"), "twice"),
        ((str(a), str(a), str(a)), "3 times, and the pipeline has 2"),
        ((str(tmp_path / "no"),), "does not exist"),
    ):
        with pytest.raises(InvalidInput, match=message):
            assign(given, stages, "--x")


# --------------------------------------------------------------------------------------------------- single files


def stored(ours: dict[str, Any], rules: tuple[Rule, ...], prefix: str) -> dict[str, Any]:
    """Tensors under the names from which ``rules`` would make ours."""
    found: dict[str, Any] = {}
    thirds: dict[str, dict[Transform, Any]] = {}
    for name, tensor in ours.items():
        source = origin(rules, name, ())
        key = prefix + source.keys[0]
        match source.transform:
            case None:
                found[key] = tensor
            case Transform.MATRIX:
                found[key] = tensor[:, :, None, None]
            case Transform.TRANSPOSE:
                found[key] = tensor.T
            case third:
                thirds.setdefault(key, {})[third] = tensor
    for key, parts in thirds.items():
        found[key] = torch.cat(
            [parts[part] for part in (Transform.FIRST_THIRD, Transform.SECOND_THIRD, Transform.LAST_THIRD)]
        )
    return {key: tensor.contiguous() for key, tensor in found.items()}


def tensors(stage: Any) -> dict[str, Any]:
    """A stage's (or denoiser's) weights under our names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stage.module.state_dict().items()}
    raw = {name: stage.weights.read(name) for name in shapes}
    return {
        name: torch.from_numpy(np.frombuffer(np.asarray(value).tobytes(), np.float32).reshape(shapes[name]).copy())
        for name, value in raw.items()
    }


@pytest.mark.parametrize(
    "preset, family, encoders",
    [
        ("sd-1.5", "stable_diffusion", (Known.CLIP_L,)),
        ("sd-1.5-inpainting", "stable_diffusion", (Known.CLIP_L,)),
        ("sd-2.1", "stable_diffusion", (Known.OPENCLIP_H,)),
        ("lcm-sd-1.5", "latent_consistency", (Known.CLIP_L,)),
        ("sdxl-base", "stable_diffusion_xl", (Known.CLIP_L, Known.OPENCLIP_G)),
        ("sdxl-refiner", "stable_diffusion_xl", (Known.OPENCLIP_G,)),
        ("sd3-medium", "stable_diffusion_3", (Known.CLIP_L_PROJECTED, Known.OPENCLIP_G, Known.T5_XXL)),
        ("flux-dev", "flux", (Known.CLIP_L, Known.T5_XXL)),
        ("flux-schnell", "flux", (Known.CLIP_L, Known.T5_XXL)),
        ("pixart-xl-2-1024", "pixart_alpha", (Known.T5_XXL,)),
        ("dit-xl-2", "dit", ()),
    ],
)
def test_the_published_encoders_of_a_denoiser_are_as_wide_as_its_text(preset, family, encoders) -> None:
    spec = presets()[preset].spec
    kind = of_denoiser(spec)
    assert kind is not None
    assert kind.family == family
    known = known_encoders(kind, spec)
    assert tuple(known.values()) == encoders
    params = {part.stage: text_maps.PARAMS[known[part.stage]] for part in kind.text if part.stage in known}
    widths = [
        getattr(params[part.stage], "hidden_size", None) or params[part.stage].d_model
        for part in kind.text
        if part.context and part.stage in params
    ]
    assert context_width(spec) == (sum(widths) or None)
    channels = spec.sample_shape(1)
    assert kind.latent.channels == (channels[2] // 4 if len(channels) == 3 else channels[1])


def test_a_denoiser_of_pixels_belongs_to_no_pipeline() -> None:
    assert of_denoiser(presets()["adm-imagenet-64"].spec) is None


def register(denoiser: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Make a denoiser a preset, by which single files are known; its spec and parameters."""
    spec, params = replace(denoiser.spec, name=name), denoiser.module.params
    monkeypatch.setitem(presets(), name, Preset(params=params, build=type(denoiser.module), spec=spec))
    return spec, params


PREFIX = {
    ("StableDiffusionPipeline", "text_encoder"): (Known.CLIP_L, "cond_stage_model.transformer."),
    ("StableDiffusionXLPipeline", "text_encoder"): (Known.CLIP_L, "conditioner.embedders.0.transformer."),
    ("StableDiffusionXLPipeline", "text_encoder_2"): (Known.OPENCLIP_G, "conditioner.embedders.1.model."),
}


@pytest.fixture
def single(
    tiny_pipeline: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], tuple[Path, Any]]:
    """A pipeline as one file under the authors' names, made known; and the same pipeline as a folder."""

    def make(name: str) -> tuple[Path, Any]:
        folder = copied(tiny_pipeline(name), tmp_path / "folder")
        torch.manual_seed(1)
        vae = diffusers.AutoencoderKL(  # norms of the authors' code have 32 groups, and a cell 8 pixels
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            layers_per_block=1,
            scaling_factor=0.13025 if "XL" in name else 0.18215,
        )
        shutil.rmtree(folder / "vae")
        vae.save_pretrained(folder / "vae")
        found = whole(folder)
        spec, params = register(found.denoiser, f"tiny {name}", monkeypatch)
        unet = layouts(spec.family, params)[0]
        everything = stored(tensors(found.denoiser), unet.rules, "model.diffusion_model.")
        if "XL" in name:  # whose rules name the prefix themselves
            everything = {key.removeprefix("model.diffusion_model."): value for key, value in everything.items()}
        for stage in found.stages:
            if stage.spec.name in VAE:
                everything |= stored(tensors(stage), vae_maps.original_rules(4), "first_stage_model.")
                continue
            known, prefix = PREFIX[name, stage.spec.name]
            monkeypatch.setitem(text_maps.PARAMS, known, stage.module.params)
            everything |= stored(tensors(stage), text_maps.LAYOUTS[known][0].rules, prefix)
            if known is Known.CLIP_L:  # what published files have besides
                everything[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
                everything[f"{prefix}text_projection.weight"] = torch.zeros(2, 2)
        safetensors.save_file(everything, tmp_path / "all.safetensors")
        return tmp_path / "all.safetensors", found

    return make


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_single_file_and_a_folder_are_one_pipeline(name: str, single: Any, tmp_path: Path) -> None:
    file, folder = single(name)
    parts = Parts(tokenizers=(str(tmp_path / "folder" / "tokenizer"),))
    found = whole(file, parts)
    assert found.spec.family == folder.spec.family
    assert found.spec.class_name == name
    assert found.spec.latent == folder.spec.latent
    assert found.spec.tokenizers == folder.spec.tokenizers
    assert {stage.spec.name for stage in found.stages} == {stage.spec.name for stage in folder.stages}
    theirs = {stage.spec.name: stage for stage in folder.stages}
    for stage in found.stages:
        expected = tensors(theirs[stage.spec.name])
        for key, tensor in tensors(stage).items():
            assert torch.equal(tensor, expected[key]), key
        assert stage.spec == theirs[stage.spec.name].spec
    if "XL" in name:
        assert found.spec.options == {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False}


def test_a_single_file_asks_for_the_vocabulary_that_it_does_not_hold(single: Any, tmp_path: Path) -> None:
    file, _ = single("StableDiffusionPipeline")
    with pytest.raises(
        InvalidInput, match=r"no vocabulary.*vocab\.json and merges\.txt.*--tokenizer text_encoder=PATH"
    ):
        read(file)
    inside = tmp_path / "folder" / "tokenizer" / "tokenizer.json"
    for given in (tmp_path / "folder", inside, f"text_encoder={inside}"):
        found = whole(file, Parts(tokenizers=(str(given),)))
        assert found.tokenizers["text_encoder"] == inside.read_bytes()
    with pytest.raises(InvalidInput, match="is no tokenizer"):
        read(file, Parts(tokenizers=(str(file),)))


def test_a_denoiser_in_a_file_becomes_a_pipeline_once_the_rest_is_named(
    tiny_pipeline: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tiny_pipeline("FluxPipeline dev")
    denoiser = whole(folder).denoiser
    _, params = register(denoiser, "tiny flux", monkeypatch)
    file = tmp_path / "flux.safetensors"
    safetensors.save_file(stored(tensors(denoiser), layouts("flux", params)[0].rules, ""), file)
    assert read(file) is None
    encoders = Parts(
        text_encoders=(str(folder / "text_encoder"), str(folder / "text_encoder_2")),
        tokenizers=(str(folder / "tokenizer"), str(folder / "tokenizer_2")),
    )
    with pytest.raises(InvalidInput, match=r"holds no autoencoder.*--vae PATH"):
        read(file, encoders)
    with pytest.raises(InvalidInput, match=r"4 latent channels and 4 pixels.*expects 16 and 8"):
        read(file, replace(encoders, vae=folder / "vae"))
    with pytest.raises(InvalidInput, match=r"holds no text_encoder \(clip-l\).*--text-encoder text_encoder=PATH"):
        read(file, Parts(vae=folder / "vae"))
    small = replace(FLUX_DEV, latent=replace(FLUX_DEV.latent, channels=4, factor=4))
    monkeypatch.setattr("lehr.export.pipelines.families.FLUX_DEV", small)
    found = whole(file, replace(encoders, vae=folder / "vae"))
    expected = whole(folder)
    assert found.spec.tokenizers == expected.spec.tokenizers
    assert found.spec.latent == expected.spec.latent
    assert [stage.spec for stage in found.stages] == [stage.spec for stage in expected.stages]


# --------------------------------------------------------------------------------------------------- command line


def lehr(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(exit_.value.code or 0), out, err


def test_export_writes_a_bundle_of_the_whole_pipeline_whose_graphs_take_sizes_that_nobody_named(
    tiny_pipeline: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    folder, output = tiny_pipeline("DiTPipeline"), tmp_path / "dit.lehr"
    code, out, _ = lehr("export", folder, "-o", output, "--golden", "none", "--no-split", "--json", capsys=capsys)
    assert code == 0
    said = json.loads(out)
    assert said["pipeline"] == "DiTPipeline"
    assert list(said["stages"]) == list(VAE)
    assert said["left_out"] == []
    bundle = Bundle.open(output)
    manifest = bundle.manifest
    assert manifest.pipeline == whole(folder).spec
    decoder, encoder = (manifest.stages[name] for name in VAE)
    assert (decoder.spec.kind, encoder.spec.kind) == (StageKind.LATENT_DECODER, StageKind.LATENT_ENCODER)
    vae = tiny.pipeline("DiTPipeline").vae
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((3, 4, 6, 14)).astype(np.float32)
    picture = rng.uniform(-1, 1, (1, 3, 24, 44)).astype(np.float32)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latent)).sample
        moments = vae.encode(torch.from_numpy(picture)).latent_dist
    ran = {
        entry.spec.name: onnxruntime.InferenceSession(str(bundle.path(entry.graph.file))).run(None, feeds)
        for entry, feeds in ((decoder, {"latent_sample": latent}), (encoder, {"sample": picture}))
    }
    assert error(ran["vae_decoder"][0], expected) < 1e-4
    assert error(ran["vae_encoder"][0], moments.mean) < 1e-4
    assert error(ran["vae_encoder"][1], moments.std) < 1e-4
    assert sum(said["stages"].values()) == sum(p.numel() for p in vae.parameters())


def test_export_leaves_the_rest_of_a_pipeline_out_when_asked(
    tiny_pipeline: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tiny_pipeline("DiTPipeline"), tmp_path / "alone.lehr"
    options = ("--denoiser-only", "--structure-only", "--no-split", "--json")
    code, out, _ = lehr("export", folder, "-o", output, *options, capsys=capsys)
    assert code == 0
    said = json.loads(out)
    assert (said["pipeline"], said["stages"]) == (None, {})
    manifest = Bundle.open(output).manifest
    assert (manifest.pipeline, dict(manifest.stages)) == (None, {})
    code, _, err = lehr("export", folder, "-o", output, "--denoiser-only", "--vae", folder, capsys=capsys)
    assert code == 2
    assert "give one or the other" in err
