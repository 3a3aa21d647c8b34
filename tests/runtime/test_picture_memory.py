"""How much memory a whole pipeline takes with ``--low-memory``: that of its largest stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lehr import cli

SIDE, WIDE = 4096, 8192  # of square matrices and of a layer's inside: 67 MB and 2 x 67 MB in float32


def lehr(*arguments: object) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    assert not exit_.value.code


FACTORY = f"""
import torch
from picture_toy import MODEL


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(4, 2048), torch.nn.Linear(2048, 4)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(2048, {WIDE}), torch.nn.SiLU(), torch.nn.Linear({WIDE}, 2048))
            for _ in range(2)
        )

    def forward(self, sample, timestep, encoder_hidden_states):
        x = self.into(sample.permute(0, 2, 3, 1))
        for layer in self.layers:
            x = x + layer(x)
        text = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return (self.out(x).permute(0, 3, 1, 2) + text + timestep[:, None, None, None] / 1000) / 4


def make():
    return Network(), MODEL
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with 256 MB of text encoder, 256 MB of denoiser and a decoder of next to nothing."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from picture_toy import ALL, FACTOR, FILE, LATENT, TOKENIZER, WIDTH, WORDS, tokenizer_json

    from lehr.export.stages import StageSource, export_stage
    from lehr.export.weights import TorchModuleSource
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.golden import Tier
    from lehr.runtime.pipeline_spec import PipelineSpec

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(len(WORDS), SIDE)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(SIDE, SIDE) for _ in range(4))
            self.out = torch.nn.Linear(SIDE, WIDTH)

        def forward(self, input_ids, attention_mask):
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.out(x) * attention_mask[..., None]

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(4, 3, FACTOR, stride=FACTOR)

        def forward(self, latent_sample):
            return self.up(latent_sample)

    root = tmp_path_factory.mktemp("memory")
    (root / "toy.py").write_text(FACTORY)
    made = root / "toy.lehr"
    lehr("export", f"{root / 'toy.py'}:make", "-o", made, "--golden", "none")
    modules = {"text_encoder": TextEncoder(), "vae_decoder": Decoder()}
    with Bundle.open(made).edit() as edit:
        entries = {}
        for name, module in modules.items():
            source = StageSource(
                spec=ALL[name][0],
                module=module.eval(),
                weights=TorchModuleSource(module),
                origin="random",
                feeds=lambda seed: {},
            )
            entries[name] = export_stage(edit, source, tier=Tier.NONE, device="cpu", progress=lambda text: None)
        edit.add_bytes(FILE, tokenizer_json())
        spec = PipelineSpec(
            family="stable_diffusion", class_name="Toy", tokenizers={"text_encoder": TOKENIZER}, latent=LATENT
        )
        edit.set_manifest(stages=entries, pipeline=spec)
    lehr("build", made, "--library", "onnxruntime")
    return made


@pytest.mark.long
def test_with_little_memory_the_peak_is_the_largest_stage(bundle: Path, run_python: Callable[..., str]) -> None:
    largest = max(
        sum(file.stat().st_size for file in folder.rglob("*.weights")) / 2**20
        for folder in (bundle / "engines", *(bundle / "stages").iterdir())
    )
    assert largest > 200
    peaks = {}
    for low_memory in (True, False):
        printed = run_python(
            f"""
import json
from lehr.runtime.text_to_image import PictureRequest, TextToImage
draw = TextToImage.open({str(bundle)!r}, low_memory={low_memory})
pictures = draw(PictureRequest(prompts=["a red fox"], num=2, batch=1))
lines = dict(line.split(":") for line in open("/proc/self/status"))  # what getrusage says begins with the parent's
print(json.dumps([list(pictures.shape), int(lines["VmHWM"].split()[0]) / 1024]))
"""
        )
        shape, peaks[low_memory] = json.loads(printed)
        assert shape == [2, 3, 32, 32]
    assert peaks[True] <= 1.2 * largest + 200, f"{peaks} MB, largest stage {largest:.0f} MB"
    assert peaks[False] > peaks[True] + 100
