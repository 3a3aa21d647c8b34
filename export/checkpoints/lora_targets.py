"""Which weights of ours a LoRA's layers change: the key maps of checkpoints, read backwards.

Every name that a key map knows for a weight, the authors' and diffusers', finds it, with dots or with underscores in
their place, so nothing is guessed from how a name is built. Where several of diffusers' layers are one of ours, as the
three projections of an attention, a layer changes some rows of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir

from lehr.engines.graph.tensor_file import SafetensorsFile, TensorInfo, write_safetensors
from lehr.engines.graph.weights import UNUSED
from lehr.export.checkpoints.layouts import WHOLE_PIPELINE, layouts
from lehr.export.checkpoints.lora import LoraLayer, read_layers
from lehr.export.checkpoints.mapped import Shape, listed
from lehr.export.checkpoints.rules import Transform, origin
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import InvalidInput
from lehr.runtime.lora import DENOISER, Adapter, Update, stored
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.stage import StageKind

_WRAPPED = "model."  # what a module of diffusers' own is wrapped in (diffusers_module.DiffusersDenoiser)
_TEXT_MODEL = "text_model."  # CLIP's names have it in some releases of transformers and not in others


@dataclass(frozen=True, slots=True)
class _Target:
    """One source of a weight of ours: ``part`` of ``count`` that are joined along the rows."""

    weight: str
    part: int = 0
    count: int = 1
    transform: Transform | None = None


class Targets:
    """The names under which a component's weights may be changed.

    Args:
        family: of the backbone, whose key maps are read; any other word has none.
        shapes: the component's weights.
        unused: weights of the network that the component does without, such as a text encoder's last layer.
    """

    def __init__(self, family: str, shapes: Mapping[str, Shape], unused: Iterable[str] = ()) -> None:
        self.shapes = dict(shapes)
        self._found: dict[str, _Target] = {}
        self._unused = {way for name in unused for alias in _aliases(name) for way in _ways(alias)}
        matrices = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1]
        for name in matrices:
            for alias in _aliases(name):
                self._add(alias, _Target(name))
        for layout in layouts(family, SimpleNamespace(num_res_blocks=_blocks_a_level(shapes))):
            for name in matrices:
                found = origin(layout.rules, name, ())
                for part, copies in enumerate(found.parts):
                    if len(copies) == 1:  # what a checkpoint repeats in every block, one LoRA cannot change for all
                        target = _Target(name, part, len(found.parts), found.transform)
                        self._add(copies[0].removeprefix(WHOLE_PIPELINE), target)

    def _add(self, key: str, target: _Target) -> None:
        for way in _ways(key):
            self._found.setdefault(way, target)

    def does_without(self, layer: LoraLayer) -> bool:
        """Whether a layer changes what the component does not need."""
        return layer.name in self._unused

    def find(self, layer: LoraLayer) -> tuple[str, Update] | None:
        """The weight that a layer changes, and how; None for a name that no weight has.

        Raises:
            InvalidInput: a layer of another size.
        """
        target = self._found.get(layer.name)
        if target is None:
            return None
        shape = self.shapes[target.weight]
        rows, columns = shape[0], int(np.prod(shape[1:], dtype=np.int64))
        kernel = () if all(size == 1 for size in shape[2:]) else shape[2:]
        start = _first_row(target, rows, columns, len(layer.up))
        if start is None or layer.down.shape[1] != columns or layer.kernel != kernel:
            raise InvalidInput(
                f"LoRA layer {layer.name!r} is ({len(layer.up)}, {layer.down.shape[1]}) with kernel {layer.kernel}, "
                f"its weight {target.weight!r} has shape {shape}. It was trained for another model."
            )
        up = layer.up
        if target.transform is Transform.SWAP_HALVES:
            up = np.roll(up, rows // 2, axis=0)
        elif target.transform is not None:
            raise InvalidInput(
                f"LoRA layer {layer.name!r} changes a weight that is stored in another form here. "
                "Merge it in the tool that it was trained with, and export the merged model."
            )
        return target.weight, Update(up=up, down=layer.down, start=start, scale=layer.scale)


def _aliases(name: str) -> set[str]:
    return {name, name.removeprefix(_WRAPPED), name.removeprefix(_TEXT_MODEL), _TEXT_MODEL + name}


def _ways(key: str) -> tuple[str, str]:
    """How a weight's layer is written."""
    path = key.removesuffix(".weight")
    return path, path.replace(".", "_")


def _first_row(target: _Target, rows: int, columns: int, changed: int) -> int | None:
    """Where a part begins: all are of one size, or all but the last are square (FLUX joins its MLP behind q, k, v)."""
    square = [columns] * (target.count - 1) + [rows - columns * (target.count - 1)]
    for sizes in ([rows // target.count] * target.count, square):
        if sizes[target.part] == changed and sum(sizes) == rows:
            return sum(sizes[: target.part])
    return None


def _blocks_a_level(shapes: Mapping[str, Shape]) -> int:
    """Residual blocks of a level of a latent U-Net, which diffusers' numbering depends on."""
    found = (re.fullmatch(r"input_blocks\.(\d+)\.0\.(op\.weight|.+)", name) for name in shapes)
    blocks = [(int(match[1]), match[2] == "op.weight") for match in found if match is not None]
    halvings = [number for number, halves in blocks if halves]
    return min(halvings) - 1 if halvings else max((number for number, _ in blocks), default=1)


# ---------------------------------------------------------------------------------------------------- adapters


def read_lora(path: Path, components: Mapping[str, Targets]) -> tuple[Adapter, tuple[str, ...]]:
    """A LoRA file under our names.

    Args:
        path: a .safetensors file in any naming that :mod:`lehr.export.checkpoints.lora` knows.
        components: what can be changed, by name.

    Returns:
        The adapter, and the components that it would change and that are not there.

    Raises:
        InvalidInput: another kind of adapter, layers that the components have not, or of another size.
    """
    if path.suffix != ".safetensors":
        raise InvalidInput(f"{path} is no LoRA that can be read. Expected a .safetensors file.")
    changes: dict[str, dict[str, tuple[Update, ...]]] = {}
    unknown: list[str] = []
    absent: dict[str, None] = {}
    for layer in read_layers(SafetensorsFile(path)):
        component = next((name for name in layer.components if name in components), None)
        if component is None:
            absent[layer.components[0]] = None
            continue
        found = components[component].find(layer)
        if found is None and components[component].does_without(layer):
            continue
        if found is None:
            unknown.append(f"{component}: {layer.name}")
            continue
        known = changes.setdefault(component, {})
        known[found[0]] = (*known.get(found[0], ()), found[1])
    if unknown:
        raise InvalidInput(
            f"{path.name} changes {len(unknown)} layers that this model has not: {listed(sorted(unknown))}. "
            "It was trained for another model."
        )
    if not changes:
        raise InvalidInput(
            f"{path.name} changes {', '.join(absent)} alone, and there is {', '.join(components) or 'nothing'} here."
        )
    return Adapter(name=path.stem, changes=changes), tuple(absent)


def write_adapter(adapter: Adapter, path: Path) -> None:
    """Store an adapter for :func:`lehr.runtime.lora.read_adapter`; raises InvalidInput, RunFailed."""
    rows = [(key, TensorInfo(array.dtype, array.shape), lambda a=array: a) for key, array in stored(adapter).items()]
    write_safetensors(path, rows)


def bundle_targets(bundle: Bundle) -> dict[str, Targets]:
    """What a LoRA may change in a bundle: the denoiser and the text encoders, where they have weights."""
    manifest = bundle.manifest
    graphs = {DENOISER: (manifest.model.family, list(manifest.graphs.values()))}
    for name, stage in manifest.stages.items():
        if stage.spec.kind is StageKind.TEXT_ENCODER:
            graphs[name] = stage.spec.family, [stage.graph]
    return {
        name: _stored_targets(bundle, family, entries)
        for name, (family, entries) in graphs.items()
        if all(entry.weights is not None for entry in entries)
    }


def _stored_targets(bundle: Bundle, family: str, entries: Sequence[GraphEntry]) -> Targets:
    shapes: dict[str, Shape] = {}
    unused: set[str] = set()
    for entry in entries:
        file = SafetensorsFile(bundle.path(str(entry.weights)))
        shapes |= {name: file.info(name).shape for name in file.names()}
        unused |= set(json.loads(ir.load(bundle.path(entry.file)).metadata_props.get(UNUSED, "[]")))
    return Targets(family, shapes, unused - set(shapes))
