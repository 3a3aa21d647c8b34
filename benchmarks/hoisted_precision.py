"""bf16 with the conditioning in fp32: one evaluation's SQNR over t and its time, whole graph against hoisted graphs.

    python benchmarks/hoisted_precision.py [NAME ...]

Writes benchmarks/results/hoisted_precision.json and docs/hoisted-precision.png. The reference is eager PyTorch in
fp32. "whole" is the unsplit graph in bf16, "hoisted" the step graph in bf16 behind prompt and schedule graphs in fp32,
both by OpenVINO; "eager" is PyTorch's own bf16 (its timestep stays float32). SQNR is 10 log10(Σ ref² / Σ (ref - x)²) of
the network's raw output. Times are medians of interleaved evaluations at batch 2; a hoisted one has its conditions
prepared, as in a loop. Random weights are PyTorch's default for linear layers, uniform in ±fan_in^-1/2, also where an
architecture starts from zero; the digits models are the trained ones that are shipped.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from environment import RESULTS, write
from safetensors.torch import load_file
from torch import nn

from lehr.engines import openvino_cpu
from lehr.engines.graph.split import Part, split
from lehr.engines.graph.weights import bind_weights, save_graph
from lehr.engines.job import Job
from lehr.engines.target import target
from lehr.export.backbones import preset
from lehr.export.eager import eager
from lehr.export.source import shipped_weights
from lehr.export.trace import trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.backends import backend
from lehr.runtime.denoiser import Denoiser, synthetic_conditions
from lehr.runtime.hoisted import SHAPE_SUFFIX, hoisted_denoiser
from lehr.runtime.noise import batch_normal, standard_normal
from lehr.runtime.recipe import recipe
from lehr.runtime.spec import ModelSpec, TensorSpec

Array = npt.NDArray[Any]
BATCH, TIMESTEPS, REPETITIONS = 2, 6, 9
NAME = "hoisted_precision"
PICTURE = Path(__file__).parents[1] / "docs" / "hoisted-precision.png"

# Sizes as in the published comparison of CPU engines that the project is measured with.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "unet": ("sd-1.5", {"model_channels": 64, "num_heads": 4, "context_dim": 512}, {"height": 64, "width": 64}),
    "dit-s-2": ("dit-s-2", {}, {"height": 32, "width": 32}),
    "mmdit": (
        "sd3-medium",
        {
            "hidden_size": 384,
            "depth": 8,
            "num_heads": 6,
            "context_dim": 512,
            "pooled_dim": 256,
            "pos_embed_max_size": 64,
        },
        {"height": 32, "width": 32},
    ),
    "flux": (
        "flux-dev",
        {"hidden_size": 384, "depth": 3, "depth_single_blocks": 5, "num_heads": 6, "axes_dim": (8, 28, 28)}
        | {"context_in_dim": 512, "vec_in_dim": 256},
        {"image_tokens": 256, "text_tokens": 77},
    ),
    "digits-dit": ("digits-dit", {}, {}),
    "digits-adm": ("digits-adm", {}, {}),
}


def sqnr_db(reference: Array, output: Array) -> float:
    """Signal to noise, the difference being the noise."""
    error = output.astype(np.float64) - reference
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / np.sum(error**2)))


def made(name: str) -> tuple[nn.Module, ModelSpec, dict[str, int]]:
    """The module with weights, its spec, and the sizes to run it at."""
    base, changes, sizes = MODELS[name]
    chosen = preset(base)
    params = replace(chosen.params, **changes)
    torch.manual_seed(0)  # biases keep what they are made with
    module = chosen.build(params).eval()
    spec = replace(chosen.spec, inputs=tuple(_narrowed(tensor, changes) for tensor in chosen.spec.inputs))
    weights = shipped_weights(name)
    if weights is not None:
        module.load_state_dict(load_file(weights))
        return module, spec, sizes
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound)
    return module, spec, sizes


def _narrowed(tensor: TensorSpec, changes: dict[str, Any]) -> TensorSpec:
    """A condition as wide as the changed configuration takes it."""
    keys = {
        "encoder_hidden_states": ("context_dim", "context_in_dim"),
        "pooled_projections": ("pooled_dim", "vec_in_dim"),
    }
    width = next((changes[key] for key in keys.get(tensor.name, ()) if key in changes), None)
    return tensor if width is None else replace(tensor, shape=(*tensor.shape[:-1], width))


def engine(parts: dict[str, Part], spec: ModelSpec, folder: Path, sizes: dict[str, int]) -> Denoiser:
    """OpenVINO engines of some graphs: the step graph in bf16, others in fp32."""
    dims = spec.default_sizes(batch=BATCH, **sizes)
    known = feeds_of(spec, sizes)
    known[spec.sample.name + SHAPE_SUFFIX] = np.array(known[spec.sample.name].shape)
    known[spec.timestep.name] = np.full(BATCH, 0.5, spec.timestep.dtype.numpy)
    plans = {}
    for name, part in parts.items():
        save_graph(part.model, folder / f"{name}.onnx")
        feeds: dict[str, Array] = {}
        for tensor in part.spec.inputs:
            if tensor.name in known:
                feeds[tensor.name] = known[tensor.name]
            else:
                feeds[tensor.name] = standard_normal(0, 0, tensor.sizes(dims)).astype(tensor.dtype.numpy)
        chosen = recipe("bf16" if name == "step" else "fp32")
        job = Job(
            name=name,
            graph=folder / f"{name}.onnx",
            recipe=chosen,
            target=target("cpu"),
            library="openvino",
            feeds=feeds,
        )
        plans[name] = openvino_cpu.build(job, folder)
    library = backend("openvino")
    signatures = {name: part.spec for name, part in parts.items()}
    return hoisted_denoiser(spec, signatures, lambda name: library.load(folder / plans[name].file, plans[name].options))


def feeds_of(spec: ModelSpec, sizes: dict[str, int]) -> dict[str, Array]:
    """A sample and conditions by name."""
    spec = replace(spec, dims=tuple(replace(dim, default=sizes.get(dim.name, dim.default)) for dim in spec.dims))
    sample = batch_normal(0, range(BATCH), spec.sample_shape(BATCH)[1:])
    conditions = synthetic_conditions(spec, BATCH, seed=0)
    for tensor in spec.conditions:
        if tensor.name.endswith("_ids"):
            conditions[tensor.name] = position_ids(conditions[tensor.name], tensor.name)
        if tensor.name == "guidance":
            conditions[tensor.name] = np.full(BATCH, 3.5, np.float32)
    return {spec.sample.name: sample, **conditions}


def position_ids(like: Array, name: str) -> Array:
    """FLUX's ids: (0, row, column) for the picture's tokens, zeros for the text's."""
    ids = np.zeros_like(like)
    if name == "img_ids":
        side = int(len(ids) ** 0.5)
        ids[:, 1], ids[:, 2] = np.arange(len(ids)) // side, np.arange(len(ids)) % side
    return ids


def measure(name: str) -> dict[str, Any]:
    """One model's row."""
    module, spec, sizes = made(name)
    graph = trace(module, spec)
    whole = {"step": Part(model=graph, spec=spec.signature)}
    parts = split(graph, spec)
    feeds = feeds_of(spec, sizes)
    sample = feeds.pop(spec.sample.name)
    low, high = sorted((spec.path.first_timestep, spec.path.last_timestep))
    timesteps = [float(spec.timestep.dtype.numpy.type(t)) for t in np.linspace(low, high, TIMESTEPS + 2)[1:-1]]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, kind) for kind in ("whole", "hoisted")]
        for folder, graphs in zip(folders, (whole, parts), strict=True):
            folder.mkdir()
            models = [part.model for part in graphs.values()]
            bind_weights(models, TorchModuleSource(module), folder / "weights.safetensors")
        exact = eager(module, spec)
        reference = [exact(sample, t, feeds) for t in timesteps]
        networks = {
            "whole": engine(whole, spec, folders[0], sizes),
            "hoisted": engine(parts, spec, folders[1], sizes),
            "eager": eager(module.bfloat16(), spec, dtype=torch.bfloat16),
        }
        networks["hoisted"].prepare(timesteps, sample.shape[1:], [feeds])
        errors = {
            kind: [sqnr_db(r, network(sample, t, feeds)) for t, r in zip(timesteps, reference, strict=True)]
            for kind, network in networks.items()
        }
        times = interleaved({kind: partial(network, sample, timesteps[0], feeds) for kind, network in networks.items()})
    parameters = sum(parameter.numel() for parameter in module.parameters())
    row = {"model": name, "parameters": parameters, "timesteps": timesteps, "sqnr_db": errors, "milliseconds": times}
    print({kind: f"{min(values):.1f} dB, {times[kind]:.1f} ms" for kind, values in errors.items()}, file=sys.stderr)
    return row


def interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(REPETITIONS):
        for kind, call in calls.items():
            started = time.perf_counter()
            call()
            times[kind].append(1000 * (time.perf_counter() - started))
    return {kind: round(statistics.median(values), 3) for kind, values in times.items()}


def draw(rows: list[dict[str, Any]]) -> None:
    """SQNR over t, a panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.6), constrained_layout=True)
    styles = {"whole": ("#c0392b", "o", "whole graph in bf16"), "eager": ("#7f8c8d", "s", "PyTorch's own bf16")}
    styles["hoisted"] = ("#1f618d", "D", "conditioning hoisted in fp32, step in bf16")
    for axis, row in zip(axes.flat, rows, strict=False):
        for kind, (colour, marker, label) in styles.items():
            axis.plot(row["timesteps"], row["sqnr_db"][kind], color=colour, marker=marker, markersize=4, label=label)
        axis.set_title(f"{row['model']}, {row['parameters'] / 1e6:.1f}M parameters", fontsize=10)
        axis.set_xlabel("timestep")
        axis.set_ylabel("SQNR (dB)")
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measure what is named on the command line, all by default, and draw everything that is known."""
    names = sys.argv[1:] or list(MODELS)
    stored = RESULTS / f"{NAME}.json"
    known = {row["model"]: row for row in json.loads(stored.read_text())["rows"]} if stored.is_file() else {}
    known.update({name: measure(name) for name in names})
    rows = [known[name] for name in MODELS if name in known]
    write(NAME, {"batch": BATCH, "rows": rows})
    draw(rows)


if __name__ == "__main__":
    main()
