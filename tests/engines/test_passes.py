"""Rewrites on small graphs: each changes what it should, keeps what it must, and the numbers stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lehr.engines.graph.passes.blocked_attention import LONG, block_attention
from lehr.engines.graph.passes.dead_code import remove_dead_code
from lehr.engines.graph.passes.decompose_attention import decompose_attention
from lehr.engines.graph.passes.decompose_norms import SINCE, decompose_norms
from lehr.engines.graph.passes.fold import fold_constants
from lehr.engines.graph.passes.fuse_attention import fuse_attention
from lehr.engines.graph.passes.fuse_norms import fuse_norms
from lehr.engines.graph.passes.merge_affine import merge_affine
from lehr.engines.graph.passes.redundant import remove_redundant

Feeds = Mapping[str, np.ndarray]

HEAD = '<ir_version: 10, opset_import: ["" : {opset}]>\n'


def graph(text: str, *, opset: int = 23) -> ir.Model:
    """A model from ONNX's text format; types and shapes of all values are inferred."""
    model = ir.from_onnx_text(HEAD.replace("{opset}", str(opset)) + text)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{number}"
    return ir.passes.common.ShapeInferencePass()(model).model


def run(model: ir.Model, feeds: Feeds) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))[0]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def external(name: str, array: np.ndarray, folder: Path) -> ir.Value:
    """A weight that lies in a file which is gone: whoever reads it fails."""
    tensor = ir.ExternalTensor(
        location="gone.bin",
        offset=0,
        length=array.nbytes,
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(array.shape),
        name=name,
        base_dir=folder,
    )
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)


# --------------------------------------------------------------------------------------------- dead code, folding


def test_dead_code_goes_and_unneeded_inputs_stay() -> None:
    model = graph("g (float[2] x, float[2] idle) => (float[2] y) { dead = Exp (x)  y = Neg (x) }")
    assert remove_dead_code(model).modified
    assert operators(model) == {"Neg": 1}
    assert [value.name for value in model.graph.inputs] == ["x", "idle"]
    assert not remove_dead_code(model).modified


def test_folding_computes_constants() -> None:
    model = graph("g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { b = Exp (a)  y = Mul (x, b) }")
    x = normal(2)
    assert fold_constants(model).modified
    assert operators(model) == {"Mul": 1}
    assert np.allclose(run(model, {"x": x}), x * np.exp([1, 2]), rtol=1e-6)


def test_folding_reads_no_weight_in_a_file_and_none_that_is_not_there_yet(tmp_path: Path) -> None:
    model = graph(
        "g (float[2] x, float[2] w, float[2] u) => (float[2] y) { v = Exp (w)  s = Add (v, u)  y = Mul (x, s) }"
    )
    for name, value in (("w", external("w", np.ones(2, np.float32), tmp_path)), ("u", None)):
        old = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(old)
        made = value or ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
        old.replace_all_uses_with(made)
        model.graph.initializers[name] = made
    assert not fold_constants(model).modified
    assert operators(model) == {"Exp": 1, "Add": 1, "Mul": 1}
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert model.graph.initializers["u"].const_value is None


# ---------------------------------------------------------------------------------------------- redundant movement


TARGETS = "<int64[2] flat = {6, 4}, int64[3] back = {2, 3, 4}, int64[2] other = {2, -1}>"


@pytest.mark.parametrize(
    "body, shape, left",
    [
        ("y = Identity (x)", "2, 3, 4", 1),  # joins an input and an output, both of which keep their names
        ("a = Identity (x)  y = Neg (a)", "2, 3, 4", 1),
        ("a = Transpose <perm = [0, 2, 1]> (x)  b = Transpose <perm = [0, 2, 1]> (a)  y = Neg (b)", "2, 3, 4", 1),
        ("a = Transpose <perm = [1, 2, 0]> (x)  b = Transpose <perm = [0, 2, 1]> (a)  y = Neg (b)", "3, 2, 4", 2),
        ("a = Cast <to = 11> (x)  b = Cast <to = 1> (a)  y = Neg (b)", "2, 3, 4", 1),
        ("a = Cast <to = 10> (x)  b = Cast <to = 1> (a)  y = Neg (b)", "2, 3, 4", 3),  # rounds
        ("a = Cast <to = 1> (x)  y = Neg (a)", "2, 3, 4", 1),
        ("a = Reshape (x, flat)  b = Reshape (a, back)  y = Neg (b)", "2, 3, 4", 1),
        ("a = Reshape (x, flat)  b = Reshape (a, other)  y = Neg (b)", "2, 12", 2),
    ],
)
def test_movement_that_cancels_goes_and_the_numbers_stay(body: str, shape: str, left: int) -> None:
    model = graph(f"g (float[2, 3, 4] x) => (float[{shape}] y) {TARGETS} {{ {body} }}")
    x = normal(2, 3, 4)
    expected = run(model, {"x": x})
    remove_redundant(model)
    assert len(model.graph) == left
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert np.array_equal(run(model, {"x": x}), expected)
    assert not remove_redundant(model).modified


# --------------------------------------------------------------------------------------------------------- norms

NORMS = {
    "LayerNormalization": "y = LayerNormalization <axis = -1, epsilon = 0.001> (x, w, b)",
    "LayerNormalization over two axes": "y = LayerNormalization <axis = 2> (x, m)",
    "RMSNormalization": "y = RMSNormalization <axis = -1, epsilon = 0.001> (x, w)",
    "GroupNormalization": "y = GroupNormalization <num_groups = 2, epsilon = 0.001> (x, c, d)",
    "Gelu": "y = Gelu (x)",
    "Gelu, tanh": 'y = Gelu <approximate = "tanh"> (x)',
}
WEIGHTS = {"w": (6,), "b": (6,), "m": (5, 6), "c": (4,), "d": (4,)}


def norm(name: str) -> ir.Model:
    return graph(
        "g (float[3, 4, 5, 6] x, float[6] w, float[6] b, float[5, 6] m, float[4] c, float[4] d) "
        "=> (float[3, 4, 5, 6] y) {" + NORMS[name] + "}"
    )


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_in_pieces_computes_the_same_and_is_found_again(name: str) -> None:
    model, operator = norm(name), name.partition(" ")[0].partition(",")[0]
    feeds = {"x": 3 * normal(3, 4, 5, 6) + 1, **{key: normal(*shape) for key, shape in WEIGHTS.items()}}
    expected = run(model, feeds)
    assert decompose_norms(model, [operator]).modified
    assert operator not in operators(model)
    assert np.allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-5)
    if "two axes" in name:  # exporters write no such pieces
        return
    assert fuse_norms(model).modified
    assert operators(model)[operator] == 1
    assert len(model.graph) == 1
    assert np.allclose(run(model, feeds), expected, rtol=1e-6, atol=1e-6)


def test_groups_of_one_channel_are_an_instance_norm_and_nothing_else() -> None:
    text = "y = GroupNormalization <num_groups = 4, epsilon = 0.001> (x, c, d)"
    model = graph(f"g (float[3, 4, 5, 6] x, float[4] c, float[4] d) => (float[3, 4, 5, 6] y) {{ {text} }}")
    feeds = {"x": 3 * normal(3, 4, 5, 6) + 1, "c": normal(4), "d": normal(4)}
    expected = run(model, feeds)
    decompose_norms(model)
    assert operators(model) == {"InstanceNormalization": 1}
    assert np.allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-5)


AFFINE = {"a": "4, 1, 1", "b": "4, 1, 1", "c": "3, 4, 1, 1", "d": "3, 4, 1, 1", "e": "3, 4, 5, 6", "s": "1"}
BOTH = "p = Mul (x, a)  q = Add (p, b)  r = Mul (c, q)"


@pytest.mark.parametrize(
    "body, merged",
    [
        (BOTH + "  y = Add (d, r)", True),
        (BOTH + "  t = Add (r, d)  y = Mul (t, q)", False),  # the inner one is needed in between
        (BOTH + "  t = Add (r, d)  y = Mul (t, r)", False),
        (BOTH + "  y = Add (r, e)", False),  # a residual is no shift
        ("p = Mul (x, e)  q = Add (p, b)  r = Mul (q, c)  y = Add (r, d)", False),
        ("p = Mul (x, s)  q = Add (p, b)  r = Mul (q, c)  y = Add (r, d)", False),
    ],
)
def test_affine_maps_of_channels_in_a_row_are_one(body: str, merged: bool) -> None:
    inputs = ", ".join(f"float[{shape}] {name}" for name, shape in {"x": "3, 4, 5, 6", **AFFINE}.items())
    model = graph(f"g ({inputs}) => (float[3, 4, 5, 6] y) {{ {body} }}")
    feeds = {"x": normal(3, 4, 5, 6)}
    feeds |= {name: normal(*map(int, shape.split(","))) for name, shape in AFFINE.items()}
    expected, before = run(model, feeds), len(model.graph)
    assert merge_affine(model).modified == merged
    assert np.allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-5)
    large = [node for node in model.graph if node.outputs[0].shape == [3, 4, 5, 6]]
    assert len(large) == (2 if merged else before)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not merge_affine(model).modified


def test_only_the_named_operators_are_taken_apart() -> None:
    model = norm("Gelu")
    assert not decompose_norms(model, [name for name in SINCE if name != "Gelu"]).modified
    assert operators(model) == {"Gelu": 1}


def test_a_norm_in_half_precision_does_its_squares_in_float32() -> None:
    model = graph("g (float16[2, 8] x, float16[8] w) => (float16[2, 8] y) { y = RMSNormalization <axis = -1> (x, w) }")
    feeds = {"x": (1000 * normal(2, 8)).astype(np.float16), "w": np.ones(8, np.float16)}
    decompose_norms(model)
    y = run(model, feeds).astype(np.float64)
    assert np.allclose(y, feeds["x"] / np.sqrt((feeds["x"].astype(np.float64) ** 2).mean(-1, keepdims=True)), rtol=2e-3)


def test_group_norm_of_older_operator_sets_is_not_mistaken_for_the_new() -> None:
    model = norm("GroupNormalization")
    decompose_norms(model)
    model.opset_imports[""] = 20
    fuse_norms(model)
    assert "GroupNormalization" not in operators(model)


# ----------------------------------------------------------------------------------------------------- attention

QKV = "float[2, 3, 5, 8] q, float[2, 3, 7, 8] k, float[2, 3, 7, 4] v"
ATTENTIONS = {
    "plain": "y = Attention (q, k, v)",
    "scaled": "y = Attention <scale = 0.3> (q, k, v)",
    "masked": "y = Attention (q, k, v, mask)",
    "masked by booleans": "y = Attention (q, k, v, allowed)",
}


def attention_feeds() -> dict[str, np.ndarray]:
    allowed = np.random.default_rng(0).random((2, 1, 5, 7)) < 0.7
    allowed[..., 0] = True  # a row that may look nowhere has no softmax
    return {
        "q": normal(2, 3, 5, 8), "k": normal(2, 3, 7, 8), "v": normal(2, 3, 7, 4),
        "mask": normal(2, 1, 5, 7), "allowed": allowed,
    }  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_in_pieces_computes_the_same_and_is_found_again(name: str) -> None:
    inputs = f"{QKV}, float[2, 1, 5, 7] mask, bool[2, 1, 5, 7] allowed"
    model = graph(f"g ({inputs}) => (float[2, 3, 5, 4] y) {{ {ATTENTIONS[name]} }}")
    feeds = attention_feeds()
    expected = run(model, feeds)
    assert decompose_attention(model).modified
    assert "Attention" not in operators(model)
    assert np.allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-6)
    assert any(node.outputs[0].name.endswith(".scores") for node in model.graph)
    ir.passes.common.ShapeInferencePass()(model)
    assert fuse_attention(model).modified
    assert operators(model)["Attention"] == 1
    assert operators(model)["Softmax"] == operators(model)["Transpose"] == 0
    assert np.allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-6)


def test_attention_on_three_axes_is_split_into_heads() -> None:
    model = graph(
        "g (float[2, 5, 24] q, float[2, 7, 24] k, float[2, 7, 24] v) => (float[2, 5, 24] y) "
        "{ y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v) }"
    )
    feeds = {"q": normal(2, 5, 24), "k": normal(2, 7, 24), "v": normal(2, 7, 24)}
    expected = run(model, feeds)
    assert decompose_attention(model).modified
    assert np.allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["f = Mul (s, c)", "f = Div (s, c)"])
def test_a_scale_after_the_product_is_understood(scale: str) -> None:
    model = graph(
        f"g ({QKV}) => (float[2, 3, 5, 4] y) <float c = {{0.25}}> {{ kt = Transpose <perm = [0, 1, 3, 2]> (k)  "
        f"s = MatMul (q, kt)  {scale}  p = Softmax <axis = -1> (f)  y = MatMul (p, v) }}"
    )
    feeds = {name: value for name, value in attention_feeds().items() if name in "qkv"}
    expected = run(model, feeds)
    assert fuse_attention(model).modified
    assert operators(model) == {"Attention": 1}
    assert np.allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["", "<scale = 0.5>"])
def test_long_attention_runs_in_blocks_and_computes_the_same(scale: str) -> None:
    turn = "Transpose <perm = [0, 2, 1, 3]>"
    body = f"q = {turn} (x)  k = {turn} (z)  a = Attention {scale} (q, k, k)  y = {turn} (a)"
    text = f"g (float[1, tokens, 2, 4] x, float[1, keys, 2, 4] z) => (float[1, tokens, 2, 4] y) {{ {body} }}"
    model = graph(text)
    feeds = {"x": normal(1, LONG, 2, 4), "z": 2 * normal(1, LONG + 8, 2, 4)}
    expected = run(model, feeds)
    assert not block_attention(graph(text), {"tokens": LONG - 1, "keys": LONG}).modified
    assert not block_attention(graph(text), {"tokens": LONG}).modified, "nobody knows how many keys"
    assert block_attention(model, {"tokens": LONG, "keys": LONG + 8}).modified
    assert operators(model) == {"Reshape": 4, "MultiHeadAttention": 1}, "no tensor is moved"
    assert np.allclose(run(model, feeds), expected, atol=1e-5)
    short = {"x": normal(1, 3, 2, 4), "z": normal(1, 5, 2, 4)}
    assert np.allclose(run(model, short), run(graph(text), short), atol=1e-5)


@pytest.mark.parametrize(
    "inputs, call",
    [
        ("float[1, 2, 2048, 4] q, float[2048] m", "Attention (q, q, q, m)"),
        ("float[1, 2, 2048, 4] q", "Attention <is_causal = 1> (q, q, q)"),
        ("float16[1, 2, 2048, 4] q", "Attention (q, q, q)"),
        ("float[1, 2, 2048, 4] q, float[1, 1, 2048, 4] k", "Attention (q, k, k)"),
    ],
)
def test_attention_that_the_other_operator_cannot_do_stays(inputs: str, call: str) -> None:
    kind = inputs.partition("[")[0]
    model = graph(f"g ({inputs}) => ({kind}[1, 2, 2048, 4] y) {{ y = {call} }}")
    assert not block_attention(model, {}).modified


@pytest.mark.parametrize(
    "body, why",
    [
        ("s = MatMul (q, kt)  p = Softmax <axis = 2> (s)  y = MatMul (p, v)", "a softmax over queries"),
        ("s = MatMul (q, kt)  f = Add (s, narrow)  p = Softmax (f)  y = MatMul (p, v)", "a mask broadcast over keys"),
        ("s = MatMul (q, kt)  p = Softmax (s)  z = ReduceSum (p)  m = MatMul (p, v)  y = Add (m, z)", "weights shown"),
    ],
)
def test_what_attention_does_not_compute_is_left_in_pieces(body: str, why: str) -> None:
    text = f"g ({QKV}, float[2, 1, 5, 1] narrow) => (float[2, 3, 5, 4] y) {{ kt = Transpose <perm = [0, 1, 3, 2]> (k)  "
    model = graph(text + body + "}")
    assert not fuse_attention(model).modified, why


@pytest.mark.parametrize("attribute", ["is_causal = 1", "softcap = 2.0"])
def test_an_attention_that_has_no_pieces_stays_whole(attribute: str) -> None:
    model = graph(f"g ({QKV}) => (float[2, 3, 5, 4] y) {{ y = Attention <{attribute}> (q, k, v) }}")
    assert not decompose_attention(model).modified
    assert operators(model) == {"Attention": 1}
