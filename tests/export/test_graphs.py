"""The graphs of an export: cut or whole, in the checkpoint's own type, and nothing at all where something fails."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from lehr.engines.build import build
from lehr.engines.graph import tensor_file
from lehr.engines.target import target
from lehr.export.graphs import Cut
from lehr.export.package import Options, export
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import ExportFailed, InvalidInput, RunFailed
from lehr.runtime.golden import Tier
from lehr.runtime.hoisted import Residency
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.recipe import recipe

torch = pytest.importorskip("torch")

# A small network with something for each graph: class and time modulate, the rest sees the sample.
FACTORY = """
import torch
from torch import nn
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import FLOW_PREDICTION
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies

SHAPE = ("batch", 1, "height", 8)
SPEC = ModelSpec(
    name="small",
    inputs=(
        TensorSpec(name="sample", shape=SHAPE, varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
    ),
    outputs=(TensorSpec(name="flow", shape=SHAPE, varies=Varies.SAMPLE),),
    dims=(BATCH, Dim(name="height", default=8, max=64)),
    path=LinearFlow(),
    prediction=FLOW_PREDICTION,
    num_classes=4,
    null_class=3,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.time = nn.Embedding(4, 32), nn.Linear(1, 32)
        self.modulation, self.into, self.out = nn.Linear(32, 128), nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 1, 1)

    def forward(self, sample, timestep, class_labels):
        emb = torch.tanh(self.time(timestep[:, None] / 1000)) + self.table(class_labels)
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        return self.out(torch.tanh(self.into(sample)) * (1 + scale) + shift)


def make():
    return Small(), SPEC


def half():
    return Small().half(), SPEC


class Custom(Small):
    def forward(self, sample, timestep, class_labels):
        return torch.ops.lehr_test.twice(super().forward(sample, timestep, class_labels))


def custom():
    if not hasattr(torch.ops.lehr_test, "twice"):
        @torch.library.custom_op("lehr_test::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            return 2 * x
        @twice.register_fake
        def _(x):
            return torch.empty_like(x)
    return Custom(), SPEC
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factory") / "small_model.py"
    path.write_text(FACTORY)
    return path


def exported(source: str, bundle: Path, **options: Any) -> Bundle:
    export(source, bundle, Options(**options), progress=lambda text: None)
    return Bundle.open(bundle)


def samples(bundle: Bundle, **options: Any) -> Any:
    build(bundle.root, target("cpu"), recipe("fp32"), library="onnxruntime", threads=1)
    request = Request(num=5, batch=2, num_inference_steps=6, guidance_scale=2.0, sizes={"height": 12})
    return Pipeline.open(bundle.root, **options)(request)


@pytest.fixture(scope="module")
def split_bundle(factory: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(f"{factory}:make", tmp_path_factory.mktemp("split") / "m.lehr")


def test_a_cut_network_draws_what_the_whole_one_draws(factory, split_bundle, tmp_path):
    whole = exported(f"{factory}:make", tmp_path / "whole.lehr", cut=Cut.NONE)
    assert list(whole.manifest.graphs) == ["step"]
    assert list(split_bundle.manifest.graphs) == ["schedule", "step"]
    expected = samples(whole)
    for residency in Residency:
        np.testing.assert_allclose(samples(split_bundle, residency=residency), expected, rtol=1e-6, atol=1e-6)


def test_parameters_are_where_they_are_needed_and_only_there(split_bundle):
    graphs = split_bundle.manifest.graphs
    assert graphs["schedule"].parameters == 4 * 32 + 64 + 33 * 128
    assert graphs["step"].parameters == 640 + 65
    assert graphs["step"].weight_bytes == 4 * graphs["step"].parameters
    assert graphs["step"].flops > 2 * 8 * 8 * 64 * 9


def test_a_half_precision_model_is_stored_in_half(factory, split_bundle, tmp_path):
    half = exported(f"{factory}:half", tmp_path / "half.lehr")
    sizes = [b.manifest.files["model/weights.safetensors"].bytes for b in (half, split_bundle)]
    assert sizes[0] < 0.6 * sizes[1]
    drawn = samples(half)
    assert np.abs(drawn - samples(split_bundle)).max() < 0.01
    # The engine of the graph that runs once keeps what was stored; the step engine widens it once and for all.
    size = sum(path.stat().st_size for path in (half.root / "engines").rglob("schedule.*"))
    stored = 2 * half.manifest.graphs["schedule"].parameters
    assert stored < size < 1.5 * stored + 8192


def test_a_custom_operator_is_refused_and_leaves_nothing(factory, tmp_path):
    with pytest.raises(ExportFailed, match="twice"):
        exported(f"{factory}:custom", tmp_path / "m.lehr", tier=Tier.NONE)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_half_written(factory, tmp_path, monkeypatch):
    real_open, written = Path.open, 0

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            written += len(data)
            if written > 5000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name.endswith(".partial") and mode == "wb":
            return Full(self, "wb")
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(tensor_file.Path, "open", opened)
    with pytest.raises(RunFailed, match="No space"):
        exported(f"{factory}:make", tmp_path / "m.lehr", tier=Tier.NONE)
    assert written > 5000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_weights_on_another_file_system_that_is_read_only_are_copied(factory, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(factory.parent))
    other = Path("/dev/shm") / f"lehr-test-{os.getpid()}.safetensors"
    weights = factory.with_name("with_file.py")
    weights.write_text(
        FACTORY + "\n\ndef from_file():\n    from safetensors.torch import load_file\n    module = Small()\n"
        f"    module.load_state_dict(load_file({str(other)!r}))\n    return module, SPEC\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(FACTORY, "factory", "exec"), namespace)
    save_file(namespace["Small"]().state_dict(), other)
    try:
        other.chmod(0o444)
        bundle = exported(f"{weights}:from_file", tmp_path / "m.lehr", tier=Tier.NONE)
    finally:
        other.unlink()
    assert bundle.manifest.files["model/weights.safetensors"].bytes > 4 * 4000


def test_settings_of_a_loop_need_a_loop(factory, tmp_path):
    with pytest.raises(InvalidInput, match="--unroll"):
        exported(f"{factory}:make", tmp_path / "m.lehr", sampler="euler")


def test_a_loop_is_exported_built_and_drawn(factory, tmp_path):
    from lehr.runtime.whole_loop import WholeLoop

    bundle = exported(
        f"{factory}:make", tmp_path / "m.lehr", tier=Tier.NONE, unroll=3, sampler="euler", guidance_scale=2.0
    )
    build(bundle.root, target("cpu"), recipe("fp32"), library="onnxruntime", threads=1)
    request = Request(num=3, batch=2, sampler="euler", num_inference_steps=3, guidance_scale=2.0)
    stepped = Pipeline.open(bundle.root)(request)
    np.testing.assert_allclose(WholeLoop.open(bundle.root)(request), stepped, rtol=1e-5, atol=1e-5)
    assert Bundle.open(bundle.root).manifest.graphs["loop"].parameters == sum(
        graph.parameters for name, graph in bundle.manifest.graphs.items() if name != "loop"
    )
