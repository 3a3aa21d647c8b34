"""Where a plan without weights finds them when it is loaded: in the bundle's weights file, or beside the plan.

A plan is stripped under the promise that it is refitted with the weights that it was built from (TensorRT's
REFIT_IDENTICAL), so each one is traced back to the stored tensor that it is a rounding of, bit for bit. What is none,
such as a constant that lowering folded, is kept in a small file beside the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.engines.graph.tensor_file import SafetensorsFile, TensorInfo, write_safetensors
from lehr.engines.settings import StoredWeights

Array = npt.NDArray[Any]

STORED, BESIDE = "stored", "beside"
_CASTS = frozenset(np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32))


def refit_sources(graph: Path, stored: StoredWeights, beside: Path) -> dict[str, Any]:
    """Plain values for ``build.json``, with which the runtime refits the plan of ``graph``.

    Args:
        graph: as the engine library read it, its weights with it.
        stored: what the bundle holds in any case.
        beside: written, a safetensors file, with what is not in ``stored``; absent if that is nothing.

    Returns:
        ``weights``: the stored file's name in the bundle; ``beside``: the other file's name, empty without one;
        ``tensors``: of each of the graph's weights by name, where it is (``in``: "stored" or "beside"), the tensor's
        name there (``key``) and the element type that the engine wants (``dtype``, as numpy or ml_dtypes names it),
        to which a stored tensor is rounded to nearest, ties to even.
    """
    file = SafetensorsFile(stored.path)
    known = set(file.names())
    tensors: dict[str, dict[str, str]] = {}
    others: dict[str, Array] = {}
    for name, array in _weights(ir.load(graph)):
        key = name if name in known else name.removesuffix(f".{array.dtype.name}")  # what a half graph adds to it
        same = key in known and _rounded(file, key, array.dtype, array)
        tensors[name] = {"in": STORED if same else BESIDE, "key": key if same else name, "dtype": array.dtype.name}
        if not same:
            others[name] = np.array(array)
    if others:
        rows = [(name, TensorInfo(a.dtype, a.shape), lambda a=a: a) for name, a in others.items()]
        write_safetensors(beside, rows)
    return {"weights": stored.name, "beside": beside.name if others else "", "tensors": tensors}


def _weights(model: ir.Model) -> list[tuple[str, Array]]:
    """Every initialiser and constant by the name that the engine library gives it; those without data are none."""
    found = []
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            found.append((name, value.const_value.numpy()))
    for node in model.graph:
        tensor = node.attributes.get("value") if node.op_type == "Constant" else None
        if tensor is not None and node.outputs[0].name:
            found.append((node.outputs[0].name, tensor.as_tensor().numpy()))
    return found


def _rounded(file: SafetensorsFile, name: str, dtype: np.dtype[Any], wanted: Array) -> bool:
    """Whether the stored tensor becomes exactly ``wanted`` when it is rounded to ``dtype``."""
    info = file.info(name)
    if info.shape != wanted.shape or (info.dtype != dtype and not {info.dtype, dtype} <= _CASTS):
        return False
    given = np.frombuffer(file.read(name), dtype=info.dtype).reshape(info.shape)
    return given.astype(dtype).tobytes() == wanted.tobytes()
