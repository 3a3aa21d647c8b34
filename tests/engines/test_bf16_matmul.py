"""Recipe bf16-matmul: which products it means, what OpenVINO makes of them, and what that is worth."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lehr.engines.build import build
from lehr.engines.builders import candidates
from lehr.engines.graph.lowering.products import PRODUCTS, all_but_matrices
from lehr.engines.target import target
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import find
from lehr.runtime.errors import InvalidInput
from lehr.runtime.golden import read
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.recipe import Format, Scope, recipe
from lehr.runtime.verify import psnr_limit, rel_error_limit, step_outputs, verify


def conv_net(tmp_path: Path) -> Path:
    """x -> Conv 3x3 -> Conv 1x1 -> Conv 3x3 -> MatMul -> Conv 1x1 -> x 2 -> y."""
    rng = np.random.default_rng(0)

    def value(name: str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(["b", 4, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))

    def weight(name: str, *shape: int) -> ir.Value:
        tensor = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)

    weights = [
        weight("w0", 4, 4, 3, 3),
        weight("w1", 4, 4, 1, 1),
        weight("w2", 4, 4, 3, 3),
        weight("w3", 8, 8),
        weight("w4", 4, 4, 1, 1),
        weight("two", 1),
    ]
    steps = [
        ("Conv", "first"),
        ("Conv", "point"),
        ("Conv", "wide"),
        ("MatMul", "product"),
        ("Conv", "last"),
        ("Mul", "out"),
    ]
    given = value("x")
    nodes, current = [], given
    for (operator, name), held in zip(steps, weights, strict=True):
        pads = {"pads": [1, 1, 1, 1]} if name in ("first", "wide") else {}
        made = value(f"{name}.y")
        nodes.append(ir.node(operator, [current, held], pads, outputs=[made], name=name))
        current = made
    graph = ir.Graph([given], [current], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="net")
    path = tmp_path / "step.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def test_matrices_between_the_first_and_the_last_layer_are_meant_and_wide_convolutions_are_not(tmp_path: Path) -> None:
    kept = all_but_matrices(conv_net(tmp_path))
    assert kept == {"first", "wide", "last", "out"}


def test_of_a_transformer_all_products_are_meant_but_its_ends(dit_bundle: Path) -> None:
    graph = dit_bundle / "model" / "step.onnx"
    products = [f"{node.name}" for node in ir.load(graph).graph if node.op_type in PRODUCTS]
    kept = all_but_matrices(graph)
    assert [name for name in products if name in kept] == [products[0], products[-1]]


def test_the_recipe_says_what_it_computes_in_and_who_can(dit_bundle: Path) -> None:
    made = recipe("bf16-matmul")
    assert made.scope is Scope.MATRICES
    assert made.computes == {Format.BF16, Format.FP32}
    with pytest.raises(InvalidInput, match="no bf16 MatMul"):
        candidates(target("cpu"), made, "onnxruntime")
    golden = read(Bundle.open(dit_bundle))
    assert rel_error_limit(golden, "bf16-matmul") == rel_error_limit(golden, "bf16")
    assert psnr_limit(golden, "bf16-matmul") == psnr_limit(golden, "bf16")


def test_an_engine_errs_less_than_a_whole_graph_in_bf16_and_says_what_is_in_which_type(
    dit_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    root = tmp_path / "d.lehr"
    shutil.copytree(dit_bundle, root)
    try:
        record = build(root, target("cpu"), recipe("bf16-matmul"), library="openvino", threads=1)
        build(root, target("cpu"), recipe("bf16"), library="openvino", threads=1)
    except InvalidInput as e:
        pytest.skip(f"{e}")  # a processor without bf16
    assert set(record.achieved_precision) == {"float", "bfloat16"}
    assert 0.1 < record.achieved_precision["bfloat16"] < 0.9
    bundle = Bundle.open(root)
    golden = read(bundle)
    assert verify(bundle, record).passed
    errors = {}
    for name in ("bf16-matmul", "bf16"):
        outputs = np.stack(list(step_outputs(load_denoiser(bundle, find(bundle, "cpu", name)), golden)))
        errors[name] = float(((outputs - golden.steps.outputs) ** 2).mean())
    assert errors["bf16-matmul"] < 0.6 * errors["bf16"]
