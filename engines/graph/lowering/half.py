"""Recipe fp16 (and bf16): the portable float32 graph as a graph of its own in half precision."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from lehr.engines.graph.lowering.save import write_graph
from lehr.engines.graph.passes.half import convert_to_half


def write_half(
    graph: Path,
    folder: Path,
    *,
    keep_high: Collection[str],
    dtype: ir.DataType = ir.DataType.FLOAT16,
    copied: Path | None = None,
) -> Path:
    """Write the half-precision graph and its weights into ``folder``.

    ONNX Runtime's CPU provider runs an fp16 graph by casting to float32 around most operators: it shows what fp16
    costs in accuracy, and is slower than fp32.

    Args:
        graph: the portable graph, its weights beside it; not changed.
        folder: an existing folder, another one than the graph's.
        keep_high: names of nodes that stay in float32 (:mod:`lehr.calibration.keep_high`).
        dtype: FLOAT16 or BFLOAT16.
        copied: for a whole-loop graph, the step graph of which it holds copies and whose nodes ``keep_high`` names;
            what is no copy of its nodes, the sampler's own arithmetic first of all, stays in float32.

    Returns:
        The new graph's path.

    Raises:
        InvalidInput: names that the graph has not, or a weight that ``dtype`` cannot hold.
        RunFailed: the disk is full.
    """
    model = ir.load(graph)
    if copied is not None:
        converted = {f"{node.name}" for node in ir.load(copied).graph} - set(keep_high)
        keep_high = {f"{node.name}" for node in model.graph if f"{node.name}".partition("/")[2] not in converted}
    convert_to_half(model, keep_high=keep_high, dtype=dtype)
    return write_graph(model, Path(folder), Path(graph).name)
