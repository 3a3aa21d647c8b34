"""SOURCE of ``lehr export``: a preset, a weights file, a diffusers folder, or a user's own factory."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from dataclasses import dataclass
from enum import Enum
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import nn

from lehr.engines.graph.tensor_file import INDEX_SUFFIX, SafetensorsFile
from lehr.engines.graph.weights import WeightSource
from lehr.export.backbones import preset as find_preset
from lehr.export.backbones import presets
from lehr.export.backbones.preset import Preset
from lehr.export.checkpoints.config import NAME as CONFIG
from lehr.export.checkpoints.files import PICKLES, Pickles, open_file
from lehr.export.checkpoints.folder import from_folder
from lehr.export.checkpoints.layouts import recognise
from lehr.export.weights import TorchModuleSource, load_into
from lehr.runtime.errors import ExportFailed, InvalidInput, UnknownName
from lehr.runtime.spec import ModelSpec


class Route(str, Enum):
    """How a source became a module."""

    PRESET = "preset"  # our backbone, shipped or random weights
    CHECKPOINT = "checkpoint"  # our backbone, weights from files
    DIFFUSERS = "diffusers"  # diffusers' own module
    FACTORY = "factory"  # the user's own module


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A denoiser about to be exported.

    Attributes:
        name: as the user gave it.
        module: on the meta device where weights are streamed from a file.
        weights: where the tensors come from; None for structure only.
        origin: which weights these are, for people.
    """

    name: str
    module: nn.Module
    spec: ModelSpec
    weights: WeightSource | None
    origin: str
    route: Route

    def runnable(self) -> nn.Module:
        """The module with its weights in it.

        Raises:
            InvalidInput: damaged weights.
        """
        hollow = any(tensor.is_meta for tensor in self.module.parameters())
        return load_into(self.module, self.weights) if hollow and self.weights is not None else self.module


def resolve(
    text: str, *, preset: str | None, seed: int, structure_only: bool, pickles: Pickles = Pickles.REFUSED
) -> Source:
    """Find out what ``text`` names.

    Args:
        text: a preset, a weights file, a diffusers folder, or FILE.py:FACTORY.
        preset: the architecture of a weights file or folder, where it does not say.
        seed: of random weights.
        structure_only: no weights are made or kept.
        pickles: whether pickled checkpoints are read.

    Raises:
        InvalidInput: no such preset or file, damaged or wrong weights, a file that fits several presets, or a
            factory that returns something else than (module, spec).
        ExportFailed: the factory itself failed.
        MissingExtra: a class of diffusers, which is not installed.
    """
    path, _, factory = text.partition(":")
    if path.endswith(".py") and factory:
        if preset is not None:
            raise InvalidInput("--preset names the architecture of a checkpoint; a factory brings its own.")
        return _from_factory(text, Path(path), factory, structure_only)
    if Path(text).is_dir() and (text not in presets() or "/" in text):
        return _from_folder(text, Path(text), preset, structure_only, pickles)
    if text.endswith((".safetensors", INDEX_SUFFIX, *PICKLES)) or Path(text).is_file():
        return _from_file(text, preset, structure_only, pickles)
    if preset is not None and preset != text:
        raise InvalidInput(f"{text!r} is no file or folder; --preset only goes with a checkpoint. Leave it out.")
    if text not in presets():
        hint = UnknownName("preset", text, presets())
        raise InvalidInput(f"{hint} A file, folder or FILE.py:FACTORY of that name does not exist either.")
    return _from_preset(text, seed, structure_only)


def shipped_weights(name: str) -> Path | None:
    """The trained weights that come with the package, if preset ``name`` has any."""
    resource = files("lehr.export.reference").joinpath(f"weights/{name}.safetensors")
    if not resource.is_file():
        return None
    with as_file(resource) as path:
        return path


def _from_preset(name: str, seed: int, structure_only: bool) -> Source:
    chosen = find_preset(name)
    shipped = shipped_weights(name)
    if structure_only or shipped is not None:
        weights = None if structure_only or shipped is None else SafetensorsFile(shipped)
        return _hollow(name, chosen, weights, "trained weights shipped with lehr", Route.PRESET)
    torch.manual_seed(seed)
    module = chosen.module().eval()
    return Source(
        name=name,
        module=module,
        spec=chosen.spec,
        weights=TorchModuleSource(module),
        origin=f"random weights, seed {seed}",
        route=Route.PRESET,
    )


def _hollow(name: str, chosen: Preset, weights: WeightSource | None, origin: str, route: Route) -> Source:
    with torch.device("meta"):
        module = chosen.module().eval()
    origin = origin if weights is not None else "structure only"
    return Source(name=name, module=module, spec=chosen.spec, weights=weights, origin=origin, route=route)


def _from_folder(
    text: str, folder: Path, preset: str | None, structure_only: bool, pickles: Pickles, weights: Path | None = None
) -> Source:
    found = from_folder(folder, name=preset, pickles=pickles, weights=weights)
    return Source(
        name=text,
        module=found.module,
        spec=found.spec,
        weights=None if structure_only else found.weights,
        origin=found.origin,
        route=Route(found.route),
    )


def _from_file(text: str, preset: str | None, structure_only: bool, pickles: Pickles) -> Source:
    path = Path(text)
    if not path.exists():
        raise InvalidInput(f"weights file {text} does not exist. Check the path.")
    if path.name.startswith("diffusion_pytorch_model") and path.with_name(CONFIG).is_file():
        return _from_folder(text, path.parent, preset, structure_only, pickles, path)
    found = recognise(open_file(path, pickles), preset)
    name = found.preset.spec.name
    also = f"; also fits {', '.join(found.others)}" if found.others else ""
    origin = f"weights of {path.name}, {name} in the {found.layout.name} layout{also}"
    return _hollow(text, found.preset, None if structure_only else found.source, origin, Route.CHECKPOINT)


def _from_factory(text: str, path: Path, factory: str, structure_only: bool) -> Source:
    if not path.is_file():
        raise InvalidInput(f"{path} does not exist. Expected FILE.py:FACTORY.")
    loaded = importlib.util.spec_from_file_location(f"lehr_user_{path.stem}", path)
    if loaded is None or loaded.loader is None:
        raise InvalidInput(f"{path} cannot be imported as Python.")
    module_of_user = importlib.util.module_from_spec(loaded)
    sys.modules[loaded.name] = module_of_user  # dataclasses and pickling look their module up
    try:
        loaded.loader.exec_module(module_of_user)
        make = getattr(module_of_user, factory, None)
        if not callable(make):
            raise InvalidInput(f"{path} defines no function {factory!r}.")
        made = make()
    except (InvalidInput, KeyboardInterrupt):
        raise
    except Exception as e:  # whatever a user's own code raises is the user's to see, at its own line
        at = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(at.filename).name} line {at.lineno}"
        raise ExportFailed(f"{text} failed: {type(e).__name__}: {e} ({where}). Fix the factory and try again.") from e
    if not (isinstance(made, tuple) and len(made) == 2):
        raise InvalidInput(
            f"{text} returned {type(made).__name__}; expected (torch.nn.Module, lehr.runtime.ModelSpec)."
        )
    module, spec = made
    if not isinstance(module, nn.Module) or not isinstance(spec, ModelSpec):
        kinds = f"({type(module).__name__}, {type(spec).__name__})"
        raise InvalidInput(f"{text} returned {kinds}; expected (torch.nn.Module, lehr.runtime.ModelSpec).")
    module = module.eval()
    name = f"{path.name}:{factory}"
    weights = None if structure_only else TorchModuleSource(module)
    return Source(
        name=name, module=module, spec=spec, weights=weights, origin="the factory's weights", route=Route.FACTORY
    )
