"""Stages from PyTorch into a bundle: graphs, weights, golden data, and what half precision cannot hold."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import stage_toys as toys
import torch
from torch import nn

from lehr.export import stages as exporting
from lehr.export.stages import EagerStages, StageSource, export_stage
from lehr.export.weights import TorchModuleSource
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import ExportFailed, InvalidInput, UnknownName
from lehr.runtime.golden import Tier
from lehr.runtime.manifest import SCHEMA_VERSION
from lehr.runtime.parity import relative_error
from lehr.runtime.spec import BATCH, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec
from lehr.runtime.stage_golden import read_stage_golden
from lehr.runtime.stages import Stages


@pytest.fixture
def bundle(dit_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(dit_bundle, tmp_path / "p.lehr"))


def put(root: Path, *found: StageSource, tier: Tier | None = None) -> Bundle:
    """The bundle with these stages."""
    opened = Bundle.open(root)
    with opened.edit() as edit:
        entries = [export_stage(edit, one, tier=tier, device="cpu", progress=lambda text: None) for one in found]
        edit.set_manifest(stages={entry.spec.name: entry for entry in entries})
    return Bundle.open(root)


# ---------------------------------------------------------------------------------------------------- what is written


def test_a_stage_stands_in_the_bundle_as_the_denoiser_does(stage_bundle):
    opened = Bundle.open(stage_bundle)
    assert opened.manifest.schema_version == SCHEMA_VERSION
    assert list(opened.manifest.stages) == ["text_encoder", "vae_decoder"]
    entry = opened.manifest.stage("vae_decoder")
    assert entry.spec == toys.DECODER
    assert (entry.graph.file, entry.graph.weights) == (
        "stages/vae_decoder/model.onnx",
        "stages/vae_decoder/weights.safetensors",
    )
    assert entry.graph.parameters == sum(p.numel() for p in toys.Decoder(1.0).parameters())
    assert entry.graph.flops > 2 * 9 * 3 * 8 * (2 * toys.SIZE) ** 2  # the last convolution's alone


def test_golden_outputs_are_what_the_module_computes(stage_bundle):
    golden = read_stage_golden(Bundle.open(stage_bundle), "text_encoder")
    expected = toys.encoder().runnable()(**{name: torch.from_numpy(value) for name, value in golden.inputs.items()})
    for name, value in zip(("last_hidden_state", "text_embeds"), expected, strict=True):
        assert relative_error(value.detach().numpy(), golden.outputs[name]) < 1e-6
    assert len(golden.inputs["input_ids"]) == 2


def test_floors_say_how_far_eager_moves_and_leave_out_a_format_that_overflows(stage_bundle):
    opened = Bundle.open(stage_bundle)
    encoder, decoder = (read_stage_golden(opened, name).floors for name in ("text_encoder", "vae_decoder"))
    assert 0 < encoder["fp16"]["text_embeds"] < encoder["bf16"]["text_embeds"] < 0.1
    assert set(decoder) == {"bf16"}


def test_the_audit_keeps_what_overflows_in_float32_and_nothing_else(stage_bundle):
    kept = Bundle.open(stage_bundle).read_json("stages/vae_decoder/ranges.json")["keep_high"]
    assert kept == {"fp16": ["conv_in/Conv", "norm/GroupNormalization"], "bf16": []}


def test_a_mask_is_a_mark_and_keeps_nothing_in_float32(stage_bundle):
    kept = Bundle.open(stage_bundle).read_json("stages/text_encoder/ranges.json")["keep_high"]
    assert kept == {"fp16": [], "bf16": []}


def test_half_precision_weights_stay_half_as_large(bundle):
    whole = toys.encoder()
    half = toys.TextEncoder().half()
    found = StageSource(
        spec=whole.spec, module=whole.module, weights=TorchModuleSource(half), origin="half", feeds=whole.feeds
    )
    opened = put(bundle, found)
    assert opened.manifest.stage("text_encoder").graph.weight_bytes == 2 * sum(p.numel() for p in half.parameters())


def test_without_weights_there_is_structure_and_nothing_to_compare(bundle):
    found = toys.encoder()
    hollow = StageSource(spec=found.spec, module=found.module, weights=None, origin="none", feeds=found.feeds)
    entry = put(bundle, hollow, tier=Tier.FULL).manifest.stage("text_encoder")
    assert (entry.graph.weights, entry.golden) == (None, None)
    with pytest.raises(ExportFailed, match="without weights"):
        hollow.runnable()


def test_a_stage_without_golden_data_has_weights(bundle):
    opened = put(bundle, toys.decoder(), tier=Tier.NONE)
    assert opened.manifest.stage("vae_decoder").golden is None
    assert opened.names("stages/") == ["stages/vae_decoder/model.onnx", "stages/vae_decoder/weights.safetensors"]


def test_exporting_a_stage_again_drops_its_engines(stage_bundle, tmp_path):
    root = Path(shutil.copytree(stage_bundle, tmp_path / "p.lehr"))
    opened = put(root, toys.decoder(2.0), tier=Tier.NONE)
    kept = {name.split("/")[1] for name in opened.names("stages/") if "/engines/" in name}
    assert kept == {toys.encoder().spec.name}


# --------------------------------------------------------------------------------------------------------- refusals


class Forgetful(nn.Module):
    """Computes something else at each call, in Python, where a trace cannot see it."""

    calls: ClassVar[list[float]] = [1.0]

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return sample * self.calls[0]


def test_a_graph_that_differs_from_eager_does_not_leave_the_exporter(bundle):
    tensor = TensorSpec(name="sample", shape=("batch", 4), varies=Varies.SAMPLE)
    out = TensorSpec(name="out", shape=("batch", 4), varies=Varies.SAMPLE)
    spec = StageSpec(
        name="odd", kind=StageKind.LATENT_ENCODER, family="toy", inputs=(tensor,), outputs=(out,), dims=(BATCH,)
    )
    module = Forgetful()
    found = StageSource(
        spec=spec,
        module=module,
        weights=TorchModuleSource(module),
        origin="none",
        feeds=lambda seed: {"sample": np.ones((2, 4), np.float32)},
    )
    with pytest.raises(ExportFailed, match="stage 'odd' differs from eager"):
        put(bundle, found)
    assert not Bundle.open(bundle).manifest.stages


def test_feeds_that_are_not_the_specs_are_refused(bundle):
    found = toys.decoder()
    wrong = StageSource(
        spec=found.spec, module=found.module, weights=found.weights, origin="", feeds=toys.encoder_feeds
    )
    with pytest.raises(InvalidInput, match="vae_decoder: inputs"):
        put(bundle, wrong)


# ----------------------------------------------------------------------------------------------------------- memory


def test_eager_is_let_go_of_before_the_graph_is_opened(bundle, monkeypatch):
    alive: list[weakref.ref[nn.Module]] = []
    most: list[int] = []
    load, compare = exporting.load_into, exporting.compare_stage

    def loaded(module, weights):
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        alive.append(weakref.ref(module))
        return load(module, weights)

    def compared(*arguments):
        gc.collect()
        assert not [one for one in alive if one() is not None]
        return compare(*arguments)

    monkeypatch.setattr(exporting, "load_into", loaded)
    monkeypatch.setattr(exporting, "compare_stage", compared)
    put(bundle, toys.decoder())
    assert most == [0, 0, 0]  # float32, fp16, bf16: each without another one beside it


# ------------------------------------------------------------------------------------------------------------ eager


def test_eager_stages_stand_in_for_engines_at_sizes_that_were_never_traced(stage_bundle):
    opened = Bundle.open(stage_bundle)
    eager, engines = EagerStages((toys.encoder(), toys.decoder(toys.BEYOND_FP16))), Stages(opened)
    assert eager.names() == engines.names()
    assert eager.spec("vae_decoder") == engines.spec("vae_decoder")
    latent = np.random.default_rng(1).standard_normal((3, toys.CHANNELS, 12, 10)).astype(np.float32)
    with eager.using("vae_decoder") as one, engines.using("vae_decoder") as other:
        expected, got = one({"latent_sample": latent})["sample"], other({"latent_sample": latent})["sample"]
    assert got.shape == (3, 3, 24, 20)
    assert relative_error(expected, got) < 1e-5
    with pytest.raises(UnknownName, match="Did you mean 'vae_decoder'"), eager.using("vae_decode"):
        pass
