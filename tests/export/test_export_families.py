"""Every family of the registry, exported: what ONNX Runtime computes is what the module does, at shapes never seen.

The configurations are presets with fewer and narrower layers, so the presets' own specs describe them and a new
family is tested without a new test. Its fields are made small by name; a family that calls them otherwise must teach
``SMALL`` its names.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lehr.engines.graph.check import check_graph
from lehr.engines.graph.split import split
from lehr.engines.graph.weights import bind_weights, save_graph
from lehr.export.backbones import families, presets
from lehr.export.backbones.preset import Preset
from lehr.export.trace import trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.backends.onnxruntime import BACKEND
from lehr.runtime.hoisted import HoistedNetwork
from lehr.runtime.spec import DType, ModelSpec

SOURCES = Path(__file__).resolve().parents[2] / "src"
TOLERANCE = 1e-4  # relative to the largest output
LARGEST = 20_000_000  # parameters of a configuration that counts as small

# ---------------------------------------------------------------------------------------------- small configurations

SMALL: dict[str, Callable[[Any], Any]] = {
    "axes_dim": lambda p: (4, 10, 10),
    "block_out_channels": lambda p: (32,) * len(p.block_out_channels),
    "channel_mult": lambda p: tuple(min(1, mult) for mult in p.channel_mult),
    "depth": lambda p: 2,
    "depth_single_blocks": lambda p: 2,
    "dual_attention": lambda p: min(1, p.dual_attention),
    "hidden_size": lambda p: 48,
    "layers_per_block": lambda p: 1,
    "middle_depth": lambda p: 1,
    "model_channels": lambda p: 64,
    "num_head_channels": lambda p: p.num_head_channels and 32,
    "num_heads": lambda p: 2,
    "num_res_blocks": lambda p: 1,
    "transformer_depth": lambda p: tuple(min(1, depth) for depth in p.transformer_depth),
}


def small(preset: Preset) -> Any:
    named = [field.name for field in fields(preset.params) if field.name in SMALL]
    return replace(preset.params, **{name: SMALL[name](preset.params) for name in named})


_TRACED_ELSEWHERE = {"adm", "dit", "sit"}  # at more shapes, by test_trace; SiT's layers are DiT's


def representatives() -> Iterator[Any]:
    """The first preset of each family; with -m long, all that differ in more than size."""
    seen = set()
    for family in families():
        for number, (name, preset) in enumerate(
            importlib.import_module(f"lehr.export.backbones.{family}").PRESETS.items()
        ):
            if (family, small(preset)) not in seen:
                seen.add((family, small(preset)))
                yield pytest.param(name, marks=[pytest.mark.long] if number or family in _TRACED_ELSEWHERE else [])


def randomise(module: nn.Module) -> nn.Module:
    """Weights at a scale that keeps signals of order one, those that start at zero or one included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def unseen(spec: ModelSpec) -> dict[str, int]:
    """Sizes that differ from those of the trace, and from each other."""
    return {
        dim.name: 3 if dim.name == "batch" else dim.multiple * (2 + number % 2 + 5 * (dim.multiple == 1))
        for number, dim in enumerate(spec.dims)
    }


def random_feeds(spec: ModelSpec, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ends = sorted((spec.path.first_timestep, spec.path.last_timestep))
    feeds: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = tensor.sizes(sizes)
        if tensor is spec.timestep:
            feeds[tensor.name] = rng.uniform(*ends, shape).astype(tensor.dtype.numpy)
        elif tensor.dtype is DType.INT64:
            feeds[tensor.name] = rng.integers(0, spec.num_classes or 2, shape)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype.numpy)
    return feeds


@pytest.mark.parametrize("name", list(representatives()))
def test_a_family_computes_the_same_after_export_at_shapes_it_was_not_traced_at(name: str, tmp_path: Path) -> None:
    preset = presets()[name]
    module, spec = randomise(preset.build(small(preset))), preset.spec
    assert sum(parameter.numel() for parameter in module.parameters()) < LARGEST, "teach SMALL this family's names"
    graph = trace(module, spec)
    parts = split(graph, spec)
    bind_weights(
        [graph, *(part.model for part in parts.values())], TorchModuleSource(module), tmp_path / "w.safetensors"
    )
    save_graph(graph, tmp_path / "whole.onnx")
    check_graph(tmp_path / "whole.onnx", spec)
    for part_name, part in parts.items():
        save_graph(part.model, tmp_path / f"{part_name}.onnx")
        check_graph(tmp_path / f"{part_name}.onnx", part.spec)
    session = ort.InferenceSession(tmp_path / "whole.onnx", providers=["CPUExecutionProvider"])
    sizes = unseen(spec)
    assert all(size != spec.dim(name).default for name, size in sizes.items())
    feeds = random_feeds(spec, sizes)
    outputs = dict(zip([tensor.name for tensor in spec.outputs], session.run(None, feeds), strict=True))
    spec.check_outputs(outputs, spec.check_feeds(feeds))
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).numpy()
    got = outputs[spec.outputs[0].name]
    assert np.abs(expected).max() > 1e-3
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()

    # Cut by rate: the same batch, then one of other samples, each at a timestep of its own.
    options = {"intra_op_threads": 0, "spinning": False}
    signatures = {part_name: part.spec for part_name, part in parts.items()}
    network = HoistedNetwork(spec, signatures, lambda part_name: BACKEND.load(tmp_path / f"{part_name}.onnx", options))
    for order in ([*range(sizes["batch"])], [1, 0, 0]):
        batch = {
            tensor.name: feeds[tensor.name][order] if tensor.batched else feeds[tensor.name] for tensor in spec.inputs
        }
        of_parts, of_whole = network(batch)[spec.outputs[0].name], session.run(None, batch)[0]
        assert np.abs(of_parts - of_whole).max() <= 1e-5 * np.abs(of_whole).max()


# ------------------------------------------------------------------------------------------------- structure only

_STRUCTURE = """
import sys, torch
from pathlib import Path
from lehr.export.backbones import preset
from lehr.export.trace import trace
from lehr.engines.graph.weights import parameter_count, save_graph
from lehr.runtime.host import peak_rss_mb
chosen = preset(sys.argv[1])
with torch.device("meta"):
    module = chosen.module()
graph = trace(module, chosen.spec)
save_graph(graph, Path(sys.argv[2]))
print(parameter_count(graph) - sum(b.numel() for b in module.buffers()), peak_rss_mb())
"""
_DEFAULT = ("dit-s-8", "flux-dev")  # a small one and one of 12 billion parameters


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _DEFAULT else [pytest.mark.long]) for name in sorted(presets())]
)
def test_a_preset_is_traced_without_weights_in_1200_megabytes(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STRUCTURE, name, str(tmp_path / "step.onnx")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    parameters, megabytes = (float(word) for word in done.stdout.split())
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in presets()[name].module().parameters())
    assert parameters == expected
    assert megabytes <= 1200
