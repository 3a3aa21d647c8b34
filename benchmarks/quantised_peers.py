"""Quantised graphs as other tools make them, from what plain ``torch.onnx.export`` gives: the peers of Lehr's recipes.

    python benchmarks/quantised_peers.py TOOL GRAPH.onnx INPUTS.npz OUTPUT [INPUTS.npz ...]

TOOL is one of ``ort-dynamic``, ``ort-static``, ``ort-weight-only`` (onnxruntime.quantization) and ``nncf`` (plain
``nncf.quantize``, transformer preset; OUTPUT is then an OpenVINO .xml). Each is used as its documentation shows, with
its defaults where they work; what had to be changed for the graph to be accepted is said where it is done. Calibration
data are all the INPUTS. NNCF is in no extra of Lehr: run this with a Python that has it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx


def _loaded(path: Path) -> onnx.ModelProto:
    """The graph without recorded shapes: those that the exporter leaves make the quantisers' inference fail."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    return model


def _inputs(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with np.load(path) as stored:
            yield dict(stored)


def ort_dynamic(graph: Path, output: Path, _: Sequence[Path]) -> None:
    """8-bit weights, activations quantised while running."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_loaded(graph), output, weight_type=QuantType.QInt8, per_channel=True)


def ort_static(graph: Path, output: Path, inputs: Sequence[Path]) -> None:
    """8-bit weights and activations, Q/DQ around operators, min-max calibration."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._given = _inputs(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._given, None)

    with tempfile.TemporaryDirectory() as scratch:
        inline, ready = Path(scratch) / "inline.onnx", Path(scratch) / "ready.onnx"
        onnx.save(_loaded(graph), inline)  # a model in memory it stores where it does not find the weights again
        # Symbolic inference fails on dynamo's graphs; ONNX's own does not.
        quant_pre_process(inline, ready, skip_symbolic_shape=True)
        settings = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        try:
            quantize_static(ready, output, Reader(), quant_format=QuantFormat.QDQ, **settings)
        except ValueError:  # a weight that only moves through a Reshape or Transpose, as dynamo writes some
            products = ["Conv", "MatMul", "Gemm"]
            quantize_static(
                ready, output, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=products, **settings
            )


def ort_weight_only(graph: Path, output: Path, _: Sequence[Path]) -> None:
    """8-bit weights in blocks of 32, float32 activations."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(_loaded(graph), bits=8, block_size=32, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(str(output), use_external_data_format=False)


def nncf(graph: Path, output: Path, inputs: Sequence[Path]) -> None:
    """NNCF's post-training quantisation of an OpenVINO model."""
    import nncf as tool
    import openvino as ov

    given = list(_inputs(inputs))
    model = ov.Core().read_model(graph)
    made = tool.quantize(model, tool.Dataset(given), model_type=tool.ModelType.TRANSFORMER, subset_size=len(given))
    ov.save_model(made, output, compress_to_fp16=False)


TOOLS = {"ort-dynamic": ort_dynamic, "ort-static": ort_static, "ort-weight-only": ort_weight_only, "nncf": nncf}


def main(tool: str, graph: str, output: str, *inputs: str) -> None:
    """Make one graph."""
    TOOLS[tool](Path(graph), Path(output), [Path(path) for path in inputs])


if __name__ == "__main__":
    main(*sys.argv[1:])
