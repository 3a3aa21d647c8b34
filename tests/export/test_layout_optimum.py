"""The folder of ONNX graphs for Optimum: what stands in it, and pictures drawn from it by Optimum itself."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner

from lehr.commands.export import command
from lehr.export.checkpoints.files import Pickles
from lehr.export.eager import evaluate
from lehr.export.layout_optimum import GRAPH, Part, _write, lay_out, parts
from lehr.export.weights import load_into
from lehr.runtime.errors import InvalidInput

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
logging.getLogger("diffusers").setLevel(logging.ERROR)
logging.getLogger("transformers").setLevel(logging.ERROR)

Folder = Callable[[str], Path]
OPTIMUM = os.environ.get("LEHR_OPTIMUM", "")  # a folder with optimum-onnx and what it pins, put before all others


def filled(part: Part) -> torch.nn.Module:
    module = part.module
    return load_into(module, part.weights) if any(p.is_meta for p in module.parameters()) else module


# ------------------------------------------------------------------------------------------------ what it holds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "StableDiffusionXLPipeline",
            {
                "unet": ({"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}, ["out_sample"]),
                "text_encoder": (
                    {"input_ids"},
                    ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(3))],
                ),
                "text_encoder_2": (
                    {"input_ids"},
                    ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(4))],
                ),
                "vae_encoder": ({"sample"}, ["latent_parameters"]),
                "vae_decoder": ({"latent_sample"}, ["sample"]),
            },
        ),
        (
            "FluxPipeline dev",
            {
                "transformer": (
                    {
                        "hidden_states",
                        "timestep",
                        "encoder_hidden_states",
                        "pooled_projections",
                        "guidance",
                        "img_ids",
                        "txt_ids",
                    },
                    ["out_hidden_states"],
                ),
                "text_encoder": (
                    {"input_ids"},
                    ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(3))],
                ),
                "text_encoder_2": ({"input_ids"}, ["last_hidden_state"]),
                "vae_encoder": ({"sample"}, ["latent_parameters"]),
                "vae_decoder": ({"latent_sample"}, ["sample"]),
            },
        ),
    ],
)
def test_components_have_optimums_names_and_return_what_they_say(
    name: str, expected: dict[str, tuple[set[str], list[str]]], tiny_pipeline: Folder
) -> None:
    found = {part.name: part for part in parts(tiny_pipeline(name))}
    assert {
        key: ({tensor.name for tensor in part.inputs}, [tensor.name for tensor in part.outputs])
        for key, part in found.items()
    } == expected
    for part in found.values():
        feeds = part.feeds()
        outputs = evaluate(filled(part).eval(), part, feeds)
        assert set(feeds) == {tensor.name for tensor in part.inputs}
        assert all(outputs[tensor.name].ndim == len(tensor.shape) for tensor in part.outputs)


@torch.no_grad()
def test_the_encoder_of_pictures_returns_mean_and_log_variance(tiny_pipeline: Folder) -> None:
    folder = tiny_pipeline("StableDiffusionPipeline")
    part = next(part for part in parts(folder) if part.name == "vae_encoder")
    feeds = part.feeds()
    got = evaluate(filled(part).eval(), part, feeds)["latent_parameters"]
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    expected = vae.encode(torch.from_numpy(feeds["sample"])).latent_dist.parameters.numpy()
    assert np.allclose(got, expected, atol=1e-4)


def test_an_inpainting_unet_takes_nine_channels_and_one_time_for_all(tiny_pipeline: Folder, tmp_path: Path) -> None:
    """Written and compared with eager by the exporter itself; here against diffusers."""
    folder = tiny_pipeline("StableDiffusionInpaintPipeline")
    part = next(iter(parts(folder)))
    _write(part, tmp_path / "unet")
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["in_channels"] == 9
    session = ort.InferenceSession(tmp_path / "unet" / f"{GRAPH}.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((3, 9, 16, 8)).astype(np.float32),
        "timestep": np.array(421.0, dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((3, 7, 32)).astype(np.float32),
    }
    (got,) = session.run(["out_sample"], feeds)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        expected = unet(*(torch.from_numpy(np.asarray(value)) for value in feeds.values())).sample.numpy()
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)


# ------------------------------------------------------------------------------------------------------ refusals


def test_sources_and_outputs_that_cannot_be_are_refused_and_nothing_is_written(
    tiny_pipeline: Folder, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"pickles": Pickles.REFUSED, "overwrite": True, "progress": lambda text: None}
    with pytest.raises(InvalidInput, match="no pipeline's folder"):
        lay_out(tmp_path, tmp_path / "out", **settings)
    with pytest.raises(InvalidInput, match="DiTPipeline, which Optimum has no class for"):
        lay_out(tiny_pipeline("DiTPipeline"), tmp_path / "out", **settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(InvalidInput, match="is not replaced"):
        lay_out(tiny_pipeline("StableDiffusionPipeline"), tmp_path / "mine", **settings)
    with pytest.raises(InvalidInput, match="--overwrite"):
        lay_out(tiny_pipeline("StableDiffusionPipeline"), tmp_path / "mine", **(settings | {"overwrite": False}))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_line_refuses_options_that_shape_a_bundle(tiny_pipeline: Folder, tmp_path: Path) -> None:
    source = str(tiny_pipeline("StableDiffusionPipeline"))
    words = [source, "-o", str(tmp_path / "onnx"), "--layout", "optimum", "--unroll", "4", "--seed", "1"]
    refused = CliRunner().invoke(command, words).exception
    assert isinstance(refused, InvalidInput)
    assert str(refused).startswith("--seed, --unroll")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ pictures

CALLS = {
    "StableDiffusionPipeline": {"negative_prompt": "blue", "guidance_scale": 5.0},
    "StableDiffusionXLPipeline": {"guidance_scale": 5.0},
    "StableDiffusion3Pipeline": {"guidance_scale": 5.0, "max_sequence_length": 32},
    "FluxPipeline dev": {"guidance_scale": 3.5, "max_sequence_length": 32},
    "LatentConsistencyModelPipeline": {"guidance_scale": 5.0},
}
LATENTS = {"StableDiffusion3Pipeline": (1, 16, 8, 8), "FluxPipeline dev": (1, 16, 16)}
COMMON = {"prompt": "a red house", "num_inference_steps": 3, "height": 32, "width": 32, "output_type": "np"}
DRAW = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, onnxruntime, torch
from optimum.onnxruntime import ORTDiffusionPipeline
folder, latents, output, settings = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
pipe = ORTDiffusionPipeline.from_pretrained(folder, export=False, session_options=options)
pipe.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(0)  # what samplers inject
np.save(output, pipe(latents=torch.from_numpy(np.load(latents)), generator=noise, **json.loads(settings)).images)
"""


def for_transformers_4(folder: Path) -> None:
    """Optimum pins transformers 4, which does not read all that version 5 writes; published folders hold both."""
    for tokenizer in folder.glob("tokenizer*"):
        config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        if "extra_special_tokens" in config:
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
            (tokenizer / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if model["type"] == "BPE":
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
            (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))


@pytest.mark.long
@pytest.mark.skipif(not OPTIMUM, reason="LEHR_OPTIMUM names no folder with optimum-onnx")
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore:__array__ implementation:DeprecationWarning"
)
@pytest.mark.parametrize("name", list(CALLS))
def test_optimum_draws_the_pipelines_picture(name: str, tiny_pipeline: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_pipeline(name), source)
    for_transformers_4(source)
    result = CliRunner().invoke(command, [str(source), "-o", str(tmp_path / "onnx"), "--layout", "optimum", "--json"])
    assert result.exit_code == 0, result.output
    latents = np.random.default_rng(0).standard_normal(LATENTS.get(name, (1, 4, 8, 8))).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    settings = {**COMMON, **CALLS[name]}
    arguments = [str(tmp_path / "onnx"), str(tmp_path / "latents.npy"), str(tmp_path / "got.npy"), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": OPTIMUM}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_pipeline(name), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    expected = np.asarray(pipe(latents=torch.from_numpy(latents), generator=noise, **settings).images)
    assert expected.std() > 0.01
    assert -10 * np.log10(np.mean((np.load(tmp_path / "got.npy") - expected) ** 2) + 1e-20) >= 50
