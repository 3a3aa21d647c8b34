"""Embedding tables in 8 bits: what rows become, which tables are left alone; and files of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lehr.calibration.observed import Statistics
from lehr.calibration.rewrite import Rewrite
from lehr.calibration.stage_prompts import MAX_BYTES, PROMPTS, read_prompts
from lehr.calibration.stage_tables import LEAST_ROWS, quantise_tables
from lehr.engines.builders import builder
from lehr.engines.job import Job
from lehr.engines.target import target
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import recipe

IDS = np.array([[0, 3, 299], [7, 7, 1]])


def table_of(rows: int, dtype: type[np.floating] = np.float32) -> np.ndarray:
    random = np.random.default_rng(0)
    size = np.exp(random.standard_normal((rows, 1)))  # rows of very different sizes
    return (size * random.standard_normal((rows, 24))).astype(dtype)


def graph(table: np.ndarray, *, fixed: bool = False) -> onnx.ModelProto:
    """ids (B, L) -> rows of a table times a matrix; with ``fixed`` the ids are in the graph."""
    weight = np.random.default_rng(1).standard_normal((24, 8)).astype(np.float32)
    stored = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")]
    nodes = [helper.make_node("MatMul", ["rows", "weight"], ["out"], name="product")]
    source = "table"
    if table.dtype == np.float16:
        source = "wide"
        nodes.insert(0, helper.make_node("Cast", ["table"], ["wide"], to=TensorProto.FLOAT, name="cast"))
    nodes.insert(-1, helper.make_node("Gather", [source, "ids"], ["rows"], name="embed"))
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "l"])]
    if fixed:
        stored.append(numpy_helper.from_array(IDS, "ids"))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])]
        nodes.append(helper.make_node("Identity", ["x"], ["unused"], name="unused"))
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "l", size])
        for name, size in (("rows", 24), ("out", 8))
    ]
    made = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnx.shape_inference.infer_shapes(model)


def quantised(model: onnx.ModelProto) -> tuple[ir.Model, dict[str, int]]:
    nothing = Statistics(tensors={}, grams={}, timesteps=np.zeros((1, 2)), evaluations=0, samples=0, digest="")
    made = ir.from_proto(model)
    return made, quantise_tables(Rewrite(model=made, statistics=nothing))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_row_is_off_by_half_a_step_of_its_own_at_most(dtype: type[np.floating]) -> None:
    table = table_of(300, dtype)
    made, found = quantised(graph(table))
    assert found == {"embed": 300}
    kinds = {str(value.dtype) for value in made.graph.initializers.values()}
    assert "INT8" in kinds
    assert "FLOAT16" not in kinds  # the old table is gone
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(["rows"], {"ids": IDS})
    expected = table.astype(np.float32)[IDS]
    step = np.abs(expected).max(axis=-1, keepdims=True) / 127
    assert np.all(np.abs(rows - expected) <= 0.505 * step)
    assert np.any(rows != expected)


@pytest.mark.parametrize(
    "model", [lambda: graph(table_of(LEAST_ROWS - 1)), lambda: graph(table_of(300), fixed=True)], ids=["small", "fixed"]
)
def test_small_tables_and_rows_that_are_always_the_same_stay(model: Callable[[], onnx.ModelProto]) -> None:
    before = model()
    made, found = quantised(before)
    assert not found
    assert [node.op_type for node in made.graph] == [
        node.op_type for node in before.graph.node if node.name != "unused"
    ]


def test_a_table_that_is_not_finite_is_refused() -> None:
    table = table_of(300)
    table[5, 5] = np.inf
    with pytest.raises(InvalidInput, match="'table' is not finite"):
        quantised(graph(table))


def test_openvino_builds_fp32_over_a_table_that_is_stored_in_16_bits(tmp_path: Path) -> None:
    model = graph(table_of(300, np.float16))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    job = Job(
        name="step",
        graph=path,
        recipe=recipe("fp32"),
        target=target("cpu"),
        library="openvino",
        ranges={},
        feeds={"ids": IDS},
        threads=1,
    )
    plan = builder("openvino").build(job, tmp_path)
    assert plan.achieved_precision == {"float": 1.0}
    assert plan.operators["Gather"] == 1


# -------------------------------------------------------------------------------------------------------- prompts


def test_the_built_in_prompts_are_of_many_lengths_and_none_is_twice() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 48
    lengths = {len(prompt.split()) for prompt in PROMPTS}
    assert min(lengths) == 1
    assert max(lengths) > 10


@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]))))
def test_every_line_with_text_is_a_prompt_once(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    expected = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if expected:
        assert read_prompts(file) == expected
    else:
        with pytest.raises(InvalidInput, match="holds no prompt"):
            read_prompts(file)


def test_a_file_that_is_too_large_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_prompts(tmp_path)
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InvalidInput, match="more than"):
        read_prompts(large)
