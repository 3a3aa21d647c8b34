"""SOURCE of ``lehr export``: a preset, a weights file, or a user's own factory."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import nn

from lehr.engines.graph.tensor_file import SafetensorsFile
from lehr.engines.graph.weights import WeightSource
from lehr.export.backbones import preset as find_preset
from lehr.export.backbones import presets
from lehr.export.weights import TorchModuleSource, load_into
from lehr.runtime.errors import ExportFailed, InvalidInput, UnknownName
from lehr.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A denoiser about to be exported.

    Attributes:
        name: as the user gave it.
        module: on the meta device where weights are streamed from a file and nothing else is needed.
        weights: where the tensors come from; None for structure only.
        origin: which weights these are, for people.
    """

    name: str
    module: nn.Module
    spec: ModelSpec
    weights: WeightSource | None
    origin: str


def resolve(text: str, *, preset: str | None, seed: int, structure_only: bool, run_eager: bool) -> Source:
    """Find out what ``text`` names.

    Args:
        text: a preset, FILE.safetensors, or FILE.py:FACTORY.
        preset: the architecture of a weights file.
        seed: of random weights.
        structure_only: no weights are read or made.
        run_eager: the module must be able to run, so weights are loaded into it.

    Raises:
        InvalidInput: no such preset or file, a damaged or wrong weights file, or a factory that returns
            something else than (module, spec).
        ExportFailed: the factory itself failed.
    """
    path, _, factory = text.partition(":")
    if path.endswith(".py") and factory:
        if preset is not None:
            raise InvalidInput("--preset names the architecture of a weights file; a factory brings its own.")
        return _from_factory(text, Path(path), factory, structure_only)
    if text.endswith((".safetensors", ".pt", ".bin", ".ckpt", ".pth")) or Path(text).exists():
        return _from_file(text, preset, structure_only, run_eager)
    if preset is not None and preset != text:
        raise InvalidInput(f"{text!r} is no file; --preset only goes with a weights file. Leave it out.")
    if text not in presets():
        hint = UnknownName("preset", text, presets())
        raise InvalidInput(f"{hint} A file or FILE.py:FACTORY of that name does not exist either.")
    return _from_preset(text, seed, structure_only, run_eager)


def shipped_weights(name: str) -> Path | None:
    """The trained weights that come with the package, if preset ``name`` has any."""
    resource = files("lehr.export.reference").joinpath("weights", f"{name}.safetensors")
    if not resource.is_file():
        return None
    with as_file(resource) as path:
        return path


def _from_preset(name: str, seed: int, structure_only: bool, run_eager: bool) -> Source:
    chosen = find_preset(name)
    shipped = shipped_weights(name)
    if structure_only or shipped is not None:
        return _meta(name, name, shipped, structure_only, run_eager, "trained weights shipped with lehr")
    torch.manual_seed(seed)
    module = chosen.module().eval()
    return Source(
        name=name,
        module=module,
        spec=chosen.spec,
        weights=TorchModuleSource(module),
        origin=f"random weights, seed {seed}",
    )


def _from_file(text: str, preset: str | None, structure_only: bool, run_eager: bool) -> Source:
    path = Path(text)
    if not path.exists():
        raise InvalidInput(f"weights file {text} does not exist. Check the path.")
    if path.is_dir() or path.suffix != ".safetensors":
        raise InvalidInput(
            f"{text} is no .safetensors file. Expected a preset, FILE.safetensors with --preset, or FILE.py:FACTORY; "
            "pickled checkpoints can run code when they are opened and are not read."
        )
    if preset is None:
        raise InvalidInput(f"{text} holds weights only; say which architecture they are for with --preset.")
    return _meta(text, preset, path, structure_only, run_eager, f"weights of {path.name}")


def _meta(name: str, preset: str, weights: Path | None, structure_only: bool, run_eager: bool, origin: str) -> Source:
    chosen = find_preset(preset)
    with torch.device("meta"):
        module = chosen.module().eval()
    if structure_only or weights is None:
        return Source(name=name, module=module, spec=chosen.spec, weights=None, origin="structure only")
    source = SafetensorsFile(weights)
    if run_eager:
        module = load_into(module, source)
    return Source(name=name, module=module, spec=chosen.spec, weights=source, origin=origin)


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
    module = module.eval().float()
    name = f"{path.name}:{factory}"
    weights = None if structure_only else TorchModuleSource(module)
    return Source(name=name, module=module, spec=spec, weights=weights, origin="the factory's weights")
