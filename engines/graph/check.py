"""Level 0 of the parity ladder, at export: a saved graph is well formed and has the signature it should have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import onnx
import onnx_ir as ir

from lehr.runtime.errors import ExportFailed
from lehr.runtime.spec import TensorSpec

MIN_OPSET, MAX_OPSET = 18, 23  # what portable graphs use: 23 is the newest that onnxruntime 1.23 (Python 3.10) runs
MAX_IR_VERSION = 11  # likewise


class Signature(Protocol):
    """What a graph takes and returns; a ModelSpec is one."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...


def check_graph(path: Path, spec: Signature) -> None:
    """Check the graph saved at ``path``, its weights beside it.

    Raises:
        ExportFailed: onnx's checker or shape inference refuses it, it uses operator sets that engines do not all
            know, or names, element types or dimensions of its inputs and outputs are not the spec's.
    """
    path = Path(path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportFailed(f"{path.name} is not valid ONNX: {str(e).strip().splitlines()[0]}") from e
    model = ir.load(path)
    if set(model.opset_imports) != {""} or not MIN_OPSET <= model.opset_imports[""] <= MAX_OPSET:
        raise ExportFailed(
            f"{path.name} uses the operator sets {dict(model.opset_imports)}; a portable graph uses ONNX's own only, "
            f"version {MIN_OPSET} to {MAX_OPSET}."
        )
    if model.ir_version > MAX_IR_VERSION:
        raise ExportFailed(f"{path.name} has IR version {model.ir_version}, engines read at most {MAX_IR_VERSION}.")
    for kind, values, tensors in (
        ("inputs", model.graph.inputs, spec.inputs),
        ("outputs", model.graph.outputs, spec.outputs),
    ):
        found = [_signature(value) for value in values]
        expected = [(tensor.name, tensor.dtype.value, tensor.shape) for tensor in tensors]
        if found != expected:
            raise ExportFailed(f"{path.name} has {kind} {found}, expected {expected}.")


def _signature(value: ir.Value) -> tuple[str | None, str, tuple[int | str | None, ...]]:
    dims = () if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    dtype = "unknown" if value.dtype is None else str(value.dtype.numpy())
    return value.name, dtype, dims
