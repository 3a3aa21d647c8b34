"""Embedding tables of a text encoder in 8 bits: a third of CLIP's weights are rows that are picked and not multiplied.

Every row has a scale of its own. The rows of a text are picked as they are stored and widened then, so the whole table
is never in memory in more than 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.numbers import INT_LEVELS, scales_of, to_integers
from lehr.calibration.rewrite import Rewrite
from lehr.engines.graph.passes.dead_code import remove_dead_code
from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[Any]

LEAST_ROWS = 256  # fewer are positions or types of token: small, and every text needs them
_FLOAT = ir.DataType.FLOAT


def quantise_tables(rewrite: Rewrite) -> dict[str, int]:
    """Store the embedding tables of a graph in int8.

    Args:
        rewrite: of the graph, which is changed.

    Returns:
        Node that picks rows -> how many rows its table has.

    Raises:
        InvalidInput: a table that is not finite.
    """
    found: dict[str, int] = {}
    for node in list(rewrite.model.graph):
        table = _table_of(node)
        if table is None:
            continue
        read = partial(_read, table)
        scales = scales_of(np.abs(read()).max(axis=1, keepdims=True), INT_LEVELS[8])
        found[node.name or ""] = len(scales)
        _replace(rewrite, node, read, scales)
    remove_dead_code(rewrite.model)
    return found


def _table_of(node: ir.Node) -> ir.Value | None:
    """The initialiser that a node picks rows of; None for any other node."""
    if node.op_type != "Gather" or ("axis" in node.attributes and node.attributes["axis"].as_int() != 0):
        return None
    value = node.inputs[0]
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in ("Cast", "Identity"):
            return None
        value = producer.inputs[0]
    if value is None or value.const_value is None or value.dtype is None or not value.dtype.is_floating_point():
        return None
    shape = value.shape
    if shape is None or not shape.is_static() or shape.rank() != 2 or int(shape.numpy()[0]) < LEAST_ROWS:
        return None
    return value if node.inputs[1] is not None and not node.inputs[1].is_initializer() else None


def _read(table: ir.Value) -> Array:
    tensor = table.const_value
    if tensor is None:
        raise InvalidInput(f"table {table.name!r} has no data. Export the model with its weights.")
    array = np.array(tensor.numpy()).astype(np.float32)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    if not np.all(np.isfinite(array)):
        raise InvalidInput(f"weight {table.name!r} is not finite, so it has no scale. The weights are damaged.")
    return array


def _replace(rewrite: Rewrite, node: ir.Node, read: Callable[[], Array], scales: Array) -> None:
    old, indices, name = node.outputs[0], node.inputs[1], f"{node.name}.rows"
    dtype, shape = ir.DataType.INT8, ir.Shape([int(size) for size in read().shape])
    small = ir.Value(name=f"{name}.int8", shape=shape, type=ir.TensorType(dtype))
    small.const_value = ir.LazyTensor(
        lambda: ir.Tensor(to_integers(read(), scales, 8), dtype=dtype, name=small.name),
        dtype=dtype,
        shape=shape,
        name=small.name,
    )
    rewrite.model.graph.register_initializer(small)
    steps = rewrite.constant(f"{name}.scale", scales, _FLOAT)
    sizes = old.shape
    narrow = None if sizes is None else ir.Shape([*sizes[:-1], 1])
    picked = rewrite.op("Gather", [small, indices], f"{name}.picked", dtype, sizes, node, {"axis": 0})
    wide = rewrite.op("Cast", [picked], f"{name}.wide", _FLOAT, sizes, node, {"to": int(_FLOAT)})
    scale = rewrite.op("Gather", [steps, indices], f"{name}.scales", _FLOAT, narrow, node, {"axis": 0})
    made = rewrite.op("Mul", [wide, scale], f"{name}.restored", _FLOAT, sizes, node)
    known = str(old.name)
    old.name, made.name = f"{name}.replaced", known  # the tensor keeps its name
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
