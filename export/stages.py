"""The stages of a pipeline beside its denoiser: traced, bound to weights of their own, checked against eager.

A stage goes the denoiser's way: traced without weights, its weights streamed from their files into the bundle. Eager
PyTorch is loaded after that, once for each format that it is measured in and never beside a copy of itself, and let go
of before ONNX Runtime opens the graph; a text encoder of some billion parameters takes its own size in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from lehr.calibration.stage_audit import audit_stage
from lehr.engines.graph.split import Part
from lehr.engines.graph.weights import WeightSource
from lehr.export.eager import evaluate
from lehr.export.golden import SEED, default_tier
from lehr.export.graphs import GRAPH_REL_ERROR, write_graphs
from lehr.export.trace import trace
from lehr.export.weights import load_into
from lehr.runtime.bundle import Edit
from lehr.runtime.errors import BundleError, ExportFailed, RunFailed, UnknownName
from lehr.runtime.golden import Tier
from lehr.runtime.manifest import StageEntry
from lehr.runtime.parity import WORST, relative_error
from lehr.runtime.stage import StageSpec
from lehr.runtime.stage_golden import StageGolden, write_stage_golden

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

GRAPH = "model"  # stages/<name>/model.onnx
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
FLOOR_BATCH = 1  # rows that floors are measured on; fp16 convolutions are emulated on CPUs and cost 20 x fp32's


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSource:
    """A stage about to be exported.

    Attributes:
        spec: its contract.
        module: on any device; on the meta device where weights are streamed from a file. ``forward`` is called with the
            spec's inputs by name and returns the spec's outputs, as a tensor or a tuple.
        weights: where the tensors come from; None for structure only.
        origin: which weights these are, for people.
        feeds: golden inputs for a seed, batch 2.
    """

    spec: StageSpec
    module: nn.Module
    weights: WeightSource | None
    origin: str
    feeds: Callable[[int], dict[str, Array]]

    def runnable(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A copy of the module with its weights in it, in ``dtype``; the module itself stays as it is.

        Raises:
            InvalidInput: damaged weights.
            ExportFailed: structure only.
        """
        module = copy.deepcopy(self.module).eval().float()
        if any(tensor.is_meta for tensor in module.parameters()):
            if self.weights is None:
                raise ExportFailed(f"stage {self.spec.name!r} was read without weights, so it cannot be run.")
            load_into(module, self.weights)
        return module.to(dtype)  # one parameter after the other: no second copy of all of them


def export_stage(edit: Edit, found: StageSource, *, tier: Tier | None, device: str, progress: Progress) -> StageEntry:
    """Write a stage into the bundle that ``edit`` makes or changes; engines of an earlier one of its name go.

    Args:
        edit: of the bundle; what it must be told is the entry: ``edit.set_manifest(stages={name: entry, …})``.
        found: the stage.
        tier: how much eager data is recorded: nothing in ``none``, one evaluation in the others; None picks by size.
        device: that eager runs on.
        progress: takes a line of text now and then.

    Raises:
        ExportFailed: the module cannot be traced, or the graph computes something else.
        InvalidInput: damaged or wrong weights.
        RunFailed: the disk is full, or the graph is not finite.
    """
    spec = found.spec
    parameters = sum(parameter.numel() for parameter in found.module.parameters())
    if found.weights is None:
        tier = Tier.NONE
    large = tier is None and default_tier(parameters) is Tier.NONE
    tier = tier or default_tier(parameters)
    progress(f"stage {spec.name}: {parameters:,} parameters, {found.origin}")
    if large:
        progress(
            f"stage {spec.name}: no golden data, as it has more than 2 billion parameters; without it no gate passes. "
            "Export with --golden steps to record it."
        )
    edit.remove(spec.folder)
    folder = edit.folder(spec.folder)
    model = trace(found.module, spec)
    graph = write_graphs(
        {GRAPH: Part(model=model, spec=spec.signature)}, found.weights, folder, spec.folder, spec.default_sizes()
    )[GRAPH]
    if tier is Tier.NONE:
        return StageEntry(spec=spec, graph=graph, golden=None)
    golden = record_stage(found, device=device, progress=progress)
    progress(f"stage {spec.name}: comparing the graph with eager")
    compare_stage(folder / f"{GRAPH}.onnx", found, golden)
    entry = StageEntry(spec=spec, graph=graph, golden=write_stage_golden(edit, spec, golden))
    audit_stage(edit, entry, golden.inputs)
    return entry


def record_stage(found: StageSource, *, device: str, progress: Progress) -> StageGolden:
    """Run a stage in eager PyTorch and record its outputs, and how far it moves in fp16 and bf16."""
    spec, feeds = found.spec, found.feeds(SEED)
    spec.check_feeds(feeds)
    progress(f"stage {spec.name}: golden data")
    outputs = evaluate(found.runnable().to(device), spec, feeds, device=device)
    few = {
        tensor.name: feeds[tensor.name][:FLOOR_BATCH] if tensor.batched else feeds[tensor.name]
        for tensor in spec.inputs
    }
    floors = {}
    for form, dtype in FORMATS.items():
        progress(f"stage {spec.name}: eager in {form}")
        try:
            other = evaluate(found.runnable(dtype).to(device), spec, few, dtype=dtype, device=device)
        except RuntimeError:  # what PyTorch raises for an operator without a kernel in a format
            continue
        errors = {name: relative_error(outputs[name][:FLOOR_BATCH], value) for name, value in other.items()}
        if max(errors.values()) < WORST:
            floors[form] = errors
    return StageGolden(inputs=feeds, outputs=outputs, floors=floors)


def compare_stage(file: Path, found: StageSource, golden: StageGolden) -> None:
    """Run a stage's saved graph on the golden inputs.

    Raises:
        ExportFailed: ONNX Runtime refuses it, or it differs from eager.
    """
    from lehr.runtime.backends.onnxruntime import BACKEND

    name = found.spec.name
    try:
        outputs = BACKEND.load(file, {"intra_op_threads": 0, "spinning": False}).run(golden.inputs)
    except (BundleError, RunFailed) as e:
        raise ExportFailed(f"the graph of stage {name!r} does not run: {e}") from e
    for tensor in found.spec.outputs:
        expected, got = golden.outputs[tensor.name], outputs[tensor.name]
        error = relative_error(expected, got) if expected.shape == got.shape else WORST
        if error > GRAPH_REL_ERROR:
            raise ExportFailed(
                f"the exported graph of stage {name!r} differs from eager by {error:.1e} in {tensor.name!r} (at most "
                f"{GRAPH_REL_ERROR:.0e}). The module probably depends on Python state that tracing froze."
            )


# ------------------------------------------------------------------------------------------------ stages in eager


class EagerStage:
    """A stage in eager PyTorch, called as a :class:`lehr.runtime.stages.StageRunner` is."""

    def __init__(self, spec: StageSpec, module: nn.Module, dtype: torch.dtype, device: str) -> None:
        self.spec = spec
        self._module, self._dtype, self._device = module, dtype, device

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.spec.check_feeds(feeds)
        return evaluate(self._module, self.spec, feeds, dtype=self._dtype, device=self._device)


class EagerStages:
    """Stages of a pipeline in eager PyTorch, one in memory at a time: the reference side of pictures.

    Args:
        found: stages about to be exported.
        dtype: that they compute in.
        device: that they compute on.
    """

    def __init__(
        self, found: Sequence[StageSource], *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self._found = {source.spec.name: source for source in found}
        self._dtype, self._device = dtype, device

    def names(self) -> tuple[str, ...]:
        return tuple(self._found)

    def spec(self, name: str) -> StageSpec:
        return self._source(name).spec

    @contextmanager
    def using(self, name: str) -> Iterator[EagerStage]:
        """The stage, its weights in memory until the block ends."""
        source = self._source(name)
        module = source.runnable(self._dtype).to(self._device)
        yield EagerStage(source.spec, module, self._dtype, self._device)

    def _source(self, name: str) -> StageSource:
        if name not in self._found:
            raise UnknownName("stage", name, self._found)
        return self._found[name]
