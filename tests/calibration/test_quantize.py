"""Quantised graphs: numbers as ONNX Runtime rounds them, standard patterns, errors that follow from the format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lehr.calibration.columns import columns
from lehr.calibration.configs import (
    ALPHAS,
    CONFIGS,
    Config,
    Float4,
    Float8,
    Int8,
    Keep,
    Range,
    Rounding,
    WeightOnly,
    ZeroPoint,
    config_from_json,
    config_to_json,
)
from lehr.calibration.histogram import count_by_channel
from lehr.calibration.layers import Kind, Role, layers, probabilities_of
from lehr.calibration.numbers import (
    affine,
    block_scales,
    gptq,
    nearest_integer,
    nvfp4_scales,
    scales_of,
    spread,
    to_e4m3,
    to_integers,
)
from lehr.calibration.observers import Statistics, TensorStatistics
from lehr.calibration.quantize import CHOICES, HANDLERS, applies, quantize
from lehr.engines.graph.lowering.restored import restore_weights
from lehr.engines.graph.lowering.save import write_graph
from lehr.engines.graph.lowering.unsigned import shift_activations
from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.recipe import Format

CPU = ["CPUExecutionProvider"]
FEW = st.floats(-300, 300, width=32)


def run(model: ir.Model | Path, feeds: dict[str, np.ndarray], *, fused: bool = False) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fused else "1")
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    # It takes the zero of fp8 for the least number and drops the Relu in front.
    apart = [] if fused else ["ReluQuantRewrite"]
    return ort.InferenceSession(source, options, providers=CPU, disabled_optimizers=apart).run(None, feeds)[0]


# --------------------------------------------------------------------------------------------------------- numbers


LARGEST = {"int8": 127.0, "float8e4m3fn": 448.0, "int4": 7.0}


@cache
def rounder(kind: str) -> ort.InferenceSession:
    """ONNX Runtime's own quantisers, there and back, with a scale that is fed."""
    x, s, y = (
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, d)
        for n, d in zip("xsy", ([16], [], [16]), strict=True)
    )
    zero = onnx.helper.make_tensor("z", getattr(onnx.TensorProto, kind.upper()), [], [0])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x, s], [y], [zero])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=CPU)


@pytest.mark.parametrize("kind", LARGEST)
@given(values=hnp.arrays(np.float32, 16, elements=FEW), peak=st.floats(1e-3, 300))
@settings(max_examples=50)
def test_numbers_are_rounded_as_onnx_runtime_rounds_them(kind: str, values: np.ndarray, peak: float) -> None:
    scale = scales_of(np.array(peak), LARGEST[kind])
    expected = rounder(kind).run(None, {"x": values, "s": np.asarray(scale)})[0]
    numbers = to_e4m3(values, scale) if kind == "float8e4m3fn" else to_integers(values, scale, int(kind[3:]))
    assert np.array_equal(numbers.astype(np.float32) * scale, expected)


@given(hnp.arrays(np.float64, 8, elements=st.floats(0, 1e4)), st.sampled_from([7.0, 127.0, 448.0]))
def test_scales_are_the_same_numbers_in_half_precision(peaks: np.ndarray, largest: float) -> None:
    scales = scales_of(peaks, largest)
    assert np.all(scales > 0)
    assert np.all(scales.astype(np.float64) * largest >= peaks * (1 - 1e-6))  # nothing is clipped
    assert np.all(scales <= np.maximum(peaks / largest * 1.008, 2.0**-24) + 2.0**-24)
    assert np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
    normal = scales > 2.0**-16
    assert np.array_equal(scales.astype(ml_dtypes.bfloat16).astype(np.float32)[normal], scales[normal])


def test_gptq_errs_less_where_inputs_depend_on_each_other() -> None:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((4000, 6)) @ random.standard_normal((6, 150)) + 0.1 * random.standard_normal(
        (4000, 150)
    )
    weight = random.standard_normal((150, 40)).astype(np.float32)
    scale = np.broadcast_to(scales_of(np.abs(weight).max(axis=0), 7.0), weight.shape)
    plain = to_integers(weight, scale, 4).astype(np.float32) * scale
    made = gptq(weight, inputs.T @ inputs / len(inputs), scale, lambda x: nearest_integer(x, 4)) * scale
    errors = [float(((inputs @ (w - weight)) ** 2).mean()) for w in (made, plain)]
    assert errors[0] < 0.3 * errors[1]
    independent = gptq(weight, np.eye(150), scale, lambda x: nearest_integer(x, 4)) * scale
    assert np.array_equal(independent, plain)  # nothing to make up for


def test_blocks_clip_what_costs_less_and_nvfp4_keeps_small_blocks() -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((64, 8)).astype(np.float32)
    weight[0, 0] = 2.5
    scales = block_scales(weight, 32, np.ones(64))
    assert scales.shape == (2, 8)
    wide = spread(scales, 32, 64)
    error = ((to_integers(weight, wide, 4).astype(np.float32) * wide - weight) ** 2).mean()
    plain = spread(scales_of(np.abs(weight.reshape(2, 32, 8)).max(axis=1), 7.0), 32, 64)
    assert error < ((to_integers(weight, plain, 4).astype(np.float32) * plain - weight) ** 2).mean()
    weight[:16] *= 1e-6
    found, top = nvfp4_scales(weight, 16)
    assert np.all(found.astype(np.float32) > 0)
    assert found.astype(np.float32).max() * float(top) * 6 == pytest.approx(np.abs(weight).max(), rel=0.07)


# ---------------------------------------------------------------------------------------------------------- graphs

TEXT = (
    "g (float[b, 3, 8, 8] sample, float[b, 32] t) => (float[b, 4, 8, 8] y) "
    "<float[32,3,3,3] w0 = {0}, float[32] b0 = {0}, float[32,32,3,3] w1 = {0}, float[32] b1 = {0}, "
    "float[64,32] m0 = {0}, float[64] c0 = {0}, float[64,32] m1 = {0}, float[32,64] g0 = {0}, float[32] g1 = {0}, "
    "float[4,32,1,1] w2 = {0}, int64[3] flat = {0}, int64[4] square = {0}, int64[4] heads = {0}, "
    "int64[2] rows = {0}, int64[3] back = {0}> {"
    " h0 = Conv <pads=[1,1,1,1]> (sample, w0, b0)  h1 = Relu (h0)  h2 = Conv <pads=[1,1,1,1]> (h1, w1, b1)"
    " f = Reshape (h2, flat)  x = Transpose <perm=[0,2,1]> (f)"
    " m0t = Transpose <perm=[1,0]> (m0)  p = MatMul (x, m0t)  q = Add (p, c0)"
    " m1t = Transpose <perm=[1,0]> (m1)  r = MatMul (x, m1t)"
    " qh = Reshape (q, heads)  rh = Reshape (r, heads)  a = Attention (qh, rh, rh)  as = Reshape (a, rows)"
    " g = Gemm <transB=1> (as, g0, g1)  gs = Reshape (g, back)  e = Transpose <perm=[0,2,1]> (gs)"
    " e4 = Reshape (e, square)  k = Add (e4, h2)  y = Conv (k, w2) }"
)
SHAPES = {"flat": [0, 0, -1], "square": [0, 0, 8, 8], "heads": [0, 4, 64, 16], "rows": [-1, 64], "back": [-1, 64, 32]}


def network(folder: Path) -> ir.Model:
    """Convolutions, products (one a Gemm), attention; weights in a file, as exported graphs have them."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]>\n{TEXT}')
    random = np.random.default_rng(7)
    for name, value in model.graph.initializers.items():
        shape = tuple(value.shape.numpy())
        if name in SHAPES:
            value.const_value = ir.tensor(np.array(SHAPES[name], np.int64), name=name)
            continue
        array = (random.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)
        tensor = ir.tensor(array, name=name)
        value.const_value = ir.LazyTensor(lambda t=tensor: t, dtype=tensor.dtype, shape=tensor.shape, name=name)
    for node in model.graph:
        node.name = f"net.{node.outputs[0].name}/{node.op_type}"
    model = ir.passes.common.ShapeInferencePass()(model).model
    path = write_graph(model, folder, "step.onnx")
    return ir.load(path)


def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(8)
    return {
        "sample": random.standard_normal((2, 3, 8, 8)).astype(np.float32),
        "t": random.standard_normal((2, 32)).astype(np.float32),
    }


def observed(model: ir.Model) -> Statistics:
    """Statistics of the test's own inputs."""
    found = layers(model)
    wanted = {name: 1 if layer.kind is Kind.CONV else -1 for layer in reversed(found) for name in layer.inputs}
    wide = ir.load(Path(str(model.graph.initializers["w0"].const_value.base_dir)) / "step.onnx")
    values = {str(v.name): v for node in wide.graph for v in node.outputs}
    names = [name for name in wanted if name in values]
    for name in names:
        wide.graph.outputs.append(values[name])
    session = ort.InferenceSession(_saved(wide, model), providers=CPU)
    made = dict(zip(names, session.run(names, inputs()), strict=True)) | inputs()
    logits = made["qh"].astype(float) @ made["rh"].astype(float).swapaxes(2, 3) / 4
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    largest = probabilities_of("net.a/Attention")
    made[largest] = (shares / shares.sum(axis=-1, keepdims=True)).max().astype(np.float32).reshape(1, 1)
    wanted[largest] = -1
    tensors, grams = {}, {}
    for name, axis in wanted.items():
        rows = np.ascontiguousarray(np.moveaxis(made[name], axis, -1).reshape(-1, made[name].shape[axis]))
        counts = count_by_channel(rows).astype(float)
        tensors[name] = TensorStatistics(
            axis=axis,
            low=float(rows.min()),
            high=float(rows.max()),
            lows=rows.min(axis=0),
            highs=rows.max(axis=0),
            peak=np.abs(rows).max(axis=0)[None],
            histogram=counts.sum(axis=0)[None],
            by_channel=counts,
            mean=rows.mean(axis=0, dtype=float),
            magnitude=np.abs(rows).mean(axis=0, dtype=float),
            square=(rows.astype(float) ** 2).mean(axis=0),
            weights=np.ones(1),
        )
    nodes = {node.name: node for node in model.graph}
    for layer in found:
        if layer.weight is not None:
            rows = columns(nodes[layer.name], made[layer.inputs[0]], layer.weight_shape)
            grams[layer.name] = rows.T.astype(float) @ rows / len(rows)
    return Statistics(
        tensors=tensors, grams=grams, timesteps=np.array([[1.0, 0.0]]), evaluations=1, samples=2, digest="0" * 64
    )


def _saved(model: ir.Model, like: ir.Model) -> str:
    path = Path(str(like.graph.initializers["w0"].const_value.base_dir)) / "observed.onnx"
    ir.save(model, path)
    return str(path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, ir.Model]]:
    """Quantise the network by a plan and write it; returns where, and the model."""

    def quantised(config: Config, *, keep: frozenset[Role] = frozenset(), folder: str = "q") -> tuple[Path, ir.Model]:
        place = tmp_path / "plain"
        place.mkdir(exist_ok=True)
        model = network(place)
        plan = {la.name: config for la in layers(model) if applies(la, config) and not la.roles & keep}
        made = quantize(model, plan, observed(network(place)))
        (tmp_path / folder).mkdir()
        return write_graph(made, tmp_path / folder, "step.onnx"), made

    return quantised


def reference(folder: Path) -> np.ndarray:
    (folder / "reference").mkdir()
    network(folder / "reference")
    return run(folder / "reference" / "step.onnx", inputs())


def error_of(path: Path, expected: np.ndarray) -> float:
    return float(np.linalg.norm(run(path, inputs()) - expected) / np.linalg.norm(expected))


EVERY: dict[str, tuple[Config, float]] = {  # configuration -> the largest relative error that its digits explain
    "int8": (Int8(), 0.03),
    "int8, mse": (Int8(activation=Range.MSE), 0.03),
    "int8, smooth": (Int8(alphas=ALPHAS), 0.03),
    "int8, gptq": (Int8(alphas=(0.5,), rounding=Rounding.GPTQ), 0.03),
    "int8, own zero": (Int8(zero=ZeroPoint.OWN), 0.03),
    "int8, own zero, all": (Int8(zero=ZeroPoint.OWN, alphas=ALPHAS, rounding=Rounding.GPTQ), 0.03),
    "weights int8": (WeightOnly(), 0.015),
    "weights int8, blocks": (WeightOnly(block=16), 0.01),
    "weights int4": (WeightOnly(format=Format.INT4), 0.15),
    "weights int4, awq, gptq": (WeightOnly(format=Format.INT4, alphas=ALPHAS, rounding=Rounding.GPTQ), 0.15),
    "weights fp8": (WeightOnly(format=Format.FP8), 0.05),
    "fp8": (Float8(), 0.08),
    "fp8, gptq": (Float8(rounding=Rounding.GPTQ), 0.08),
    "nothing": (Keep(), 1e-6),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_quantised_network_errs_as_its_digits_explain(
    name: str, make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    config, most = EVERY[name]
    path, model = make(config)
    error = error_of(path, reference(tmp_path))
    assert error < most
    if not isinstance(config, Keep):
        assert error > 1e-4  # it is quantised at all
    onnx.checker.check_model(str(path))
    assert {node.domain for node in ir.load(path).graph} == {""}
    assert len(json.loads(model.metadata_props[CHOICES])) == (0 if isinstance(config, Keep) else _fits(config))


def _fits(config: Config) -> int:
    """Layers of the network that a configuration fits: three convolutions, three products, one attention."""
    return 7 if isinstance(config, Float8 | Int8) else 3 if isinstance(config, Float4) else 6


def test_every_configuration_has_a_handler_and_survives_json() -> None:
    assert set(HANDLERS) == set(CONFIGS.values())
    for config, _ in EVERY.values():
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    with pytest.raises(UnknownName, match="Int8"):
        config_from_json({"type": "Int9"})
    with pytest.raises(InvalidInput, match="damaged"):
        config_from_json({"type": "Int8", "bits": 7})


def test_layers_that_read_one_tensor_share_its_quantiser(make: Callable[..., tuple[Path, ir.Model]]) -> None:
    path, _ = make(Int8(alphas=(0.5,)))
    counts = Counter(node.op_type for node in ir.load(path).graph)
    assert counts["QuantizeLinear"] == 5 + 4  # six layers, two of which read x, and the operands of attention
    assert counts["Gemm"] == 0


def test_first_and_last_layers_have_their_roles_and_stay_as_they_are(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    (tmp_path / "roles").mkdir()
    found = {layer.name: layer for layer in layers(network(tmp_path / "roles"), {"b": 2})}
    assert found["net.h0/Conv"].roles == {Role.FIRST}
    assert found["net.y/Conv"].roles == {Role.LAST, Role.POINTWISE}
    assert found["net.h2/Conv"].macs == 2 * 64 * 32 * 32 * 9
    assert found["net.a/Attention"].inputs == ("qh", "rh", "rh")
    path, _ = make(Int8(), keep=frozenset(Role))
    assert sum(node.op_type == "QuantizeLinear" for node in ir.load(path).graph) == 3 + 4  # attention has no role


def test_unsigned_activations_compute_the_same_and_run_in_integers(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    path, _ = make(Int8())
    model = ir.load(path)
    shift_activations(model)
    (tmp_path / "u8").mkdir()
    shifted = write_graph(model, tmp_path / "u8", "step.onnx")
    assert np.array_equal(run(path, inputs()), run(shifted, inputs()))
    assert _signed_quantisers(shifted) == {"keys", "values"}
    fused = run(shifted, inputs(), fused=True)
    assert np.allclose(fused, run(path, inputs()), atol=0.1)  # some numbers round to the other side: std is 2.2


def test_a_zero_point_of_its_own_halves_what_rounding_one_sided_numbers_adds(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    """Of the second convolution's inputs, which are a Relu's results."""
    (tmp_path / "wide").mkdir()
    exact = fed_to_the_second_convolution(network(tmp_path / "wide"), "h1", tmp_path / "wide" / "fed.onnx")
    errors = []
    for k, zero in enumerate((ZeroPoint.CENTRE, ZeroPoint.OWN)):
        path, _ = make(Int8(zero=zero), folder=f"q{k}", keep=frozenset({Role.FIRST}))
        model = ir.load(path)
        read = next(node for node in model.graph if node.name == "net.h2/Conv").inputs[0]
        rounded = fed_to_the_second_convolution(model, str(read.name), path.parent / "fed.onnx")
        assert np.all(rounded[exact == 0] == 0)  # so that padding with zeros stays what it is
        errors.append(float(np.abs(rounded - exact).max()))
    assert errors[1] < 0.52 * errors[0]


def fed_to_the_second_convolution(model: ir.Model, name: str, place: Path) -> np.ndarray:
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = [values[name]]
    ir.save(model, place)
    return run(place, inputs())


def test_a_zero_point_of_its_own_computes_the_same_unsigned(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    path, _ = make(Int8(zero=ZeroPoint.OWN))
    model = ir.load(path)
    shift_activations(model)
    (tmp_path / "u8").mkdir()
    shifted = write_graph(model, tmp_path / "u8", "step.onnx")
    assert np.array_equal(run(path, inputs()), run(shifted, inputs()))
    assert _signed_quantisers(shifted) == {"keys", "values"}
    quantisers = [n for n in ir.load(shifted).graph if n.op_type == "QuantizeLinear"]
    zeros = [n.inputs[2].const_value.numpy() for n in quantisers if n.outputs[0].dtype == ir.DataType.UINT8]
    assert {int(zero) for zero in zeros} - {128}


def _signed_quantisers(path: Path) -> set[str]:
    """Operands of attention whose quantisers are signed; all else must be unsigned."""
    found = set()
    for node in ir.load(path).graph:
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype != ir.DataType.UINT8:
            wide = next(reader for reader, _ in node.outputs[0].uses())
            product, place = next((reader, place) for reader, place in wide.outputs[0].uses())
            assert product.op_type == "MatMul"
            by_probability = "Softmax" in {n.op_type for n in _behind(product.inputs[0])}
            found.add({(0, False): "queries", (1, False): "keys", (1, True): "values"}[place, by_probability])
    return found


def _behind(value: ir.Value) -> list[ir.Node]:
    """The quantiser of an operand and what it rounds."""
    nodes = []
    for _ in range(3):
        nodes.append(value.producer())
        value = nodes[-1].inputs[0]
    return nodes


def test_attention_in_integers_keeps_queries_signed_where_the_library_fuses_it_so(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    path, _ = make(Int8(zero=ZeroPoint.OWN))
    model = ir.load(path)
    shift_activations(model, signed=(0, 1))
    (tmp_path / "u8").mkdir()
    shifted = write_graph(model, tmp_path / "u8", "step.onnx")
    assert np.array_equal(run(path, inputs()), run(shifted, inputs()))
    assert _signed_quantisers(shifted) == {"queries", "keys", "values"}  # probabilities have no middle at zero
    probability = next(n for n in ir.load(shifted).graph if n.op_type == "Softmax").outputs[0]
    quantiser = next(reader for reader, _ in probability.uses())
    assert int(quantiser.inputs[2].const_value.numpy()) == 0  # none of its numbers is wasted below zero


@given(st.floats(-300, 0, width=32), st.floats(0, 300, width=32))
def test_an_interval_is_represented_to_half_a_step_and_zero_exactly(low: float, high: float) -> None:
    scale, zero = affine(low, high)
    step = float(scale)
    assert -128 <= zero <= 127
    assert (-128 - zero) * step <= low + 0.51 * step
    assert (127 - zero) * step >= high - 0.51 * step
    assert step <= max((high - low) / 255 * 1.008, 2.0**-24) + 2.0**-24


def test_nvfp4_is_emulated_by_the_numbers_that_it_stands_for(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    path, _ = make(Float4())
    types = {value.dtype for value in ir.load(path).graph.initializers.values()}
    assert {ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN} <= types
    model = ir.load(path)
    restore_weights(model, [ir.DataType.FLOAT4E2M1])
    (tmp_path / "wide").mkdir()
    wide = write_graph(model, tmp_path / "wide", "step.onnx")
    assert 0.01 < error_of(wide, reference(tmp_path)) < 0.2


def test_restored_weights_are_what_onnx_runtime_dequantises(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    path, _ = make(WeightOnly(format=Format.INT4))
    model = ir.load(path)
    restore_weights(model, [ir.DataType.INT4])
    (tmp_path / "wide").mkdir()
    wide = write_graph(model, tmp_path / "wide", "step.onnx")
    assert not [node for node in ir.load(wide).graph if node.op_type == "DequantizeLinear"]
    assert np.allclose(run(wide, inputs()), run(path, inputs()), atol=1e-5)


def test_the_mean_of_rounding_is_taken_back_from_the_bias(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    path, _ = make(WeightOnly(format=Format.INT4))
    biases = {str(v.name): v.const_value.numpy() for v in ir.load(path).graph.initializers.values() if v.const_value}
    changed = [name for name in biases if name.endswith(".bias")]
    assert len(changed) == 4  # two convolutions, a product with an Add behind it, a Gemm
    assert all(np.abs(biases[name]).max() > 0 for name in changed)


def test_two_runs_give_the_same_bytes(make: Callable[..., tuple[Path, ir.Model]]) -> None:
    config = Int8(alphas=ALPHAS, rounding=Rounding.GPTQ)
    one, other = (make(config, folder=name)[0].parent for name in ("one", "other"))
    for name in ("step.onnx", "weights.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_it_errs_no_more_than_onnx_runtimes_own_quantiser_of_the_same_format(
    make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [inputs()]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    expected = reference(tmp_path)
    path, _ = make(Int8())
    theirs = tmp_path / "theirs.onnx"
    options: dict[str, Any] = {"ActivationSymmetric": True, "WeightSymmetric": True}
    quantize_static(
        tmp_path / "reference" / "step.onnx",
        theirs,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Conv", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options=options,
    )
    assert error_of(path, expected) < 1.05 * error_of(theirs, expected)


# ------------------------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_refused_by_name(make: Callable[..., tuple[Path, ir.Model]], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    known = observed(network(tmp_path / "plain"))
    path, _ = make(Int8())
    with pytest.raises(InvalidInput, match="quantised already"):
        quantize(ir.load(path), {}, known)
    with pytest.raises(InvalidInput, match="no layers"):
        quantize(network(tmp_path / "plain"), {"net.gone/MatMul": Int8()}, known)
    with pytest.raises(InvalidInput, match="is a attention"):
        quantize(network(tmp_path / "plain"), {"net.a/Attention": WeightOnly()}, known)
    without = Statistics(
        tensors=known.tensors, grams={}, timesteps=known.timesteps, evaluations=1, samples=1, digest=known.digest
    )
    with pytest.raises(InvalidInput, match="GPTQ"):
        quantize(network(tmp_path / "plain"), {"net.p/MatMul": Int8(rounding=Rounding.GPTQ)}, without)
    for bad in ({"block": 8}, {"format": Format.FP32}, {"alphas": (1.5,)}):
        with pytest.raises(InvalidInput, match="WeightOnly"):
            WeightOnly(**bad)
