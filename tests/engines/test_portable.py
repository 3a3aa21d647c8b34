"""Portable graphs without an engine, against PyTorch in double precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from lehr.calibration.execute import OrtGraph
from lehr.engines.marked import graph_session
from lehr.engines.onnxruntime_cpu import lowered
from lehr.engines.portable import portable_session
from lehr.runtime.errors import RunFailed
from lehr.runtime.parity import relative_error

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[2, 8, 6, 6] x, float[8] w, float[8] b) => (float[2, 8, 6, 6] y) {
    y = GroupNormalization <num_groups = 4> (x, w, b)
}"""


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    """Groups whose mean is 500 times their spread, as deep layers of trained U-Nets have them."""
    rng = np.random.default_rng(0)
    x = 500 + rng.standard_normal((2, 8, 6, 6))
    given = {"x": x, "w": rng.standard_normal(8), "b": rng.standard_normal(8)}
    return {name: value.astype(np.float32) for name, value in given.items()}


@pytest.fixture
def exact(feeds: dict[str, np.ndarray]) -> np.ndarray:
    x, w, b = (torch.from_numpy(feeds[name]).double() for name in "xwb")
    return torch.nn.functional.group_norm(x, 4, w, b).numpy()


def test_group_norms_of_a_file_keep_their_digits(
    tmp_path: Path, feeds: dict[str, np.ndarray], exact: np.ndarray
) -> None:
    file = tmp_path / "g.onnx"
    ir.save(ir.from_onnx_text(GRAPH), file)
    assert relative_error(exact, portable_session(file, threads=1).run(feeds)["y"]) < 1e-4


def test_so_do_those_of_copies_that_hand_out_their_tensors(
    tmp_path: Path, feeds: dict[str, np.ndarray], exact: np.ndarray
) -> None:
    shown = GRAPH.replace("(float[2, 8, 6, 6] y)", "(float[2, 8, 6, 6] z)").replace(
        "(x, w, b)", "(x, w, b) z = Relu (y)"
    )
    model = ir.from_onnx_text(shown)
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "GroupNormalization").outputs[0])
    session = portable_session(ir.to_proto(model).SerializeToString(), tmp_path, threads=1)
    assert relative_error(exact, session.run(feeds)["y"]) < 1e-4
    ir.save(ir.from_onnx_text(shown), tmp_path / "g.onnx")
    assert relative_error(exact, graph_session(tmp_path / "g.onnx", ["y"], threads=1).run(feeds)["y"]) < 1e-4


def test_so_do_those_of_candidates(feeds: dict[str, np.ndarray], exact: np.ndarray) -> None:
    model = ir.from_onnx_text(GRAPH)
    assert relative_error(exact, OrtGraph(model, threads=1).run(feeds)["y"]) < 1e-4
    assert [node.op_type for node in model.graph] == ["GroupNormalization"], "the candidate stays as it is"


def test_a_graph_that_cannot_run_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=str(tmp_path)):
        portable_session(b"no graph", tmp_path)


def test_attention_runs_in_blocks_where_the_example_is_long(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[1, 2, tokens, 4] q) => (float[1, 2, tokens, 4] y) '
    file = tmp_path / "g.onnx"
    ir.save(ir.from_onnx_text(text + "{ y = Attention (q, q, q) }"), file)
    example = {"q": np.zeros((1, 2, 1024, 4), np.float32)}
    given, done = lowered(file, example)
    assert done == {"in_pieces": [], "blocked_attention": True}
    assert b"MultiHeadAttention" in given
    given, done = lowered(file, {"q": example["q"][:, :, :64]})
    assert not done["blocked_attention"]
    assert lowered(file)[0] == file
