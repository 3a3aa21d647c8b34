"""Quantised graphs as other tools make them: the peers of Lehr's recipes.

    python benchmarks/quantised_peers.py TOOL GRAPH.onnx INPUTS.npz OUTPUT [INPUTS.npz ...]

TOOL is one of ``ort-dynamic``, ``ort-static``, ``ort-weight-only`` (onnxruntime.quantization) and ``nncf`` (plain
``nncf.quantize``, transformer preset; OUTPUT is then an OpenVINO .xml). Each is used as its documentation shows, with
its defaults where they work; what had to be changed for the graph to be accepted is said where it is done. Calibration
data are all the INPUTS. Accuracy control and ModelOpt need more than a graph, and are called by quantisation.py.

A package that is not installed raises :class:`Missing`, which the benchmarks report as such. NNCF is in no extra of
Lehr: ``pip install nncf==3.4.0``, and run this with a Python that has it. ModelOpt pins older versions of onnx and ONNX
Runtime and runs in an environment of its own, whose python is named:
``python -m venv v && v/bin/pip install "nvidia-modelopt[onnx]==0.47.*" torch==2.13.0``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

MODELOPT = """
import sys
import numpy as np
import modelopt
from modelopt.onnx.quantization import quantize
source, calibration, target, mode = sys.argv[1:]
with np.load(calibration) as stored:
    data = {name: stored[name] for name in stored.files}
quantize(source, quantize_mode=mode, calibration_data=data, output_path=target, calibration_eps=["cpu"])
print(modelopt.__version__)
"""


class Missing(Exception):
    """A peer is not installed; the message says what to install."""


def loaded(path: Path) -> onnx.ModelProto:
    """The graph without recorded shapes: those that the exporter leaves make the quantisers' inference fail."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    return model


def read(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Calibration data, a file at a time."""
    for path in paths:
        with np.load(path) as stored:
            yield dict(stored)


# -------------------------------------------------------------------------------------------------- ONNX Runtime


def ort_dynamic(graph: Path, output: Path, _: Sequence[Path]) -> None:
    """8-bit weights, activations quantised while running."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(loaded(graph), output, weight_type=QuantType.QInt8, per_channel=True)


def ort_static(graph: Path, output: Path, inputs: Sequence[Path]) -> None:
    """8-bit weights and activations, Q/DQ around operators, min-max calibration.

    What is tried first is what its documentation says: its own pre-processing, and all operators that it knows. Of a
    step graph the pre-processing keeps small constants in a file that it then cannot read; so shapes are inferred by
    ONNX instead. A weight that only moves through a Reshape or Transpose, as dynamo writes some, it does not find; so
    it is given products alone.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._given = read(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._given, None)

    settings = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}

    def prepared(scratch: Path) -> Path:
        inline, ready = scratch / "inline.onnx", scratch / "ready.onnx"
        onnx.save(loaded(graph), inline)  # a model in memory it stores where it does not find the weights again
        quant_pre_process(inline, ready, skip_symbolic_shape=True)  # symbolic inference fails on dynamo's graphs
        return ready

    def inferred(_: Path) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(loaded(graph))

    failure: Exception | None = None
    for prepare in (prepared, inferred):
        for products in ({}, {"op_types_to_quantize": ["Conv", "MatMul", "Gemm"]}):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    model = prepare(Path(scratch))
                    quantize_static(model, output, Reader(), quant_format=QuantFormat.QDQ, **settings, **products)
                except Exception as e:  # noqa: BLE001 — whatever another tool raises; the first is what is reported
                    failure = failure or e
                else:
                    return
    raise RuntimeError(str(failure)) from failure


def ort_weight_only(graph: Path, output: Path, _: Sequence[Path]) -> None:
    """8-bit weights in blocks of 32, float32 activations."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(loaded(graph), bits=8, block_size=32, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(str(output), use_external_data_format=False)


# ---------------------------------------------------------------------------------------------------------- NNCF


def nncf(graph: Path, output: Path, inputs: Sequence[Path]) -> None:
    """NNCF's post-training quantisation of an OpenVINO model."""
    tool, ov = _nncf()
    given = list(read(inputs))
    model = ov.Core().read_model(graph)
    made = tool.quantize(model, tool.Dataset(given), model_type=tool.ModelType.TRANSFORMER, subset_size=len(given))
    ov.save_model(made, output, compress_to_fp16=False)


def nncf_accuracy_control(
    graph: Path,
    output: Path,
    inputs: Sequence[Path],
    *,
    transformer: bool,
    psnr: Callable[[Any], float],
    budget: float,
    exact: float,
) -> None:
    """``nncf.quantize_with_accuracy_control`` with the final samples' PSNR as accuracy.

    Args:
        graph: the step graph.
        output: the file to write, an OpenVINO .xml.
        inputs: calibration data.
        transformer: whether the model is one.
        psnr: of a compiled OpenVINO model, in dB, at most ``exact``.
        budget: the PSNR to keep.
        exact: what the unquantised model gets.
    """
    tool, ov = _nncf()

    def validate(compiled: Any, _: Any) -> tuple[float, None]:
        return psnr(compiled), None

    rows = list(read(inputs))
    model = tool.quantize_with_accuracy_control(
        ov.Core().read_model(graph),
        tool.Dataset(rows),
        tool.Dataset(rows[:1]),
        validate,
        max_drop=exact - budget,
        preset=tool.QuantizationPreset.MIXED,
        model_type=tool.ModelType.TRANSFORMER if transformer else None,
        subset_size=len(rows),
    )
    ov.save_model(model, output, compress_to_fp16=False)


def _nncf() -> tuple[Any, Any]:
    try:
        import nncf
        import openvino as ov
    except ModuleNotFoundError as e:
        raise Missing(f"{e.name} is not installed: pip install nncf==3.4.0 openvino") from e
    nncf.set_log_level(40)
    return nncf, ov


# ------------------------------------------------------------------------------------------------------ ModelOpt


def modelopt(graph: Path, output: Path, inputs: Sequence[Path], *, python: Path | None) -> None:
    """``modelopt.onnx.quantization.quantize`` to int8 with its defaults, in its own environment."""
    if python is None:
        raise Missing("no environment with nvidia-modelopt[onnx] was named (--modelopt)")
    source, calibration = output.with_name("modelopt-source.onnx"), output.with_name("modelopt.npz")
    onnx.save(onnx.shape_inference.infer_shapes(loaded(graph)), source)
    # It takes calibration data a row at a time, with a row of what samples share for each.
    rows = [{name: value[:1] for name, value in row.items()} for row in read(inputs)]
    np.savez(calibration, **{name: np.concatenate([row[name] for row in rows]) for name in rows[0]})  # type: ignore[arg-type]  # names are keywords to numpy
    words = [str(python), "-c", MODELOPT, str(source), str(calibration), str(output), "int8"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0 or not output.is_file():
        raise Missing(f"modelopt failed: {' '.join(done.stderr.strip().splitlines()[-1:]) or done.returncode}")


TOOLS = {"ort-dynamic": ort_dynamic, "ort-static": ort_static, "ort-weight-only": ort_weight_only, "nncf": nncf}


def main(tool: str, graph: str, output: str, *inputs: str) -> None:
    """Make one graph."""
    TOOLS[tool](Path(graph), Path(output), [Path(path) for path in inputs])


if __name__ == "__main__":
    main(*sys.argv[1:])
