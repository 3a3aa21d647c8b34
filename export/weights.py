"""Between PyTorch modules and named tensors: a module as a source of weights, and a source read into a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lehr.engines.graph.weights import Rename, TensorInfo, WeightSource, convert, match_weights
from lehr.runtime.errors import InvalidInput

# numpy has no such types of its own; ml_dtypes has, and an integer of the same width carries the bits across.
_CARRIED: Mapping[torch.dtype, tuple[torch.dtype, np.dtype[Any]]] = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
}


class TorchModuleSource:
    """The state dict of a module as a source of weights, one tensor at a time, without a copy on the CPU."""

    def __init__(self, module: nn.Module) -> None:
        state = module.state_dict(keep_vars=True)
        self._tensors: dict[str, Tensor] = {
            name: value.detach() for name, value in state.items() if isinstance(value, Tensor)
        }
        for name, tensor in self._tensors.items():
            if tensor.is_meta or type(tensor) is not Tensor:
                raise InvalidInput(
                    f"weight {name!r} has no values of its own ({type(tensor).__name__} on {tensor.device}). "
                    "Load real weights into the module first."
                )

    def names(self) -> Iterable[str]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._find(name)
        return TensorInfo(numpy_dtype(tensor.dtype), tuple(tensor.shape))

    def read(self, name: str) -> npt.NDArray[Any]:
        return to_numpy(self._find(name))

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise InvalidInput(f"the module's state dict holds no tensor {name!r}.")
        return self._tensors[name]


def load_into(module: nn.Module, source: WeightSource, *, rename: Rename | None = None) -> nn.Module:
    """Fill ``module`` from ``source``; modules on the meta device get memory for what their state dict names.

    Args:
        module: changed in place. Its buffers outside the state dict must have values already.
        source: see :func:`lehr.engines.graph.weights.bind_weights`, which checks and converts in the same way.
        rename: the source's names -> the module's.

    Returns:
        ``module``.

    Raises:
        InvalidInput: names, shapes or values do not fit.
    """
    state = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    infos = {name: TensorInfo(numpy_dtype(value.dtype), tuple(value.shape)) for name, value in state.items()}
    hollow = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in state]
    if hollow:
        raise InvalidInput(
            f"buffer {hollow[0]!r} is in no state dict and has no values on the meta device. "
            "Build the module on a real device."
        )
    first: dict[int, str] = {}
    tied = {name: first[id(value)] for name, value in state.items() if first.setdefault(id(value), name) != name}
    wanted = {name: info for name, info in infos.items() if name not in tied}
    origin = match_weights(wanted, source, rename=rename, tied=tied, what=type(module).__name__)
    for name, info in wanted.items():
        _assign(module, name, to_torch(convert(source, origin[name], info), state[name].dtype))
    for name, other in tied.items():
        _assign(module, name, module.get_parameter(other))
    return module


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` where ``name`` stands, keeping whether it is a parameter and needs gradients."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    if old.is_meta:
        if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(owner, leaf, value)
    elif old.data_ptr() != value.data_ptr():
        with torch.no_grad():
            old.copy_(value)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The same bits as an array, without a copy where ``tensor`` is contiguous and on the CPU."""
    tensor = tensor.cpu().contiguous()
    carrier, dtype = _CARRIED.get(tensor.dtype, (tensor.dtype, numpy_dtype(tensor.dtype)))
    array: npt.NDArray[Any] = tensor.view(carrier).numpy().view(dtype)
    return array


def to_torch(array: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A tensor of its own with the bits of ``array``, whose elements are ``dtype``'s."""
    carrier, _ = _CARRIED.get(dtype, (dtype, None))
    owned = np.array(array)  # a copy: the array may be a read-only map of the file
    return torch.from_numpy(owned.view(numpy_dtype(carrier))).view(dtype)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """numpy's (or ml_dtypes') name of an element type."""
    if dtype in _CARRIED:
        return _CARRIED[dtype][1]
    return np.dtype(str(dtype).removeprefix("torch."))
