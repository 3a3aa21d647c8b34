"""The command line with LoRAs and ControlNets: what it says, stores and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from lehr import cli
from lehr.engines.graph.tensor_file import TensorInfo, write_safetensors


def lehr(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A LoRA of two layers of digits-dit and one of a text encoder that it has not."""
    draws = np.random.default_rng(0)
    shapes = {
        "diffusion_model.blocks.0.attn.qkv": (384, 128),
        "diffusion_model.blocks.1.mlp.fc1": (512, 128),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    }
    tensors = {}
    for layer, (rows, columns) in shapes.items():
        tensors[f"{layer}.lora_A.weight"] = draws.standard_normal((2, columns)).astype(np.float32)
        tensors[f"{layer}.lora_B.weight"] = draws.standard_normal((rows, 2)).astype(np.float32)
    path = tmp_path / "style.safetensors"
    write_safetensors(path, [(key, TensorInfo(a.dtype, a.shape), lambda a=a: a) for key, a in tensors.items()])
    return path


def test_a_converted_lora_changes_what_run_draws(
    dit_bundle: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "style.lora.safetensors"
    code, out, _ = lehr("lora", dit_bundle, published, "-o", converted, "--json", capsys=capsys)
    assert code == 0
    told = json.loads(out)
    assert told["changed"] == {"denoiser": 2}
    assert told["left_out"] == ["text_encoder"]
    assert told["bytes"] == converted.stat().st_size
    drawn = []
    for options in ([], ["--lora", f"{converted}:0.5"], ["--lora", f"{converted}:0"]):
        path = tmp_path / f"{len(drawn)}.npz"
        code, _, err = lehr("run", dit_bundle, "--steps", 2, "--num", 1, "-o", path, *options, capsys=capsys)
        assert code == 0, err
        drawn.append(np.load(path)["samples"])
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    assert np.array_equal(drawn[0], drawn[2])


def test_the_adapters_name_says_what_it_is(
    dit_bundle: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = lehr("lora", dit_bundle, published, "-o", tmp_path / "x.safetensors", capsys=capsys)
    assert code == 2
    assert ".lora.safetensors" in err


def test_a_lora_that_was_not_converted_is_refused(
    dit_bundle: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = lehr("run", dit_bundle, "--lora", published, "-o", tmp_path / "x.npz", capsys=capsys)
    assert code == 2
    assert "lehr lora" in err


@pytest.mark.parametrize("options", [["--control", "edges.png"], ["--control-interval", "0", "0.5"]])
def test_a_denoiser_alone_is_not_steered(
    options: list[str], dit_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = lehr("run", dit_bundle, *options, "-o", tmp_path / "x.npz", capsys=capsys)
    assert code == 2
    assert options[0] in err


def test_an_export_with_adapters_that_cannot_be_read_says_so(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "m.lehr"
    code, _, err = lehr("export", "digits-adm", "-o", output, "--lora", published, capsys=capsys)
    assert code == 2
    assert "blocks.0.attn.qkv" in err
    code, _, err = lehr("export", "digits-dit", "-o", output, "--controlnet", tmp_path, capsys=capsys)
    assert code == 2
    assert "U-Nets of Stable Diffusion" in err
    arguments = ("--structure-only", "--golden", "none", "--lora", published)
    code, _, err = lehr("export", "digits-dit", "-o", output, *arguments, capsys=capsys)
    assert code == 2
    assert "--structure-only" in err
    code, _, err = lehr("export", "sd-1.5", "-o", output, "--controlnet", tmp_path, "--unroll", 2, capsys=capsys)
    assert code == 2
    assert "--unroll" in err
    assert not output.exists()


@pytest.mark.long
def test_a_pipeline_is_steered_and_adapted_by_the_command_line(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bundle, four pictures: plain, steered, with a LoRA of denoiser and text encoder, and the LoRA merged."""
    name, draws = "StableDiffusionPipeline", np.random.default_rng(1)
    folder, control = tiny_pipeline(name), tmp_path / "control"
    unet = tiny_pipelines.pipeline(name).unet
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16))
    for key, parameter in made.named_parameters():
        if key.startswith("controlnet_") and parameter.ndim > 1:
            values = draws.standard_normal(tuple(parameter.shape)) / np.sqrt(parameter[0].numel())
            parameter.data.copy_(torch.from_numpy(values))
    made.save_pretrained(control)
    tensors = {}
    for layer, (rows, columns) in {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (64, 64),
        "text_encoder.text_model.encoder.layers.1.self_attn.v_proj": (32, 32),
    }.items():
        tensors[f"{layer}.lora_A.weight"] = draws.standard_normal((2, columns)).astype(np.float32)
        tensors[f"{layer}.lora_B.weight"] = draws.standard_normal((rows, 2)).astype(np.float32)
    lora = tmp_path / "style.safetensors"
    write_safetensors(lora, [(key, TensorInfo(a.dtype, a.shape), lambda a=a: a) for key, a in tensors.items()])
    Image.fromarray(draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "edges.png")

    def exported(output: Path, *options: object) -> None:
        arguments = ("export", folder, "-o", output, "--steps", 3, "--golden", "none", "--controlnet", control)
        assert lehr(*arguments, *options, capsys=capsys)[0] == 0
        assert lehr("build", output, "--library", "onnxruntime", capsys=capsys)[0] == 0

    def drawn(bundle: Path, *options: object) -> np.ndarray:
        arguments = ("--prompt", "a photo of the cat", "--steps", 3, "-o", tmp_path / "o.npz")
        code, _, err = lehr("run", bundle, *arguments, *options, capsys=capsys)
        assert code == 0, err
        return np.load(tmp_path / "o.npz")["samples"]

    plain, merged, converted = tmp_path / "p.lehr", tmp_path / "m.lehr", tmp_path / "style.lora.safetensors"
    exported(plain)
    exported(merged, "--lora", f"{lora}:0.5")
    assert lehr("lora", plain, lora, "-o", converted, capsys=capsys)[0] == 0
    steering = ("--control", f"{tmp_path / 'edges.png'}:0.9", "--control-interval", 0, 0.7)
    base, steered = drawn(plain), drawn(plain, *steering)
    swapped, expected = drawn(plain, *steering, "--lora", f"{converted}:0.5"), drawn(merged, *steering)
    assert np.abs(base - steered).max() > 1e-3
    assert np.abs(steered - expected).max() > 1e-3
    assert 20 * np.log10(np.linalg.norm(expected) / max(np.linalg.norm(expected - swapped), 1e-30)) > 100
    assert np.array_equal(drawn(plain, *steering), steered)
