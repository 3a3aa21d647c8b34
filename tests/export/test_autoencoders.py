"""Autoencoders: equal to diffusers' module by module, and read from folders and from their authors' files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

from lehr.engines.graph.tensor_file import SafetensorsFile  # noqa: E402 - after the skips
from lehr.export.autoencoders import kl, maps, tiny  # noqa: E402
from lehr.export.autoencoders.folder import (  # noqa: E402
    decoder_source,
    encoder_source,
    kl_params,
    open_autoencoder,
    read_file,
    read_folder,
)
from lehr.export.checkpoints.rules import Transform, origin  # noqa: E402
from lehr.runtime.errors import InvalidInput  # noqa: E402
from lehr.runtime.pipeline_spec import LatentSpec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TAEF2 = Path(__file__).resolve().parents[3] / "shared" / "models" / "taef2_vae"
EXACT = 1e-5  # relative to the largest value

KLS: dict[str, dict[str, Any]] = {
    "stable diffusion": {},
    "sd3 and flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1},
    "without attention": {"mid_block_add_attention": False, "layers_per_block": 2},
    "one half with a pointwise convolution": {"use_quant_conv": False, "out_channels": 4},
}


def kl_module(*, widths: tuple[int, ...] = (8, 16, 16), groups: int = 4, **options: Any) -> Any:
    torch.manual_seed(len(widths))
    levels = len(widths)
    module = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        norm_num_groups=groups,
        **({"layers_per_block": 1} | options),
    )
    return stirred(module)


def stirred(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def written(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder)
    return folder


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(one: Any, other: Any) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max())


# ------------------------------------------------------------------------------------------- equal to diffusers'


@pytest.mark.parametrize("name", KLS)
def test_both_halves_compute_what_autoencoder_kl_does_at_sizes_that_nobody_named(name: str, tmp_path: Path) -> None:
    module = kl_module(**KLS[name])
    found = read_folder(written(module, tmp_path / "vae"))
    channels = module.config.latent_channels
    assert (found.latent.channels, found.latent.factor) == (channels, 4)
    assert found.latent.scaling_factor == module.config.scaling_factor
    assert found.latent.shift_factor == (module.config.shift_factor or 0)
    assert found.encoder is not None
    latent, picture = normal(3, channels, 6, 10), normal(1, 3, 20, 36, seed=1).clamp(-1, 1)
    with torch.no_grad():
        assert error(found.decoder.runnable()(latent), module.decode(latent).sample) < EXACT
        mean, std = found.encoder.runnable()(picture)
        expected = module.encode(picture).latent_dist
    assert error(mean, expected.mean) < EXACT
    assert error(std, expected.std) < EXACT


def test_a_variance_out_of_bounds_is_cut_as_diffusers_cuts_it() -> None:
    module = kl_module()
    with torch.no_grad():
        module.quant_conv.bias[4:] = torch.tensor([90.0, -90.0, 25.0, 0.0])
        ours = kl.KLEncoder(kl.Params(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4))
        theirs = module.state_dict()
        ours.load_state_dict({key: theirs[key] for key in ours.state_dict()})
        picture = normal(1, 3, 16, 16)
        assert error(ours.eval()(picture)[1], module.encode(picture).latent_dist.std) < EXACT


@pytest.mark.parametrize("options", [{}, {"latent_channels": 16, "num_decoder_blocks": (1, 2, 1, 1)}])
def test_both_halves_compute_what_autoencoder_tiny_does(options: dict[str, Any], tmp_path: Path) -> None:
    module = stirred(
        diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, **options)
    )
    found = read_folder(written(module, tmp_path / "vae"))
    assert found.latent == LatentSpec(channels=module.config.latent_channels, factor=8, scaling_factor=1.0)
    assert found.encoder is not None
    assert [tensor.name for tensor in found.encoder.spec.outputs] == ["mean"]
    latent, picture = 4 * normal(2, found.latent.channels, 5, 3), normal(1, 3, 16, 40, seed=1).clamp(-1, 1)
    with torch.no_grad():
        assert error(found.decoder.runnable()(latent), module.decode(latent).sample) < EXACT
        assert error(found.encoder.runnable()(picture), module.encode(picture).latents) < EXACT


@pytest.mark.parametrize(
    "params, options, count",
    [
        (kl.Params(), {}, 83_653_863),  # Stable Diffusion 1 and 2, SDXL
        (
            kl.Params(latent_channels=16, quant_conv=False, post_quant_conv=False),
            {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
            83_819_683,  # SD3, FLUX
        ),
    ],
)
def test_published_configurations_have_the_published_number_of_parameters(params, options, count) -> None:
    with torch.device("meta"):
        halves = kl.KLEncoder(params), kl.KLDecoder(params)
        theirs = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=params.block_out_channels,
            layers_per_block=2,
            **options,
        )
    assert sum(p.numel() for half in halves for p in half.parameters()) == count
    assert sum(p.numel() for p in theirs.parameters()) == count


def test_the_tiny_autoencoder_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        halves = tiny.TinyEncoder(tiny.Params()), tiny.TinyDecoder(tiny.Params())
        theirs = diffusers.AutoencoderTiny()
    count = sum(p.numel() for half in halves for p in half.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 2_445_063


def test_a_stage_says_its_sizes_and_its_golden_inputs_fit_it(tmp_path: Path) -> None:
    folder = written(kl_module(), tmp_path / "vae")
    for source, name in ((decoder_source(folder, "decoder"), "decoder"), (encoder_source(folder), "vae_encoder")):
        assert source.spec.name == name
        feeds = source.feeds(7)
        bound = source.spec.check_feeds(feeds)
        assert bound["batch"] == 2
        assert all(float(np.std(value)) > 0.1 for value in feeds.values())
        assert source.spec.from_json(source.spec.to_json()) == source.spec
    assert encoder_source(folder).spec.dim("height").multiple == 4
    bad = {"sample": np.zeros((1, 3, 18, 16), np.float32)}
    with pytest.raises(InvalidInput, match="multiple of 4"):
        encoder_source(folder).spec.check_feeds(bad)


# ------------------------------------------------------------------------------------------ other files and names


def as_authors_store(module: Any, prefix: str = "") -> dict[str, Any]:
    """diffusers' autoencoder under CompVis' names."""
    rules = maps.original_rules(len(module.config.block_out_channels))
    stored = {}
    for name, tensor in module.state_dict().items():
        found = origin(rules, name, ())
        kernel = tensor[:, :, None, None] if found.transform is Transform.MATRIX else tensor
        stored[prefix + found.keys[0]] = kernel.contiguous()
    return stored


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
def test_a_file_under_the_authors_names_is_the_same_autoencoder(prefix: str, tmp_path: Path) -> None:
    module = kl_module(widths=(32, 64), groups=32, layers_per_block=2)
    folder = read_folder(written(module, tmp_path / "vae"))
    stored = as_authors_store(module, prefix)
    assert f"{prefix}decoder.up.1.upsample.conv.weight" in stored  # counted from the picture
    others = {"model.diffusion_model.x": torch.zeros(2)} if prefix else {}
    safetensors.save_file(stored | others, tmp_path / "ae.safetensors")
    single = read_file(SafetensorsFile(tmp_path / "ae.safetensors"), folder.latent)
    for one, other in ((single.decoder, folder.decoder), (single.encoder, folder.encoder)):
        assert one is not None
        assert other is not None
        assert one.spec == other.spec
        for key in other.module.state_dict():
            ours, theirs = (np.asarray(side.weights.read(key)).ravel().view(np.uint8) for side in (one, other))
            assert np.array_equal(ours, theirs), key


def test_a_folder_from_before_attention_was_renamed_is_read(tmp_path: Path) -> None:
    module = kl_module()
    folder = written(module, tmp_path / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = {}
    for name, tensor in module.state_dict().items():
        new = next((new for new in old if f"attentions.0.{new}." in name), None)
        stored[name if new is None else name.replace(f".{new}.", f".{old[new]}.")] = tensor
    safetensors.save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    latent = normal(1, 4, 4, 4)
    with torch.no_grad():
        assert error(decoder_source(folder).runnable()(latent), module.decode(latent).sample) < EXACT


@pytest.mark.skipif(not TAEF2.is_dir(), reason="needs a trained autoencoder that is not part of the repository")
def test_a_trained_tiny_autoencoder_gives_photographs_back() -> None:
    """Its authors' numbered files, and what their own code makes of three photographs: 29.4 to 32.9 dB."""
    from PIL import Image

    latent = LatentSpec(channels=32, factor=8, scaling_factor=1.0)
    found = open_autoencoder(TAEF2 / "taef2_decoder.safetensors", latent)
    assert found.encoder is None
    encoder = tiny.TinyEncoder(tiny.Params(latent_channels=32, pooled=True))
    stored = safetensors.load_file(TAEF2 / "taef2_encoder.safetensors")
    encoder.load_state_dict({f"encoder.layers.{key}": tensor.float() for key, tensor in stored.items()})
    with Image.open(TAEF2 / "check.png") as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    sheet = torch.from_numpy(pixels.transpose(2, 0, 1)[None]) / 127.5 - 1
    decoder = found.decoder.runnable()
    for column in range(1, sheet.shape[3], 258):  # cells of 256 pixels in a white frame, decoded ones below
        picture, theirs = (sheet[..., row : row + 256, column : column + 256] for row in (1, 259))
        with torch.no_grad():
            ours = decoder(encoder.eval()(picture)).clamp(-1, 1)
        assert psnr(ours, picture) > 29
        assert psnr(ours, theirs) > 50  # theirs was rounded to bytes


def psnr(one: Any, other: Any) -> float:
    return float(10 * torch.log10(4 / (one - other).pow(2).mean()))


# -------------------------------------------------------------------------------------------------- what is refused


def changed(folder: Path, **options: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return folder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC.*AutoencoderKL, AutoencoderTiny.*--denoiser-only"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"act_fn": "mish"}, "act_fn is 'mish'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types are not 3 times"),
        ({"norm_num_groups": 7}, "8 channels are no multiple of the 7 groups"),
        ({"shift_factor": "much"}, "shift_factor is 'much'"),
        ({"new_option": 1}, "new_option is 1, an option that is not known here"),
        ({"layers_per_block": 10**9}, "layers_per_block 1 to 64"),
        ({"block_out_channels": [8.0, 16, 16]}, "8.0 channels are no multiple"),
        ({"latent_channels": 8}, "does not hold the weights of KLDecoder"),
        ({"layers_per_block": 2}, r"missing \(\d+\)"),
    ],
)
def test_a_folder_that_is_not_understood_in_full_is_refused(options, message: str, tmp_path: Path) -> None:
    folder = changed(written(kl_module(), tmp_path / "vae"), **options)
    with pytest.raises(InvalidInput, match=message):
        read_folder(folder)


def test_what_is_no_autoencoder_or_one_of_other_latents_is_refused(tmp_path: Path) -> None:
    latent = LatentSpec(channels=4, factor=2, scaling_factor=1.0)
    file, module = tmp_path / "x.safetensors", kl_module(widths=(32, 64), groups=32)
    for stored, message in (
        ({"a.weight": torch.zeros(2)}, "holds no autoencoder"),
        (module.state_dict(), "not under CompVis' names"),
        ({k: v for k, v in as_authors_store(module).items() if "conv_out" not in k}, "'decoder.conv_out.weight'"),
        ({k: v for k, v in as_authors_store(module).items() if "mid.attn_1.q" not in k}, "unexpected"),
        ({"0.weight": torch.zeros(2), "1.conv.0.weight": torch.zeros(2)}, "is the encoder"),
    ):
        safetensors.save_file({k: v.contiguous() for k, v in stored.items()}, file)
        with pytest.raises(InvalidInput, match=message):
            read_file(SafetensorsFile(file), latent)
    safetensors.save_file(as_authors_store(module), file)
    for other in (replace(latent, channels=16), replace(latent, factor=8)):
        with pytest.raises(InvalidInput, match="do not belong together"):
            read_file(SafetensorsFile(file), other)
        with pytest.raises(InvalidInput, match="do not belong together"):
            open_autoencoder(written(module, tmp_path / "vae"), other)


def test_a_configuration_that_says_nothing_has_diffusers_defaults() -> None:
    params, latent = kl_params({})
    theirs = diffusers.AutoencoderKL()
    assert params.block_out_channels == theirs.config.block_out_channels
    assert (params.layers_per_block, latent.scaling_factor) == (1, theirs.config.scaling_factor)


@pytest.mark.parametrize(
    "options",
    [
        {"block_out_channels": ()},
        {"layers_per_block": 0},
        {"latent_channels": 0},
        {"block_out_channels": (32,) * 9},
        {"block_out_channels": (48,), "norm_num_groups": 32},
    ],
)
def test_parameters_that_no_network_has_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|no multiple"):
        kl.Params(**options)


@pytest.mark.parametrize(
    "options", [{"encoder_blocks": (1,)}, {"decoder_blocks": (1, 2, 3, 10**9)}, {"channels": 0}, {"channels": 8.0}]
)
def test_parameters_that_no_tiny_network_has_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        tiny.Params(**options)
