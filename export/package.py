"""``lehr export``: from a PyTorch module to a new bundle, or to nothing at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lehr import __version__
from lehr.engines.graph.check import check_graph
from lehr.engines.graph.weights import bind_weights, node_count, parameter_count, save_graph
from lehr.export.checkpoints.files import Pickles
from lehr.export.golden import default_tier, record
from lehr.export.source import Source, resolve
from lehr.export.trace import trace
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import ExportFailed, InvalidInput
from lehr.runtime.golden import Golden, Tier, write
from lehr.runtime.host import peak_rss_mb
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.parity import relative_error

GRAPH_FILE, WEIGHTS_FILE = "model/step.onnx", "model/weights.safetensors"
GRAPH_REL_ERROR = 1e-3  # portable graph against eager, per evaluation; float32 sums in another order stay below 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Choices of one export; ``tier`` None picks by size."""

    preset: str | None = None
    seed: int = 0
    structure_only: bool = False
    tier: Tier | None = None
    device: str = "cpu"
    overwrite: bool = False
    pickles: Pickles = Pickles.REFUSED
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What an export made."""

    bundle: str
    seconds: float
    peak_rss_mb: float
    parameters: int
    nodes: int
    golden: str
    weights: str
    route: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(source: str, output: Path, options: Options, *, progress: Callable[[str], None]) -> Summary:
    """Export ``source`` into the new bundle ``output``.

    Raises:
        InvalidInput: a source or an output path that cannot be used; damaged or wrong weights.
        ExportFailed: PyTorch cannot trace the module, or the graph computes something else.
        BundleError: an existing folder that is no bundle stands in the way.
    """
    started = time.monotonic()
    _check_options(output, options)
    found = resolve(
        source,
        preset=options.preset,
        seed=options.seed,
        structure_only=options.structure_only,
        pickles=options.pickles,
    )
    parameters = sum(parameter.numel() for parameter in found.module.parameters())
    tier = Tier.NONE if options.structure_only else options.tier or default_tier(parameters)
    with Bundle.create(output, overwrite=options.overwrite) as edit:
        progress(f"tracing {found.name}: {parameters:,} parameters, {found.origin} (route: {found.route.value})")
        graph = trace(found.module, found.spec)
        folder = edit.folder("model")
        if found.weights is not None:
            progress("streaming weights")
            bind_weights(graph, found.weights, folder / Path(WEIGHTS_FILE).name)
        save_graph(graph, folder / Path(GRAPH_FILE).name)
        if found.weights is not None:
            check_graph(folder / Path(GRAPH_FILE).name, found.spec)
        if tier is not Tier.NONE:
            module = found.runnable().float().to(options.device)
            golden = record(module, found.spec, tier, device=options.device, progress=progress)
            progress("comparing the graph with eager")
            _compare(folder / Path(GRAPH_FILE).name, found, golden)
            write(edit, golden)
        edit.set_manifest(
            model=found.spec,
            source=found.name,
            graphs={
                "step": GraphEntry(
                    file=GRAPH_FILE,
                    weights=None if found.weights is None else WEIGHTS_FILE,
                    opset=graph.opset_imports[""],
                    parameters=parameter_count(graph),
                    nodes=node_count(graph),
                )
            },
            versions=_versions(),
            command=options.command,
            golden_tier=tier.value,
        )
    return Summary(
        bundle=str(output),
        seconds=round(time.monotonic() - started, 2),
        peak_rss_mb=round(peak_rss_mb(), 1),
        parameters=parameters,
        nodes=node_count(graph),
        golden=tier.value,
        weights=found.origin,
        route=found.route.value,
    )


def _check_options(output: Path, options: Options) -> None:
    if output.suffix != ".lehr":
        raise InvalidInput(f"a bundle's name ends in .lehr, got {output.name!r}.")
    if options.structure_only and options.tier not in (None, Tier.NONE):
        raise InvalidInput("--structure-only has no weights to run, so it goes with --golden none only.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")


def _compare(graph: Path, found: Source, golden: Golden) -> None:
    """Run the saved graph on the golden inputs; a graph that is not the module must not leave the exporter."""
    from lehr.runtime.backends.onnxruntime import BACKEND

    session = BACKEND.load(graph, {"intra_op_threads": 0, "spinning": False})
    steps, spec = golden.steps, found.spec
    for k in sorted({0, len(steps.timesteps) // 2, len(steps.timesteps) - 1}):
        batch = steps.inputs.shape[1]
        timestep = np.full(batch, steps.timesteps[k], dtype=spec.timestep.dtype.numpy)
        feeds: Mapping[str, Any] = {spec.sample.name: steps.inputs[k], spec.timestep.name: timestep}
        output = session.run({**feeds, **steps.conditions})[spec.outputs[0].name]
        error = relative_error(steps.outputs[k], output[:, : steps.outputs.shape[2]])
        if error > GRAPH_REL_ERROR:
            raise ExportFailed(
                f"the exported graph differs from {found.name} by {error:.1e} (at most {GRAPH_REL_ERROR:.0e}) at "
                f"timestep {steps.timesteps[k]:g}. The module probably depends on Python state that tracing froze."
            )


def _versions() -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "onnxruntime")
    return {"lehr": __version__, **{name: metadata.version(name) for name in names}}
