"""Graphs cut by rate: labels, where the cut falls, and that the parts compute what the whole does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lehr.engines.graph import rates
from lehr.engines.graph.cost import flops
from lehr.engines.graph.split import split
from lehr.engines.graph.unroll import unroll
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import ExportFailed, InvalidInput, UnknownName
from lehr.runtime.hoisted import hoisted_denoiser
from lehr.runtime.paths import VP
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies
from lehr.runtime.whole_loop import LoopSettings, WholeLoop

SPEC = ModelSpec(
    name="toy",
    inputs=(
        TensorSpec(name="sample", shape=("batch", 4, "height", "height"), varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        TensorSpec(name="text", shape=("batch", "tokens", 8), varies=Varies.PROMPT),
    ),
    outputs=(TensorSpec(name="output", shape=("batch", 4, "height", "height"), varies=Varies.SAMPLE),),
    dims=(BATCH, Dim(name="height", default=256), Dim(name="tokens", default=5)),
    path=VP(),
    prediction=Prediction(kind=PredictionKind.EPSILON),
    num_classes=10,
)

# Modulation by time and class for two products, a summary of the text beside them, a table of positions, a mask that is
# larger than what it is made of, and a weight that is turned before use.
TEXT = """
<ir_version: 10, opset_import: ["": 23]>
toy (float[batch,4,height,height] sample, float[batch] timestep, int64[batch] class_labels, float[batch,tokens,8] text)
 => (float[batch,4,height,height] output)
<int64[1] i0 = {0}, int64[1] i1 = {1}, int64[2] i23 = {2, 3}, int64 n0 = {0}, int64 n1 = {1}>
{
  t = Unsqueeze(timestep, i1)
  angle = Mul(t, freqs)
  sines = Sin(angle)
  label = Gather(table, class_labels)
  emb = Add(sines, label)
  mod0 = MatMul(emb, m0)
  mod1 = MatMul(emb, m1)
  scale0 = Unsqueeze(mod0, i23)
  scale1 = Unsqueeze(mod1, i23)
  shape_h = Shape<start = 2, end = 3>(sample)
  rows = Squeeze(shape_h, i0)
  range = Range(n0, rows, n1)
  positions = Cast<to = 1>(range)
  waves = Cos(positions)
  hidden = Mul(sample, scale0)
  placed = Add(hidden, waves)
  turned = Transpose<perm = [1, 0]>(k_w)
  keys = MatMul(text, turned)
  summary = ReduceMean<keepdims = 0>(keys, i1)
  key = Unsqueeze(summary, i23)
  shape = Shape(sample)
  mask = Expand(key, shape)
  gated = Mul(placed, mask)
  output = Mul(gated, scale1)
}
"""


WEIGHTS = {"freqs": (1, 32), "table": (10, 32), "m0": (32, 4), "m1": (32, 4), "k_w": (4, 8)}


def toy(text: str = TEXT) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    for node in model.graph:
        if node.outputs[0].name in ("range", "positions", "waves"):  # the exporter knows this, shape inference does not
            node.outputs[0].shape = ir.Shape(["height"])
    return model


def run(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, Any]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def feeds(batch: int, height: int = 8, tokens: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, 4, height, height)).astype(np.float32),
        "timestep": np.full(batch, 10.0 + seed, np.float32),
        "class_labels": rng.integers(0, 10, batch),
        "text": rng.standard_normal((batch, tokens, 8)).astype(np.float32),
    }


def names(tensors: Any) -> list[str]:
    return [tensor.name for tensor in tensors]


# -------------------------------------------------------------------------------------------------- labels


def test_a_tensor_depends_on_what_its_operands_depend_on():
    graph = toy().graph
    labels = rates.label(graph, SPEC.inputs)
    found = {str(value.name): labels.rate(value).value for value in labels.depends}
    expected = {
        "turned": "constant",
        "keys": "prompt",
        "waves": "prompt",  # the height stays as it is during one loop
        "sines": "schedule",
        "scale0": "schedule",
        "mask": "prompt",
        "hidden": "step",
        "output": "step",
    }
    assert {name: found[name] for name in expected} == expected


def test_a_rate_is_explained_by_the_way_to_each_input():
    whole = {"step": (toy().graph, SPEC.inputs)}
    lines = rates.explain(whole, "scale0")
    assert lines[0] == "scale0: schedule, depends on prompt, timestep; it stands in the step graph"
    assert "  timestep: scale0 <- mod0 <- emb <- sines <- angle <- t <- timestep" in lines
    assert "  prompt: scale0 <- mod0 <- emb <- label <- class_labels" in lines
    assert rates.explain(whole, "turned")[0].startswith("turned: constant, depends on nothing")
    assert rates.explain(whole, "waves")[1].endswith("<- shape_h <- Shape(sample)")
    with pytest.raises(UnknownName, match="scale0"):
        rates.explain(whole, "scale")


def test_an_explanation_goes_on_in_the_graph_that_hands_a_tensor_over():
    parts = {name: (part.model.graph, part.spec.inputs) for name, part in split(toy(), SPEC).items()}
    lines = rates.explain(parts, "output")
    assert lines[0] == "output: step, depends on sizes, prompt, timestep, sample; it stands in the step graph"
    assert any("<- schedule.0 <- " in line and line.endswith("<- timestep") for line in lines)
    assert any(line.startswith("  prompt: ") and line.endswith(("<- text", "<- class_labels")) for line in lines)
    assert rates.explain(parts, "scale1")[0].endswith("it stands in the schedule graph")
    assert rates.explain(parts, "waves")[1].endswith("<- sample.shape")


def test_an_input_that_no_spec_describes_is_refused():
    with pytest.raises(ExportFailed, match="'text'"):
        rates.label(toy().graph, SPEC.inputs[:3])


# ---------------------------------------------------------------------------------------------------- cut


def test_the_step_graph_is_handed_the_small_tensors_and_keeps_no_weight_that_a_schedule_fixes():
    parts = split(toy(), SPEC)
    assert list(parts) == ["prompt", "schedule", "step"]
    assert not set(parts["step"].model.graph.initializers) & set(WEIGHTS)
    # The modulations are joined; the mask is made anew of the summary, which is smaller.
    assert names(parts["step"].spec.inputs) == ["sample", "key", "schedule.0", "waves"]
    assert parts["step"].spec.inputs[3].shape == ("height",)
    assert parts["step"].spec.inputs[2].shape == ("batch", 8, 1, 1)
    assert parts["step"].spec.inputs[2].varies is Varies.TIMESTEP
    assert names(parts["schedule"].spec.inputs) == ["timestep", "class_labels"]
    assert names(parts["prompt"].spec.inputs) == ["text", "sample.shape"]
    assert "Expand" in {node.op_type for node in parts["step"].model.graph}


def test_the_source_graph_is_left_alone():
    model = toy()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    split(model, SPEC)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_two_splits_give_the_same_bytes():
    def written() -> list[bytes]:
        return [ir.to_proto(part.model).SerializeToString(deterministic=True) for part in split(toy(), SPEC).values()]

    assert written() == written()


@pytest.mark.parametrize("batch,height,tokens", [(1, 8, 5), (3, 6, 2), (4, 10, 7)])
def test_the_parts_compute_what_the_whole_does(batch, height, tokens):
    model = toy()
    parts = split(model, SPEC)
    for part in parts.values():
        onnx.checker.check_model(ir.to_proto(part.model), full_check=True)
    signatures = {name: part.spec for name, part in parts.items()}

    class Session:
        def __init__(self, name: str) -> None:
            self.model = parts[name].model

        def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
            return run(self.model, given)

    denoiser = hoisted_denoiser(SPEC, signatures, Session)
    denoiser.prepare([10.0, 11.0, 12.0], (4, height, height), [])
    for seed in (0, 1, 0):
        given = feeds(batch, height, tokens, seed)
        whole = run(model, given)["output"]
        conditions = {name: given[name] for name in ("class_labels", "text")}
        np.testing.assert_allclose(denoiser(given["sample"], 10.0 + seed, conditions), whole, rtol=1e-6, atol=1e-6)


def test_a_result_whose_first_dimension_is_not_the_batch_is_made_in_the_step_graph():
    text = TEXT.replace(
        "key = Unsqueeze(summary, i23)",
        "aside = Transpose<perm = [1, 0]>(summary)\n  back = Transpose<perm = [1, 0]>(aside)\n"
        "  key = Unsqueeze(back, i23)",
    ).replace(
        "gated = Mul(placed, mask)",
        "widened = Unsqueeze(aside, i0)\n  total = ReduceSum(widened)\n"
        "  lifted = Mul(placed, total)\n  gated = Mul(lifted, mask)",
    )
    inputs = names(split(toy(text), SPEC)["step"].spec.inputs)
    assert "summary" in inputs
    assert not {"aside", "widened", "total"} & set(inputs)


def test_an_output_that_no_sample_enters_is_refused():
    text = TEXT.replace("gated = Mul(placed, mask)", "gated = Mul(mask, mask)")
    with pytest.raises(ExportFailed, match="does not depend on the sample"):
        split(toy(text), SPEC)


def test_what_a_nested_graph_reads_from_outside_counts():
    text = TEXT.replace(
        "output = Mul(gated, scale1)",
        "yes = Greater(n1, n0)\n"
        "  picked = If(yes) <then_branch = a () => (float[batch,4,1,1] x) { x = Identity(scale1) },"
        " else_branch = b () => (float[batch,4,1,1] y) { y = Identity(scale0) }>\n  output = Mul(gated, picked)",
    )
    model = toy(text)
    labels = rates.label(model.graph, SPEC.inputs)
    assert {value.name: labels.rate(value).value for value in labels.depends}["picked"] == "schedule"


# -------------------------------------------------------------------------------------------------- costs


def test_products_are_counted_exactly():
    graph = toy().graph
    counted = {node.outputs[0].name: flops(node, SPEC.default_sizes(batch=3)) for node in graph}
    assert counted["keys"] == 2 * 3 * 5 * 8 * 4
    assert counted["mod0"] == 2 * 3 * 32 * 4
    assert counted["turned"] == 0
    assert counted["hidden"] == 3 * 4 * 256 * 256


# ------------------------------------------------------------------------------------------ the loop written out


def drawn_step_by_step(model: ir.Model, request: Request) -> Any:
    return Pipeline(Denoiser(SPEC, lambda given: run(model, given)))(request)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun", "euler_ancestral"])
def test_a_loop_in_one_graph_draws_what_the_loop_draws(sampler, guidance_scale):
    model = toy()
    for value in model.graph.initializers.values():  # small, so that a loop of four steps stays small
        if value.name in WEIGHTS:
            value.const_value = ir.tensor(0.1 * value.const_value.numpy(), name=value.name)
    table = solver_table(sampler, SPEC.path, SPEC.prediction, 4)
    part = unroll(split(model, SPEC), SPEC, table, guidance_scale=guidance_scale)
    onnx.checker.check_model(ir.to_proto(part.model), full_check=True)
    settings = LoopSettings(
        sampler=sampler,
        num_inference_steps=4,
        evaluations=len(table),
        noises=table.num_noises,
        guidance_scale=guidance_scale,
    )

    class Session:
        def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
            assert set(given) == set(names(part.spec.inputs))
            return run(part.model, given)

    rng = np.random.default_rng(0)
    texts = rng.standard_normal((2, 3, 5, 8)).astype(np.float32)
    request = Request(
        num=3,
        batch=2,
        sampler=sampler,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        sizes={"height": 8},
        conditions={"class_labels": np.array([1, 2, 3]), "text": texts[0]},
        unconditional={"class_labels": np.array([9, 9, 9]), "text": texts[1]},
    )
    whole = WholeLoop(SPEC, Session(), settings)(request)
    np.testing.assert_allclose(whole, drawn_step_by_step(model, request), rtol=1e-4, atol=1e-5)


def test_a_whole_loop_refuses_what_it_was_not_made_for():
    settings = LoopSettings(sampler="ddim", num_inference_steps=4, evaluations=4, noises=0, guidance_scale=1.0)
    loop = WholeLoop(SPEC, None, settings)
    for request in (
        Request(num_inference_steps=5),
        Request(sampler="euler"),
        Request(guidance_scale=2.0),
        Request(eta=0.5),
        Request(init=np.zeros((4, 8, 8), np.float32)),
    ):
        with pytest.raises(InvalidInput, match="whole-loop graph"):
            loop(request)


def test_a_loop_that_cannot_be_one_graph_is_refused():
    parts = split(toy(), SPEC)
    with pytest.raises(InvalidInput, match="at most 16"):
        unroll(parts, SPEC, solver_table("ddim", SPEC.path, SPEC.prediction, 17))
    table = solver_table("ddim", SPEC.path, SPEC.prediction, 4)
    none = Placeholder(table)
    with pytest.raises(InvalidInput, match="no recurrence"):
        unroll(parts, SPEC, none)


class Placeholder:
    """A table without a recurrence."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def __len__(self) -> int:
        return len(self._table)

    def recurrence(self) -> None:
        return None
