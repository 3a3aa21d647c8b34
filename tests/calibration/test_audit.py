"""The range audit: what it measures is what the tensors are, and what it says of formats is what they do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from PIL import Image

from lehr.calibration.audit import audit
from lehr.calibration.heat_map import MAX_ROWS, draw
from lehr.calibration.keep_high import Finding, Kind, Short, findings, keep_high, recommended
from lehr.calibration.probe import PEAK, RMS, Probe, instrument
from lehr.calibration.ranges import BUCKETS, Ranges
from lehr.commands.audit import command
from lehr.commands.inspect import command as inspect
from lehr.engines.audit import AUDIT, audited
from lehr.engines.build import build
from lehr.engines.target import target
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.golden import read
from lehr.runtime.recipe import recipe
from lehr.runtime.verify import verify


def graph(text: str) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}')
    for node in model.graph:
        node.name = f"net/{node.outputs[0].name}"
    return ir.passes.common.ShapeInferencePass()(model).model


# ------------------------------------------------------------------------------------------------------- measuring

NETWORK = (
    "net (float[b, 3, 5, 8] x, int64[b] k) => (float[b, 3, 5, 8] y) <float two = {2}> "
    "{ q = Mul (x, two)  a = Attention (q, x, x)  s = Shape (a)  n = Neg (a)  y = Add (x, n) }"
)


def test_every_float_tensor_is_measured_as_it_is_and_the_logits_of_attention_with_it() -> None:
    model, probes = instrument(graph(NETWORK))
    names = [probe.tensor for probe in probes]
    inner = "net/a.scores"
    assert {"x", "q", "n", "y", inner} <= set(names)
    assert not {"s", "k"} & set(names)
    assert {probe.node for probe in probes if probe.tensor.startswith("net/a.")} == {"net/a"}
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 8)).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = dict(
        zip(
            [value.name for value in model.graph.outputs],
            session.run(None, {"x": x, "k": np.zeros(2, np.int64)}),
            strict=True,
        )
    )
    scores = 2 * x @ x.transpose(0, 1, 3, 2) / np.sqrt(8)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    n = -(shares / shares.sum(-1, keepdims=True)) @ x
    for name, tensor in {"x": x, "q": 2 * x, inner: scores, "n": n, "y": x + n}.items():
        row = names.index(name)
        assert np.isclose(outputs[PEAK][row], np.abs(tensor).max(), rtol=1e-5)
        assert np.isclose(outputs[RMS][row], np.sqrt((tensor.astype(np.float64) ** 2).mean()), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- judging


def ranges(values: dict[str, tuple[float, float]], *, weights: dict[str, float] | None = None) -> Ranges:
    """Ranges with two buckets, the given peak and rms in the second and a tenth of both in the first."""
    table = np.array([[(0.1 * peak, peak), (0.1 * rms, rms)] for peak, rms in values.values()], np.float32)
    return Ranges(
        probes=tuple(Probe(tensor=n, node="" if n in ("x", "t") else f"net/{n}", operator="") for n in values),
        timesteps=np.array([[999.0, 500.0], [499.0, 0.0]]),
        peak=table[:, 0],
        rms=table[:, 1],
        weights=weights or {},
        conditions="none",
        sampler="euler",
        evaluations=2,
        samples=1,
    )


CHAIN = graph(
    "g (float[2, 4] x, float[1, 4] t) => (float[2, 4] y) <float[4, 4] w = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> "
    "{ e = Sin (t)  h = Mul (x, e)  m = MatMul (h, w)  r = Add (x, m)  n = Neg (r)  r2 = Add (r, n)  "
    "o = MatMul (r2, w)  y = Neg (o) }"
)
FINE = dict.fromkeys(("x", "t", "e", "h", "m", "r", "n", "r2", "o", "y"), (1.0, 0.3))


def judged(values: dict[str, tuple[float, float]], **more: dict[str, float]) -> list[Finding]:
    return findings(CHAIN, ranges(FINE | values, **more), "x")


def test_an_unremarkable_model_fits_every_format() -> None:
    assert judged({}) == []


def test_an_overflow_is_found_where_it_is_written_and_where_it_is_read() -> None:
    found = judged({"h": (40_000.0, 20.0)})  # twice as much, for other prompts and seeds, exceeds 65504
    fp16 = [finding for finding in found if finding.format == "fp16"]
    assert {(finding.node, finding.kind) for finding in fp16} == {
        ("net/h", Kind.OVERFLOWS),
        ("net/m", Kind.OVERFLOWS),
    }
    assert {finding.timestep for finding in found} == {499.0}
    assert all(finding.value == 40_000 for finding in fp16)
    assert [f.node for f in found if f.format == "fp8" and f.kind is Kind.SATURATES] == ["net/h"]
    assert not [finding for finding in found if finding.format == "bf16"]
    assert recommended(found) == {"net": "bf16"}
    assert {"net/h", "net/m"} <= keep_high(CHAIN, found, "x", Short.FP16)
    assert not {"net/h", "net/m"} & keep_high(CHAIN, found, "x", Short.BF16)


def test_a_tensor_below_fp16s_normal_numbers_is_found() -> None:
    found = judged({"m": (1e-5, 1e-6)})
    assert ("net/m", "fp16", Kind.UNDERFLOWS) in {(f.node, f.format, f.kind) for f in found}


def test_an_angle_that_a_format_cannot_hold_is_found() -> None:
    assert {f.format for f in judged({"t": (5.0, 1.0)})} == {"bf16"}
    found = judged({"t": (999.0, 300.0)})
    assert {(f.node, f.format) for f in found if f.kind is Kind.LOSES_DIGITS} == {("net/e", "fp16"), ("net/e", "bf16")}
    assert recommended(found) == {"net": "fp32"}


def test_a_branch_that_vanishes_beside_its_skip_keeps_the_whole_stream_high() -> None:
    found = judged({"m": (1.0, 0.3 * 2**-9)})
    assert [(f.node, f.format, f.kind) for f in found] == [("net/r", "bf16", Kind.SKIP_DOMINATED)]
    assert np.isclose(found[0].value, 2**-9)
    assert {"net/r", "net/r2"} <= keep_high(CHAIN, found, "x", Short.BF16)
    assert not {"net/r", "net/r2"} & keep_high(CHAIN, found, "x", Short.FP16)
    found = judged({"m": (1.0, 0.3 * 2**-12)})
    assert {f.format for f in found} == {"bf16", "fp16"}


def test_a_branch_of_zeros_has_nothing_to_lose() -> None:
    assert judged({"m": (0.0, 0.0)}) == []


def test_a_weight_too_large_for_fp16_is_found() -> None:
    found = judged({}, weights={"w": 1e5})
    assert {(f.node, f.tensor, f.format) for f in found} == {("net/m", "w", "fp16"), ("net/o", "w", "fp16")}


def test_what_does_not_depend_on_the_sample_and_what_writes_the_prediction_stay_high() -> None:
    assert keep_high(CHAIN, [], "x", Short.FP16) == {"net/e", "net/o", "net/y"}


def test_ranges_of_another_graph_are_refused() -> None:
    with pytest.raises(BundleError, match="net/gone"):
        findings(CHAIN, ranges(FINE | {"gone": (1.0, 1.0)}), "x")


def test_the_picture_of_a_model_with_many_layers_stays_readable() -> None:
    base = ranges({f"block.{k}.part.{j}": (2.0**k, 1.0) for k in range(30) for j in range(10)})
    picture = draw(base, [], "many")
    assert picture.height < (MAX_ROWS + 20) * 20
    colours = picture.getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 30  # a colour a magnitude


# ------------------------------------------------------------------------------------------------- a whole bundle


@pytest.fixture(scope="module")
def audited_bundle(dit_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("audit") / "d.lehr"
    shutil.copytree(dit_bundle, bundle)
    result = CliRunner().invoke(command, [str(bundle), "--steps", "12", "--num", "2", "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["stored"]
    assert len(data["timesteps"]) == BUCKETS
    assert all(len(tensor["peak"]) == len(tensor["rms"]) == BUCKETS for tensor in data["tensors"])
    peaks = {tensor["tensor"]: max(tensor["peak"]) for tensor in data["tensors"]}
    assert 3 < peaks["sample"] < 6  # unit noise
    assert any(name.endswith(".scores") for name in peaks)
    return bundle


def test_an_audit_is_kept_in_the_bundle_with_its_picture(audited_bundle: Path) -> None:
    bundle = Bundle.open(audited_bundle)
    bundle.verify()
    arrays, record = bundle.read_arrays("calibration/ranges.npz"), bundle.read_json(AUDIT)
    assert arrays["peak"].shape == arrays["rms"].shape == (len(record["tensors"]), BUCKETS)
    assert np.all(arrays["rms"] <= arrays["peak"] * (1 + 1e-5))
    assert audited(bundle, "fp16") == set(record["keep_high"]["fp16"])
    told = json.loads(CliRunner().invoke(inspect, [str(audited_bundle), "--json"]).stdout)["audit"]
    assert (told["samples"], told["evaluations"], told["findings"]) == (2, 12, len(record["findings"]))
    with Image.open(bundle.path("calibration/ranges.png")) as picture:
        assert picture.width > 400


def test_recipe_fp16_is_as_accurate_as_eager_fp16(audited_bundle: Path) -> None:
    record = build(audited_bundle, target("cpu"), recipe("fp16"), threads=1)
    bundle = Bundle.open(audited_bundle)
    verdict = verify(bundle, record)
    assert verdict.passed, verdict
    # Over ten samples against eager's worst of two, so this asks for more than the floor.
    assert verdict.levels["L2"].measures["psnr_db"] >= read(bundle).floors["fp16"].psnr_db - 1
    assert 0 < record.achieved_precision["float16"] < 1  # ONNX Runtime's CPU kernels are float32 but for the casts
    assert AUDIT in record.sources


def test_recipe_fp16_without_an_audit_says_how_to_make_one(dit_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "d.lehr"
    shutil.copytree(dit_bundle, bundle)
    with pytest.raises(InvalidInput, match=r"lehr audit d\.lehr"):
        build(bundle, target("cpu"), recipe("fp16"))


def test_an_audit_of_other_weights_is_refused(audited_bundle: Path) -> None:
    bundle = Bundle.open(audited_bundle)
    record = bundle.read_json(AUDIT)
    record["sources"] = dict.fromkeys(record["sources"], "0" * 64)
    with bundle.edit() as edit:
        edit.add_json(AUDIT, record)
    with pytest.raises(InvalidInput, match="changed since the range audit"):
        audited(bundle, "fp16")


def test_a_target_narrows_what_is_reported(audited_bundle: Path) -> None:
    made = audit(Bundle.open(audited_bundle), target=target("cpu"), steps=2, num=1, threads=1)
    assert "fp8" not in {finding.format for finding in made.found}


def test_bad_usage_is_refused(audited_bundle: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(command, [str(audited_bundle), "--steps", "0"]).exit_code == 2
    refused = run(command, [str(audited_bundle), "-o", str(tmp_path / "a.jpg")])
    assert isinstance(refused.exception, InvalidInput)
    refused = run(command, [str(audited_bundle), "--target", "cpuu"])
    assert isinstance(refused.exception, InvalidInput)
