"""What an export adds to a model: LoRAs merged into its weights, ControlNets as stages beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lehr.export.checkpoints.controlnet import NAME, read_controlnet, with_residuals
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.lora_merge import denoiser_targets, merge_into, with_loras
from lehr.export.checkpoints.lora_targets import Targets, read_lora
from lehr.export.checkpoints.mapped import shapes
from lehr.export.pipelines.source import PipelineSource
from lehr.export.source import Source
from lehr.export.stages import StageSource
from lehr.runtime.errors import InvalidInput
from lehr.runtime.lora import DENOISER, Applied, split_scale
from lehr.runtime.stage import StageKind

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """What is added, as the user gave it.

    Attributes:
        loras: "FILE:SCALE" or "FILE" each.
        controlnets: folders or files.
    """

    loras: tuple[str, ...] = ()
    controlnets: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A model's networks: the denoiser, and what is exported beside it."""

    denoiser: Source
    stages: tuple[StageSource, ...]


def adapted(
    found: Source, pipeline: PipelineSource | None, adapters: Adapters, *, pickles: Pickles, progress: Progress
) -> Parts:
    """The networks of an export with its adapters.

    Raises:
        InvalidInput: files that cannot be read, adapters of another model, or LoRAs for a structure without weights.
    """
    parts = Parts(denoiser=found, stages=() if pipeline is None else pipeline.stages)
    parts = _with_loras(parts, adapters.loras, progress)
    return _with_controlnets(parts, adapters.controlnets, pickles)


def _with_loras(parts: Parts, texts: Sequence[str], progress: Progress) -> Parts:
    if not texts:
        return parts
    if parts.denoiser.weights is None:
        raise InvalidInput("--lora changes weights, and a structure alone has none; leave --structure-only out.")
    encoders = {stage.spec.name: stage for stage in parts.stages if stage.spec.kind is StageKind.TEXT_ENCODER}
    targets = {DENOISER: denoiser_targets(parts.denoiser)}
    targets |= {name: Targets(stage.spec.family, shapes(stage.module)) for name, stage in encoders.items()}
    applied = []
    for name, scale in map(split_scale, texts):
        adapter, absent = read_lora(Path(name), targets)
        if absent:
            progress(f"{name} would also change {', '.join(absent)}, which this export does not have")
        applied.append(Applied(adapter=adapter, scale=scale))
    stages = [_merged(stage, applied) if stage.spec.name in encoders else stage for stage in parts.stages]
    return Parts(denoiser=merge_into(parts.denoiser, applied), stages=tuple(stages))


def _merged(stage: StageSource, applied: Sequence[Applied]) -> StageSource:
    if stage.weights is None:
        return stage
    module, weights = with_loras(stage.module, stage.weights, applied, stage.spec.name)
    return replace(stage, module=module, weights=weights)


def _with_controlnets(parts: Parts, paths: Sequence[Path], pickles: Pickles) -> Parts:
    if not paths:
        return parts
    controls = [
        read_controlnet(path, parts.denoiser, name=NAME if k == 0 else f"{NAME}_{k + 1}", pickles=pickles)
        for k, path in enumerate(paths)
    ]
    if parts.denoiser.weights is None:
        controls = [replace(control, weights=None) for control in controls]
    return Parts(denoiser=with_residuals(parts.denoiser, controls), stages=(*parts.stages, *controls))
