"""LoRAs merged into a model on its way through the exporter (``lehr export --lora FILE:SCALE``).

A merged weight keeps the element type that it is stored in, as diffusers' ``fuse_lora`` does, and the sum is made in
float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lehr.engines.graph.weights import TensorInfo, WeightSource
from lehr.export.checkpoints.lora_targets import Targets
from lehr.export.checkpoints.mapped import shapes
from lehr.export.source import Source
from lehr.export.weights import TorchModuleSource, load_into
from lehr.runtime.errors import InvalidInput
from lehr.runtime.lora import DENOISER, Applied, Update, changed_weights, merged

Array = npt.NDArray[Any]


class MergedSource:
    """A source of weights with some of them changed as they are read."""

    def __init__(self, source: WeightSource, changes: Mapping[str, Sequence[tuple[Update, float]]]) -> None:
        self._source, self._changes = source, dict(changes)

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> Iterable[str]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str) -> memoryview | Array:
        contents = self._source.read(name)
        if name not in self._changes:
            return contents
        info = self._source.info(name)
        raw = np.frombuffer(contents, np.uint8) if isinstance(contents, memoryview) else np.ascontiguousarray(contents)
        weight = raw.reshape(-1).view(info.dtype).reshape(info.shape)
        return merged(weight, self._changes[name], name).astype(info.dtype)


def with_loras(
    module: nn.Module, weights: WeightSource, applied: Sequence[Applied], component: str
) -> tuple[nn.Module, WeightSource]:
    """A module and its weights with LoRAs merged: weights that are streamed stay so, others change in the module."""
    changes = changed_weights(applied, component)
    if not changes:
        return module, weights
    changed = MergedSource(weights, changes)
    if any(tensor.is_meta for tensor in module.parameters()):
        return module, changed
    module = load_into(module, changed)
    return module, TorchModuleSource(module)


def merge_into(found: Source, applied: Sequence[Applied]) -> Source:
    """The denoiser with adapters merged; it must have weights."""
    if found.weights is None:
        raise InvalidInput(f"{found.name} has no weights that a LoRA could change.")
    module, weights = with_loras(found.module, found.weights, applied, DENOISER)
    names = ", ".join(f"{use.adapter.name} ({use.scale:g})" for use in applied)
    return replace(found, module=module, weights=weights, origin=f"{found.origin}, with LoRA {names}")


def denoiser_targets(found: Source) -> Targets:
    """What a LoRA may change in a denoiser."""
    return Targets(found.spec.family, shapes(found.module))
