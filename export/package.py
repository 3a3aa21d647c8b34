"""``lehr export``: from a PyTorch module to a new bundle, or to nothing at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lehr import __version__
from lehr.engines.divergence import record as record_tensors
from lehr.export.adapters import Adapters, adapted
from lehr.export.checkpoints.files import Pickles
from lehr.export.golden import default_tier, record
from lehr.export.graphs import FOLDER, Cut, compare, loop_settings, make_graphs
from lehr.export.own_scheduler import check_steps, own_tables
from lehr.export.own_stages import own_stages
from lehr.export.picture_golden import record_pictures
from lehr.export.pipelines.parts import Parts
from lehr.export.pipelines.read import Extent, read_pipeline
from lehr.export.pipelines.source import PipelineSource
from lehr.export.source import resolve
from lehr.export.stages import StageSource, export_stage
from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.errors import InvalidInput
from lehr.runtime.golden import Tier, write
from lehr.runtime.host import peak_rss_mb
from lehr.runtime.picture_golden import write_pictures
from lehr.runtime.stored_tables import write as write_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Choices of one export; ``tier`` None picks by size.

    ``unroll`` is the number of steps of a whole-loop graph, which ``sampler`` and ``guidance_scale`` belong to, None
    for no such graph. ``steps`` are the numbers of steps at which the source's own scheduler is traced, None the
    model's own number.
    ``parts`` are files that complete a single file to a pipeline, or replace parts of one.
    ``adapters`` are LoRAs that are merged and ControlNets that are exported beside the denoiser.
    """

    preset: str | None = None
    seed: int = 0
    structure_only: bool = False
    tier: Tier | None = None
    device: str = "cpu"
    overwrite: bool = False
    pickles: Pickles = Pickles.REFUSED
    cut: Cut = Cut.RATE
    unroll: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    steps: tuple[int, ...] | None = None
    extent: Extent = Extent.WHOLE
    parts: Parts = field(default_factory=Parts)
    adapters: Adapters = field(default_factory=Adapters)
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
    scheduler: Mapping[str, Any] | None  # the source's own: class, steps with a table, and why others have none
    pipeline: str | None  # diffusers' class; None where the denoiser stands alone
    stages: Mapping[str, int]  # parameters of what stands beside the denoiser, by name
    left_out: tuple[str, ...]  # components of the source's pipeline that are not in the bundle

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
    check_steps(source, options.steps)
    found = resolve(
        source,
        preset=options.preset,
        seed=options.seed,
        structure_only=options.structure_only,
        pickles=options.pickles,
    )
    pipeline = None
    if options.extent is Extent.WHOLE:
        pipeline = read_pipeline(
            source,
            found,
            parts=options.parts,
            structure_only=options.structure_only,
            pickles=options.pickles,
        )
        found = found if pipeline is None else pipeline.denoiser
    parts = adapted(found, pipeline, options.adapters, pickles=options.pickles, progress=progress)
    found = parts.denoiser
    parameters = sum(parameter.numel() for parameter in found.module.parameters())
    tier = Tier.NONE if options.structure_only else options.tier or default_tier(parameters)
    with Bundle.create(output, overwrite=options.overwrite) as edit:
        progress(f"tracing {found.name}: {parameters:,} parameters, {found.origin} (route: {found.route.value})")
        folder = edit.folder(FOLDER)
        loop = None
        if options.unroll is not None:
            loop = loop_settings(found.spec, options.unroll, options.sampler, options.guidance_scale)
            loop.write(edit)
        graphs = make_graphs(found, options.cut, folder, loop=loop, progress=progress)
        if tier is not Tier.NONE:
            module = found.runnable().float().to(options.device)
            golden = record(module, found.spec, tier, device=options.device, progress=progress)
            progress("comparing the graph with eager")
            compare(graphs, folder.parent, found, golden)
            write(edit, golden)
            if tier is Tier.FULL:
                record_tensors(edit, found.spec, graphs, lambda name: folder.parent / name, golden.steps)
        scheduler = own_tables(source, found.spec, options.steps, progress=progress)
        if scheduler is not None:
            write_tables(edit, scheduler.tables)
        edit.set_manifest(
            model=found.spec,
            source=found.name,
            graphs=graphs,
            versions=_versions(),
            command=options.command,
            golden_tier=tier.value,
        )
        brought = own_stages(found) if options.extent is Extent.WHOLE else ()
        stages = _write_stages(edit, (*parts.stages, *brought), pipeline, options, progress)
        if pipeline is not None and tier is Tier.FULL:
            whole = replace(pipeline, denoiser=found, stages=tuple(parts.stages))
            tables = {} if scheduler is None else scheduler.tables
            pictures = record_pictures(whole, tables, device=options.device, progress=progress)
            if pictures is not None:
                write_pictures(edit, pictures)
    return Summary(
        bundle=str(output),
        seconds=round(time.monotonic() - started, 2),
        peak_rss_mb=round(peak_rss_mb(), 1),
        parameters=parameters,
        nodes=sum(graph.nodes for graph in graphs.values()),
        golden=tier.value,
        weights=found.origin,
        route=found.route.value,
        scheduler=None if scheduler is None else scheduler.to_json(),
        pipeline=None if pipeline is None else pipeline.spec.class_name,
        stages=stages,
        left_out=() if pipeline is None else pipeline.left_out,
    )


def _write_stages(
    edit: Edit,
    found: Sequence[StageSource],
    pipeline: PipelineSource | None,
    options: Options,
    progress: Callable[[str], None],
) -> dict[str, int]:
    """Everything beside the denoiser; parameters by stage."""
    if not found and pipeline is None:
        return {}
    entries = {
        stage.spec.name: export_stage(edit, stage, tier=options.tier, device=options.device, progress=progress)
        for stage in found
    }
    if pipeline is not None:
        for name, tokenizer in pipeline.tokenizers.items():
            edit.add_bytes(pipeline.spec.tokenizers[name].file, tokenizer)
    edit.set_manifest(stages=entries, pipeline=None if pipeline is None else pipeline.spec)
    return {name: entry.graph.parameters for name, entry in entries.items()}


def _check_options(output: Path, options: Options) -> None:
    if output.suffix != ".lehr":
        raise InvalidInput(f"a bundle's name ends in .lehr, got {output.name!r}.")
    if options.unroll is None and (options.sampler is not None or options.guidance_scale is not None):
        raise InvalidInput("--sampler and --guidance-scale say what a whole-loop graph does; give --unroll STEPS too.")
    if options.unroll is not None and options.adapters.controlnets:
        raise InvalidInput("--unroll writes a loop out as one graph, which no ControlNet can steer; leave one out.")
    if options.structure_only and options.tier not in (None, Tier.NONE):
        raise InvalidInput("--structure-only has no weights to run, so it goes with --golden none only.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")


def _versions() -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "onnxruntime")
    return {"lehr": __version__, **{name: metadata.version(name) for name in names}}
