"""The portable graphs of an export: traced, cut by rate, weights bound to one file, checked against eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

from lehr.engines.graph.check import check_graph
from lehr.engines.graph.cost import total_flops
from lehr.engines.graph.split import Part, split
from lehr.engines.graph.unroll import unroll
from lehr.engines.graph.weights import (
    WEIGHTS_NAME,
    Storage,
    WeightSource,
    bind_weights,
    node_count,
    parameter_count,
    save_graph,
    weight_bytes,
)
from lehr.engines.portable import portable_session
from lehr.export.source import Source
from lehr.export.trace import trace
from lehr.runtime.errors import ExportFailed
from lehr.runtime.golden import Golden
from lehr.runtime.hoisted import STEP, hoisted_denoiser
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.parity import relative_error
from lehr.runtime.solvers import default_sampler, solver_table
from lehr.runtime.spec import ModelSpec
from lehr.runtime.whole_loop import LOOP, LoopSettings

FOLDER = "model"
GRAPH_REL_ERROR = 1e-3  # portable graphs against eager, per evaluation; float32 sums in another order stay below 1e-4


class Cut(str, Enum):
    """How the traced graph is divided."""

    RATE = "rate"  # into what runs once per prompt, once per schedule, and at every step
    NONE = "none"


def loop_settings(
    spec: ModelSpec, num_inference_steps: int, sampler: str | None, guidance_scale: float | None
) -> LoopSettings:
    """What a whole-loop graph is made with; what is not given is the model's default.

    Raises:
        InvalidInput: no such sampler, or steps that it cannot take.
    """
    name = sampler or spec.sampling.sampler or default_sampler(spec.path)
    table = solver_table(name, spec.path, spec.prediction, num_inference_steps)
    return LoopSettings(
        sampler=name,
        num_inference_steps=num_inference_steps,
        evaluations=len(table),
        noises=table.num_noises,
        guidance_scale=spec.sampling.guidance_scale if guidance_scale is None else guidance_scale,
    )


def make_graphs(
    found: Source, cut: Cut, folder: Path, *, loop: LoopSettings | None = None, progress: Callable[[str], None]
) -> dict[str, GraphEntry]:
    """Trace ``found`` and write its graphs and weights into ``folder``, which is the bundle's ``model/``.

    With ``loop`` a whole-loop graph is one of them.

    Returns:
        The graphs by name, in the order in which they run.

    Raises:
        ExportFailed: the module cannot be traced, or a graph is not what it should be.
        InvalidInput: a loop that cannot be one graph; damaged or wrong weights.
        RunFailed: the disk is full.
    """
    whole = trace(found.module, found.spec)
    parts = split(whole, found.spec) if cut is Cut.RATE else {STEP: Part(model=whole, spec=found.spec.signature)}
    if loop is not None:
        table = solver_table(loop.sampler, found.spec.path, found.spec.prediction, loop.num_inference_steps)
        parts[LOOP] = unroll(parts, found.spec, table, guidance_scale=loop.guidance_scale)
    if found.weights is not None:
        progress("streaming weights")
    return write_graphs(parts, found.weights, folder, FOLDER, found.spec.default_sizes())


def write_graphs(
    parts: Mapping[str, Part], weights: WeightSource | None, folder: Path, name: str, sizes: Mapping[str, int]
) -> dict[str, GraphEntry]:
    """Write graphs that share one weights file, and stream their weights into it.

    Args:
        parts: by name, which becomes the file's.
        weights: None for structure only.
        folder: to write into; that of the bundle called ``name``.
        name: see there.
        sizes: default size of every dimension, that operations are counted at.

    Raises:
        ExportFailed: a graph is not what it should be.
        InvalidInput: damaged or wrong weights.
        RunFailed: the disk is full.
    """
    models = [part.model for part in parts.values()]
    if weights is not None:
        bind_weights(models, weights, folder / WEIGHTS_NAME, storage=Storage.SOURCE)
    entries = {}
    for role, part in parts.items():
        file = folder / f"{role}.onnx"
        save_graph(part.model, file, parts=models)
        if weights is not None:
            check_graph(file, part.spec)
        entries[role] = GraphEntry(
            file=f"{name}/{file.name}",
            weights=None if weights is None else f"{name}/{WEIGHTS_NAME}",
            opset=part.model.opset_imports[""],
            parameters=parameter_count(part.model),
            weight_bytes=weight_bytes(part.model),
            nodes=node_count(part.model),
            flops=total_flops(part.model.graph, sizes) // sizes.get("batch", 1),
            signature=part.spec,
        )
    return entries


def compare(graphs: Mapping[str, GraphEntry], bundle: Path, found: Source, golden: Golden) -> None:
    """Run the saved graphs on the golden inputs; graphs that are not the module must not leave the exporter.

    Raises:
        ExportFailed: they differ from eager.
    """
    denoiser = hoisted_denoiser(
        found.spec,
        {name: graph.signature for name, graph in graphs.items() if name != LOOP},
        lambda name: portable_session(bundle / graphs[name].file),
    )
    steps = golden.steps
    tried = sorted({0, len(steps.timesteps) // 2, len(steps.timesteps) - 1})
    denoiser.prepare(steps.timesteps[tried], steps.inputs.shape[2:], [steps.conditions])
    for k in tried:
        output = denoiser(steps.inputs[k], float(steps.timesteps[k]), steps.conditions)
        error = relative_error(steps.outputs[k], output)
        if error > GRAPH_REL_ERROR:
            raise ExportFailed(
                f"the exported graph differs from {found.name} by {error:.1e} (at most {GRAPH_REL_ERROR:.0e}) at "
                f"timestep {steps.timesteps[k]:g}. The module probably depends on Python state that tracing froze."
            )
