"""A rewritten graph with weights of its own, written tensor by tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.engines.graph.weights import WEIGHTS_NAME, TensorInfo, save_graph, write_safetensors


def write_graph(model: ir.Model, folder: Path, name: str = "step.onnx") -> Path:
    """Write ``folder/NAME`` and ``folder/weights.safetensors``; one weight at a time is in memory.

    Args:
        model: its weights are external or lazy tensors; afterwards they are external tensors of the new file.
        folder: exists; must not be the folder that the weights are read from.
        name: of the graph's file.

    Raises:
        InvalidInput: a weight that its format cannot hold, or a folder that cannot be written.
        RunFailed: the disk is full.
    """
    tensors = {
        key: value.const_value
        for key, value in model.graph.initializers.items()
        if isinstance(value.const_value, (ir.ExternalTensor, ir.LazyTensor))
    }
    infos = {key: _info(tensor) for key, tensor in tensors.items()}
    path = Path(folder) / WEIGHTS_NAME
    places = write_safetensors(path, [(key, infos[key], partial(_read, tensor)) for key, tensor in tensors.items()])
    for key, tensor in tensors.items():
        model.graph.initializers[key].const_value = ir.ExternalTensor(
            location=path.name,
            offset=places[key].offset,
            length=places[key].length,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=key,
            base_dir=path.parent.absolute(),
        )
    save_graph(model, path.with_name(name))
    return path.with_name(name)


def _info(tensor: ir.ExternalTensor | ir.LazyTensor) -> TensorInfo:
    """How the file holds it: two numbers of 4 bits are a byte."""
    if tensor.dtype.itemsize < 1:
        return TensorInfo(np.dtype(np.uint8), (tensor.nbytes,))
    return TensorInfo(tensor.dtype.numpy(), tuple(int(size) for size in tensor.shape.numpy()))


def _read(tensor: ir.ExternalTensor | ir.LazyTensor) -> npt.NDArray[Any]:
    """A tensor of its own; the pages of the file that it came from are let go."""
    if tensor.dtype.itemsize < 1:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    if isinstance(tensor, ir.LazyTensor):
        return tensor.numpy()
    array = np.array(tensor.numpy())
    tensor.release()
    return array
