"""What TensorRT's engine inspector says about an engine: its layers, and whether they compute in what was asked for.

The inspector's JSON is a list of layers with their type and the format of every input and output, in words that changed
over the years: "Row major linear FP16 format", "Half", "Float", or "N/A due to dynamic shapes"
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html). What is not understood is
left out, and counts neither for nor against an engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lehr.runtime.errors import BuildFailed
from lehr.runtime.recipe import Format

# Neither computes: copies, changes of layout, shapes.
_SILENT = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "Identity", "Signal", "Wait", "ShapeHostToDevice"})
_PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|conv|attention|mha|einsum", re.IGNORECASE)
_FORMATS = (  # first that fits, in the words of build.json
    (re.compile(r"\bN/A\b", re.IGNORECASE), ""),
    (re.compile(r"bf16|bfloat16", re.IGNORECASE), "bfloat16"),
    (re.compile(r"fp16|half|float16", re.IGNORECASE), "float16"),
    (re.compile(r"fp8|e4m3|float8", re.IGNORECASE), "float8"),
    (re.compile(r"fp4|e2m1|float4", re.IGNORECASE), "float4"),
    (re.compile(r"fp32|float", re.IGNORECASE), "float"),
    (re.compile(r"\bu?int8", re.IGNORECASE), "int8"),
    (re.compile(r"\bu?int4", re.IGNORECASE), "int4"),
)
_ASKED = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8", "fp8": "float8", "nvfp4": "float4"}


def achieved(inspected: Any, *, asked: Format, what: str) -> tuple[dict[str, float], dict[str, int]]:
    """Shares of the element types and numbers of the layer types, as a plan records them; empty if unreadable.

    Args:
        inspected: the inspector's JSON, read.
        asked: the recipe's arithmetic.
        what: was built, for the message.

    Raises:
        BuildFailed: formats of products and convolutions can be read and none of them is what was asked for.
    """
    layers = [row for row in inspected.get("Layers", ()) if isinstance(row, Mapping)] if inspected else []
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for row in layers:
        kind = str(row.get("LayerType", ""))
        if not kind or kind in _SILENT:
            continue
        kinds[kind] += 1
        formats = _formats(row)
        types.update(formats)
        if _PRODUCT.search(f"{kind} {row.get('Name', '')} {row.get('Metadata', '')}"):
            products.update(formats)
    wanted = _ASKED.get(asked.value)
    if wanted and products and wanted not in products:
        found = ", ".join(f"{count} in {name}" for name, count in sorted(products.items()))
        raise BuildFailed(
            f"{what} was asked for in {asked.value} and none of its products and convolutions computes in it "
            f"({found}). Choose a recipe that the library has kernels for here, such as --recipe fp32."
        )
    total = sum(types.values()) or 1
    return {name: round(count / total, 4) for name, count in sorted(types.items())}, dict(sorted(kinds.items()))


def _formats(row: Mapping[str, Any]) -> set[str]:
    tensors = [t for key in ("Inputs", "Outputs") for t in row.get(key) or () if isinstance(t, Mapping)]
    found = set()
    for tensor in tensors:
        words = str(tensor.get("Format/Datatype", tensor.get("Format", "")))
        found.add(next((name for pattern, name in _FORMATS if pattern.search(words)), ""))
    return found - {""}
