"""Every backbone family at older operator sets and in half precision: what ONNX Runtime computes stays the same.

Each family is traced once. The configurations are those of the export tests, U-Nets with two levels.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lehr.engines.graph.lowering import ONNX, TENSORRT_10_3, Dialect, lower, set_opset
from lehr.engines.graph.lowering.half import write_half
from lehr.engines.graph.passes.decompose_attention import decompose_attention
from lehr.engines.graph.passes.decompose_norms import decompose_norms
from lehr.engines.graph.passes.fold import fold_constants
from lehr.engines.graph.passes.fuse_attention import fuse_attention
from lehr.engines.graph.passes.fuse_norms import fuse_norms
from lehr.engines.graph.passes.half import convert_to_half
from lehr.engines.graph.passes.redundant import remove_redundant
from lehr.engines.graph.weights import bind_weights, save_graph
from lehr.export.backbones import families
from lehr.export.trace import trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.errors import BuildFailed, InvalidInput

TOLERANCE = 1e-5  # relative to the largest output
HALF_TOLERANCE = 0.05  # random weights, no keep-high list: a sign or a weight gone wrong costs far more
NEW = {"Attention", "GroupNormalization", "RMSNormalization"}  # operators that opset 20 has not, or has otherwise

_path = Path(__file__).parents[1] / "export" / "small_backbones.py"
_spec = importlib.util.spec_from_file_location("small_configurations", _path)
assert _spec is not None
assert _spec.loader is not None
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

_LEVELS = ("channel_mult", "block_out_channels", "transformer_depth")
# Of the same operators as latent_unet, dit, pixart or flux.
_LIKE_ANOTHER = {"gaussian_dit", "hunyuan_dit", "sdxl", "single_stream", "sit", "spacetime_dit", "transfusion", "uvit"}


def two_levels(params: Any) -> Any:
    lists = {field.name: getattr(params, field.name) for field in fields(params) if field.name in _LEVELS}
    return replace(params, **{name: value[:1] + value[-1:] for name, value in lists.items() if len(value) > 2})


@dataclass(frozen=True)
class Family:
    path: Path
    feeds: dict[str, np.ndarray]
    expected: np.ndarray

    def model(self) -> ir.Model:
        return ir.load(self.path)

    def error(self, graph: ir.Model | Path) -> float:
        """Of another graph's output, relative to the largest of this one's."""
        return float(
            np.abs(run(graph, self.path.parent, self.feeds) - self.expected).max() / np.abs(self.expected).max()
        )


def run(graph: ir.Model | Path, weights: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if isinstance(graph, ir.Model):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    given = ir.to_proto(graph).SerializeToString() if isinstance(graph, ir.Model) else graph
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.long] if name in _LIKE_ANOTHER else []) for name in families()],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    preset = small.small(next(iter(importlib.import_module(f"lehr.export.backbones.{request.param}").PRESETS.values())))
    module = small.randomise(preset.build(two_levels(preset.params)))
    folder = tmp_path_factory.mktemp(request.param)
    model = trace(module, preset.spec)
    bind_weights([model], TorchModuleSource(module), folder / "weights.safetensors")
    save_graph(model, folder / "step.onnx")
    feeds = small.random_feeds(preset.spec, small.unseen(preset.spec))
    return Family(folder / "step.onnx", feeds, run(folder / "step.onnx", folder, feeds))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


# --------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("opset, dialect", [(21, TENSORRT_10_3), (18, ONNX)])
def test_a_family_computes_the_same_at_an_older_operator_set(
    family: Family, opset: int, dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lower(family.model(), opset, dialect)
    assert model.opset_imports == {"": opset}
    monkeypatch.chdir(family.path.parent)  # where the checker looks for weights
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not {"Attention", "RMSNormalization"} & set(operators(model))
    if opset == 18:
        assert not {"GroupNormalization", "Gelu"} & set(operators(model))
    assert family.error(model) <= TOLERANCE


def test_a_family_taken_apart_is_put_together_again(family: Family) -> None:
    model, before = family.model(), operators(family.model())
    decompose_attention(model)
    decompose_norms(model)
    assert not NEW & set(operators(model))
    fuse_norms(model)
    fuse_attention(model)
    after = operators(model)
    # A norm whose groups are single channels is one InstanceNormalization in pieces, and stays that.
    after["GroupNormalization"] += after["InstanceNormalization"] - before["InstanceNormalization"]
    assert {name: after[name] for name in (*NEW, "Gelu", "LayerNormalization")} == {
        name: before[name] for name in (*NEW, "Gelu", "LayerNormalization")
    }
    assert family.error(model) <= TOLERANCE


def test_cleaning_a_portable_graph_changes_no_number(family: Family) -> None:
    model = family.model()
    fold_constants(model)
    remove_redundant(model)
    assert len(model.graph) <= len(family.model().graph)
    assert family.error(model) <= 1e-7


def test_a_family_runs_in_fp16_from_weights_of_half_the_size(family: Family, tmp_path: Path) -> None:
    path = write_half(family.path, tmp_path, keep_high=())
    onnx.checker.check_model(str(path), full_check=True)
    model = ir.load(path)
    products = [node for node in model.graph if node.op_type in ("MatMul", "Conv", "Gemm", "Attention")]
    half = [node for node in products if node.outputs[0].dtype == ir.DataType.FLOAT16]
    assert len(half) > 0.8 * len(products)
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} <= {
        ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL,
    }  # fmt: skip
    sizes = [(folder / "weights.safetensors").stat().st_size for folder in (tmp_path, family.path.parent)]
    assert sizes[0] < 0.6 * sizes[1]
    assert 0 < family.error(path) <= HALF_TOLERANCE


def test_a_family_converts_to_valid_bf16(family: Family, tmp_path: Path) -> None:
    """No CPU provider of ONNX Runtime runs bf16 products, so the checker is the judge."""
    path = write_half(family.path, tmp_path, keep_high=(), dtype=ir.DataType.BFLOAT16)
    onnx.checker.check_model(str(path), full_check=True)
    assert any(value.dtype == ir.DataType.BFLOAT16 for value in ir.load(path).graph.initializers.values())


# ---------------------------------------------------------------------------------------------------- small graphs


def graph(text: str, *, opset: int = 23) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    return ir.passes.common.ShapeInferencePass()(model).model


def test_nodes_to_keep_high_compute_in_float32_and_share_casts() -> None:
    model = graph(
        "g (float[2] x) => (float[2] y) { a = Exp (x)  b = Sin (a)  c = Cos (b)  d = Add (c, a)  y = Add (d, c) }"
    )
    convert_to_half(model, keep_high={"Sin_1", "Cos_2"})
    types = {node.name: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}
    assert [types[name] == ir.DataType.FLOAT for name in ("Exp_0", "Sin_1", "Cos_2", "Add_3")] == [
        False,
        True,
        True,
        False,
    ]
    # x down, Exp's result up to Sin, Cos's down once for both sums, y up: nothing between Sin and Cos.
    assert operators(model)["Cast"] == 4


def test_an_input_that_is_only_moved_is_rounded_where_it_is_first_computed_with() -> None:
    model = graph(
        "g (float[2] t) => (float[2, 1] y) <int64[1] last = {1}> { a = Unsqueeze (t, last)  b = Sin (a)  y = Neg (b) }"
    )
    convert_to_half(model, keep_high={"Sin_1"})
    assert {node.op_type: node.outputs[0].dtype for node in model.graph}["Unsqueeze"] == ir.DataType.FLOAT
    t = np.array([999.5, 0.123], np.float32)
    assert np.abs(run(model, Path(), {"t": t})[:, 0] + np.sin(t)).max() < 1e-3  # fp16 itself would move 999.5 by .25


def test_a_constant_that_fp16_cannot_hold_keeps_its_node_high() -> None:
    model = graph(
        "g (float[2] x) => (float[2] y) <float large = {100000}, float small = {1e-9}, float fine = {0.5}> "
        "{ a = Mul (x, large)  b = Div (a, large)  c = Add (b, small)  y = Mul (c, fine) }"
    )
    convert_to_half(model)
    types = {node.name: node.outputs[0].dtype for node in model.graph}
    assert [types[name] for name in ("Mul_0", "Div_1", "Add_2")] == [ir.DataType.FLOAT] * 3
    assert types["Mul_3"] == ir.DataType.FLOAT16
    assert np.allclose(run(model, Path(), {"x": np.ones(2, np.float32)}), 0.5)


def test_weights_are_read_only_when_they_are_written(tmp_path: Path) -> None:
    model = graph("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul (x, w) }")
    weight = model.graph.initializers["w"]
    weight.const_value = ir.ExternalTensor(
        location="gone.bin",
        offset=0,
        length=8,
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape([2]),
        name="w",
        base_dir=tmp_path,
    )
    convert_to_half(model)
    (lazy,) = [value.const_value for value in model.graph.initializers.values()]
    assert isinstance(lazy, ir.LazyTensor)
    with pytest.raises(FileNotFoundError):
        lazy.numpy()


def test_a_weight_too_large_for_fp16_is_named() -> None:
    model = graph("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul (x, w) }")
    tensor = ir.tensor(np.array([1, 1e6], np.float32), name="w")
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        lambda: tensor, dtype=ir.DataType.FLOAT, shape=ir.Shape([2]), name="w"
    )
    convert_to_half(model)
    with pytest.raises(InvalidInput, match=r"'w' holds 1e\+06, too large for float16"):
        next(iter(model.graph.initializers.values())).const_value.numpy()


def test_a_name_that_no_node_has_is_refused() -> None:
    model = graph("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    with pytest.raises(InvalidInput, match="has no nodes"):
        convert_to_half(model, keep_high={"Exp_7"})


def test_only_half_formats_are_accepted() -> None:
    with pytest.raises(InvalidInput, match="FLOAT16 or BFLOAT16"):
        convert_to_half(graph("g (float[2] x) => (float[2] y) { y = Neg (x) }"), dtype=ir.DataType.DOUBLE)


def test_an_operator_without_a_lowering_is_named() -> None:
    model = graph(
        "g (float[2, 3, 5, 8] q, float[2, 3, 7, 8] k) => (float[2, 3, 5, 8] y) "
        "{ y = Attention <is_causal = 1> (q, k, k) }"
    )
    with pytest.raises(BuildFailed, match=r"'Attention_0': Attention does not exist at opset 20"):
        lower(model, 20)
    assert model.opset_imports[""] == 23


def test_an_operator_that_changed_its_meaning_is_refused() -> None:
    model = graph(
        "g (float[2, 4, 3] x, float[2] s) => (float[2, 4, 3] y) { y = GroupNormalization <num_groups = 2> (x, s, s) }",
        opset=20,
    )
    with pytest.raises(BuildFailed, match="means something else at opset 23"):
        set_opset(model, 23)


@pytest.mark.parametrize("value, refused", [("half_pixel_symmetric", True), ("half_pixel", False)])
def test_an_attribute_value_newer_than_the_operator_set_is_refused(value: str, refused: bool) -> None:
    model = graph(
        f"g (float[1, 1, 4] x) => (float[1, 1, 8] y) <float[3] s = {{1, 1, 2}}> {{ y = Resize "
        f'<coordinate_transformation_mode = "{value}", mode = "linear"> (x, , s) }}'
    )
    if refused:
        with pytest.raises(BuildFailed, match=value):
            set_opset(model, 18)
    else:
        set_opset(model, 18)
        assert model.opset_imports[""] == 18


def test_a_type_newer_than_the_operator_set_is_refused() -> None:
    model = graph("g (bfloat16[1, 1, 4] x, bfloat16[1, 1, 2] w) => (bfloat16[1, 1, 3] y) { y = Conv (x, w) }")
    with pytest.raises(BuildFailed, match="Conv takes no BFLOAT16 at opset 21"):
        set_opset(model, 21)


def test_a_dialect_names_only_what_can_be_taken_apart() -> None:
    with pytest.raises(InvalidInput, match="'Conv'"):
        Dialect(name="none", pieces=frozenset({"Conv"}))


@pytest.mark.parametrize("opset", [17, 24])
def test_operator_sets_out_of_range_are_refused(opset: int) -> None:
    with pytest.raises(InvalidInput, match="18 to 23"):
        lower(graph("g (float[2] x) => (float[2] y) { y = Neg (x) }"), opset)
