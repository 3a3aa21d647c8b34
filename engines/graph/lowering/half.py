"""Recipe fp16 (and bf16): the portable float32 graph as a graph of its own in half precision."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lehr.engines.graph.lowering.save import write_graph
from lehr.engines.graph.passes.half import convert_to_half
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput

AUDIT = "calibration/ranges.json"  # in a bundle: what lehr audit found
AUDIT_VERSION = 1


def write_half(
    graph: Path, folder: Path, *, keep_high: Collection[str], dtype: ir.DataType = ir.DataType.FLOAT16
) -> Path:
    """Write the half-precision graph and its weights into ``folder``.

    ONNX Runtime's CPU provider runs an fp16 graph by casting to float32 around most operators: it shows what fp16
    costs in accuracy, and is slower than fp32.

    Args:
        graph: the portable graph, its weights beside it; not changed.
        folder: an existing folder, another one than the graph's.
        keep_high: names of nodes that stay in float32 (:mod:`lehr.calibration.keep_high`).
        dtype: FLOAT16 or BFLOAT16.

    Returns:
        The new graph's path.

    Raises:
        InvalidInput: names that the graph has not, or a weight that ``dtype`` cannot hold.
        RunFailed: the disk is full.
    """
    model = ir.load(graph)
    convert_to_half(model, keep_high=keep_high, dtype=dtype)
    return write_graph(model, Path(folder), Path(graph).name)


def audited(bundle: Bundle, form: str) -> frozenset[str]:
    """Names of the nodes that the bundle's range audit keeps in float32 under ``form`` ("fp16" or "bf16").

    Raises:
        InvalidInput: there was no audit, or it was of other graphs or weights; with the command that makes one.
        BundleError: what was recorded is damaged.
    """
    again = f"Run: lehr audit {bundle.root.name}"
    if AUDIT not in bundle.manifest.files:
        raise InvalidInput(
            f"{bundle.root.name} has no range audit, which decides what recipe {form!r} must keep in fp32. {again}"
        )
    data: Any = bundle.read_json(AUDIT)
    try:
        version, sources = data["version"], dict(data["sources"])
        names = frozenset(str(name) for name in data["keep_high"][form])
    except (KeyError, TypeError, ValueError) as e:
        raise BundleError(f"the range audit of {bundle.root.name} is damaged ({e!r}). {again}") from e
    if version != AUDIT_VERSION:
        raise BundleError(f"the range audit has version {version}, expected {AUDIT_VERSION}. {again}")
    for name, digest in sources.items():
        entry = bundle.manifest.files.get(name)
        if entry is None or entry.sha256 != digest:
            raise InvalidInput(f"{name} has changed since the range audit of {bundle.root.name}. {again}")
    return names
