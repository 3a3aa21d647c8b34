"""Graphs for hardware that multiplies matrices in half precision only (SM 7.5), whatever the recipe keeps in fp32."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lehr.engines.audit import AUDIT
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum"})


def all_but_products(graph: Path) -> frozenset[str]:
    """Names of the nodes that are no product: what such hardware can compute in float32."""
    return frozenset(f"{node.name}" for node in ir.load(graph).graph if node.op_type not in PRODUCTS)


def all_but_matrices(graph: Path) -> frozenset[str]:
    """Names of the nodes that recipes of scope MATRICES keep in float32.

    What is left are products of matrices, attention and convolutions over single positions among them, without the
    product that reads the sample first and the last ones before the output. A wider convolution multiplies the same
    number of times for each of its results and pays several times the work for as little noise: on a U-Net of 36M
    parameters, matrices in bf16 give 41.7 dB in .87 of fp32's processor time, convolutions 39.4 dB in .89, both 37.9 dB
    in .80 (OpenVINO 2026.4, one thread).
    """
    model = ir.load(graph)
    products = [node for node in model.graph if node.op_type in PRODUCTS]
    last, waiting = set[ir.Node](), [value.producer() for value in model.graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in last:
            continue
        last.add(node)
        if node.op_type not in PRODUCTS:
            waiting += [value.producer() for value in node.inputs if value is not None]
    meant = {node for node in products[1:] if node not in last and _is_matrix(node)}
    return frozenset(f"{node.name}" for node in model.graph if node not in meant)


def _is_matrix(node: ir.Node) -> bool:
    if node.op_type != "Conv":
        return node.op_type in ("MatMul", "Gemm", "Attention")
    shape = None if node.inputs[1] is None else node.inputs[1].shape
    return shape is not None and all(size == 1 for size in shape.dims[2:])


def high_in_copies(graph: Path, copied: Path, keep_high: Collection[str]) -> frozenset[str]:
    """Names of a whole-loop graph's nodes that stay in float32: what copies no converted node of the step graph.

    Args:
        graph: the whole loop.
        copied: the step graph.
        keep_high: names of its nodes.
    """
    converted = {f"{node.name}" for node in ir.load(copied).graph} - set(keep_high)
    names = [f"{node.name}" for node in ir.load(graph).graph]
    return frozenset(name for name in names if name.partition("/")[2] not in converted)


def refuse_large_products(bundle: Bundle, form: str, target: str) -> None:
    """Raise InvalidInput where the range audit says that a product leaves ``form``: it cannot be kept in fp32 here."""
    data: Any = bundle.read_json(AUDIT)
    graph = bundle.path(bundle.manifest.graphs["step"].file)
    products = {f"{node.name}" for node in ir.load(graph).graph} - all_but_products(graph)
    try:
        large = [
            str(row["node"])
            for row in data["findings"]
            if row["format"] == form and row["kind"] == "overflows" and row["node"] in products
        ]
    except (KeyError, TypeError) as e:
        raise BundleError(
            f"the range audit of {bundle.root.name} is damaged ({e!r}). Run: lehr audit {bundle.root.name}"
        ) from e
    if large:
        raise InvalidInput(
            f"target {target!r} multiplies matrices in {form} only, and {len(large)} products leave its range by the "
            f"audit, {large[0]!r} first. Choose a target that has fp32."
        )
