"""Opening weights files: safetensors, sharded or not, and pickles where the user allows them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from lehr.engines.graph.tensor_file import INDEX_SUFFIX, SafetensorsFile, SafetensorsFolder, TensorInfo
from lehr.engines.graph.weights import WeightSource
from lehr.export.weights import numpy_dtype, to_numpy
from lehr.runtime.errors import InvalidInput

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_WRAPPERS = ("ema", "state_dict", "model")  # training checkpoints keep the denoiser under one; averaged weights first
_COMPONENT = "diffusion_pytorch_model"  # diffusers' name for the weights of one module


class Pickles(Enum):
    """Whether pickled checkpoints are read."""

    REFUSED = "refused"
    ALLOWED = "allowed"


class TensorSource:
    """Tensors in memory, or mapped from a file by PyTorch, as a source of weights."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self._tensors, self._name = tensors, name

    def __str__(self) -> str:
        return self._name

    def names(self) -> Iterable[str]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(numpy_dtype(tensor.dtype), tuple(tensor.shape))

    def read(self, name: str) -> npt.NDArray[Any]:
        return to_numpy(self._tensors[name])


def open_file(path: Path, pickles: Pickles) -> WeightSource:
    """The weights in one file, or in the shards behind an index.

    Raises:
        InvalidInput: no such file, a damaged one, one of an unknown kind, or a pickle that is not allowed.
    """
    if path.suffix in PICKLES:
        return _pickled([path], path.name, pickles)
    if path.name.endswith(INDEX_SUFFIX):
        return SafetensorsFolder(path)
    if path.suffix != ".safetensors":
        raise InvalidInput(f"{path} is no weights file. Expected .safetensors, or with --allow-pickle {_kinds()}.")
    return SafetensorsFile(path)


def open_component(folder: Path, pickles: Pickles) -> WeightSource:
    """The weights of a folder that diffusers' ``save_pretrained`` wrote.

    Raises:
        InvalidInput: there are none, several that nothing chooses between, damaged ones, or only pickles and those
            are not allowed.
    """
    for name in (f"{_COMPONENT}.safetensors", f"{_COMPONENT}{INDEX_SUFFIX}"):
        if (folder / name).is_file():
            return SafetensorsFolder(folder / name)
    if any(folder.glob("*.safetensors*")):
        return SafetensorsFolder(folder)
    pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickled:
        raise InvalidInput(f"{folder} holds no weights. Expected {_COMPONENT}.safetensors beside its config.json.")
    return _pickled(pickled, folder.name, pickles)


def _kinds() -> str:
    return ", ".join(PICKLES)


def _pickled(paths: list[Path], name: str, pickles: Pickles) -> TensorSource:
    if pickles is not Pickles.ALLOWED:
        raise InvalidInput(
            f"{paths[0].name} is a pickle, and opening a pickle can run code. Expected .safetensors: convert the file, "
            "or pass --allow-pickle to read the tensors in it and nothing else."
        )
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for key, tensor in _load(path).items():
            if key in tensors:
                raise InvalidInput(f"{path.name} and another file of {name} both hold {key!r}; name the one to read.")
            tensors[key] = tensor
    return TensorSource(tensors, name)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        # Files of PyTorch before 1.6 are no archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as e:
        raise InvalidInput(f"weights file {path} does not exist. Check the path.") from e
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InvalidInput(
            f"{path.name} cannot be read as tensors alone: {first} Download it again, or convert it to .safetensors "
            "where you trust it."
        ) from e
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    tensors = {str(key): value for key, value in loaded.items()} if isinstance(loaded, Mapping) else {}
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InvalidInput(f"{path.name} holds no named tensors. Expected a state dict.")
    return tensors
