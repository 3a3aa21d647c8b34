"""Peers of the budget search and of int8 recipes that need more than a graph: accuracy control, and ModelOpt.

The plain quantisers of ONNX Runtime and NNCF stand in quantised_peers.py. A package that is not installed raises
:class:`Missing`, which the benchmark reports as such. NNCF: ``pip install nncf==3.4.0``. ModelOpt pins older versions
of onnx and ONNX Runtime and runs in an environment of its own, whose python ``--modelopt`` names:
``python -m venv v && v/bin/pip install "nvidia-modelopt[onnx]==0.47.*" torch==2.13.0``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

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


def ort_static(graph: Path, feeds: Sequence[Feeds], output: Path) -> None:
    """``quantize_static``: Q/DQ, u8 activations, weights a scale a channel, min-max calibration.

    Shapes are inferred by ONNX; ONNX Runtime's own pre-processing keeps small constants of a cut graph in a file beside
    it, and then cannot read them.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._given = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self._given, None)
            return None if row is None else dict(row)

    model = onnx.load(graph)
    del model.graph.value_info[:]
    quantize_static(
        onnx.shape_inference.infer_shapes(model),
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


# -------------------------------------------------------------------------------------------------------- NNCF


def nncf_accuracy_control(
    graph: Path,
    feeds: Sequence[Feeds],
    output: Path,
    *,
    transformer: bool,
    psnr: Callable[[Any], float],
    budget: float,
    exact: float,
) -> None:
    """``nncf.quantize_with_accuracy_control`` with the final samples' PSNR as accuracy.

    Args:
        graph: the step graph.
        feeds: calibration data.
        output: the file to write, an OpenVINO .xml.
        transformer: whether the model is one.
        psnr: of a compiled OpenVINO model, in dB, at most ``exact``.
        budget: the PSNR to keep.
        exact: what the unquantised model gets.
    """
    nncf, ov = _nncf()

    def validate(compiled: Any, _: Any) -> tuple[float, None]:
        return psnr(compiled), None

    rows = [dict(row) for row in feeds]
    model = nncf.quantize_with_accuracy_control(
        ov.Core().read_model(graph),
        nncf.Dataset(rows),
        nncf.Dataset(rows[:1]),
        validate,
        max_drop=exact - budget,
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
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


# ---------------------------------------------------------------------------------------------------- ModelOpt


def modelopt(graph: Path, feeds: Sequence[Feeds], output: Path, *, python: Path | None) -> None:
    """``modelopt.onnx.quantization.quantize`` to int8 with its defaults, in its own environment."""
    if python is None:
        raise Missing("no environment with nvidia-modelopt[onnx] was named (--modelopt)")
    model = onnx.load(graph)
    del model.graph.value_info[:]
    source, calibration = output.with_name("modelopt-source.onnx"), output.with_name("modelopt.npz")
    onnx.save(onnx.shape_inference.infer_shapes(model), source)
    # It takes calibration data a row at a time, with a row of what samples share for each.
    rows = [{name: value[:1] for name, value in row.items()} for row in feeds]
    np.savez(calibration, **{name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    words = [str(python), "-c", MODELOPT, str(source), str(calibration), str(output), "int8"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0 or not output.is_file():
        raise Missing(f"modelopt failed: {' '.join(done.stderr.strip().splitlines()[-1:]) or done.returncode}")
