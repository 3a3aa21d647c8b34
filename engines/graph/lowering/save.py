"""A rewritten graph with weights of its own, written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

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
    values = {
        key: value
        for key, value in model.graph.initializers.items()
        if isinstance(value.const_value, (ir.ExternalTensor, ir.LazyTensor))
    }
    infos = {}
    for key, value in values.items():
        tensor = value.const_value
        infos[key] = TensorInfo(tensor.dtype.numpy(), tuple(tensor.shape.numpy()))  # type: ignore[union-attr]
    path = Path(folder) / WEIGHTS_NAME
    places = write_safetensors(path, [(key, infos[key], values[key].const_value.numpy) for key in values])
    for key, value in values.items():
        value.const_value = ir.ExternalTensor(
            location=path.name,
            offset=places[key].offset,
            length=places[key].length,
            dtype=ir.DataType.from_numpy(infos[key].dtype),
            shape=ir.Shape(infos[key].shape),
            name=key,
            base_dir=path.parent.absolute(),
        )
    save_graph(model, path.with_name(name))
    return path.with_name(name)
