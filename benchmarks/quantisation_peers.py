"""Other people's quantisers, run on the step graph of a bundle with the inputs that ours are calibrated on.

Each peer is a function from a graph and feeds to a quantised file that ONNX Runtime (``.onnx``) or OpenVINO (``.xml``)
reads. A package that is not installed raises :class:`Missing`, which the benchmark reports as such.

ONNX Runtime's quantisers come with it. NNCF: ``pip install nncf==3.4.0``. ModelOpt pins older versions of onnx and
ONNX Runtime and runs in an environment of its own, whose python ``--modelopt`` names:
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


# ------------------------------------------------------------------------------------------------ ONNX Runtime


def prepared(graph: Path, folder: Path) -> Path:
    """A copy with weights inside and shapes inferred anew, which ONNX Runtime's quantisers need."""
    model = onnx.load(graph)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    target = folder / "prepared.onnx"
    onnx.save(model, target)
    return target


def ort_static(graph: Path, feeds: Sequence[Feeds], folder: Path) -> Path:
    """``quantize_static``: Q/DQ, a scale a channel of weights, u8 activations as its documents advise for x86-64."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(feeds)

        def get_next(self) -> Any:
            row = next(self._rows, None)
            return None if row is None else dict(row)

    target = folder / "ort-static.onnx"
    quantize_static(
        prepared(graph, folder),
        target,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return target


def ort_dynamic(graph: Path, folder: Path) -> Path:
    """``quantize_dynamic``: weights in 8 bits, activations quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / "ort-dynamic.onnx"
    quantize_dynamic(prepared(graph, folder), target, per_channel=True, weight_type=QuantType.QInt8)
    return target


# -------------------------------------------------------------------------------------------------------- NNCF


def nncf_plain(graph: Path, feeds: Sequence[Feeds], folder: Path, *, transformer: bool) -> Path:
    """``nncf.quantize`` on OpenVINO's model of the graph, with the preset its documents advise for the architecture."""
    nncf, ov = _nncf()
    model = nncf.quantize(
        ov.Core().read_model(graph),
        nncf.Dataset([dict(row) for row in feeds]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        subset_size=len(feeds),
    )
    target = folder / "nncf.xml"
    ov.save_model(model, target, compress_to_fp16=False)
    return target


def nncf_accuracy_control(
    graph: Path,
    feeds: Sequence[Feeds],
    folder: Path,
    *,
    transformer: bool,
    psnr: Callable[[Any], float],
    budget: float,
    exact: float,
) -> Path:
    """``nncf.quantize_with_accuracy_control`` with the final samples' PSNR as accuracy.

    Args:
        graph: the step graph.
        feeds: calibration data.
        folder: to write into.
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
    target = folder / "nncf-accuracy-control.xml"
    ov.save_model(model, target, compress_to_fp16=False)
    return target


def _nncf() -> tuple[Any, Any]:
    try:
        import nncf
        import openvino as ov
    except ModuleNotFoundError as e:
        raise Missing(f"{e.name} is not installed: pip install nncf==3.4.0 openvino") from e
    nncf.set_log_level(40)
    return nncf, ov


# ---------------------------------------------------------------------------------------------------- ModelOpt


def modelopt(graph: Path, feeds: Sequence[Feeds], folder: Path, *, python: Path | None) -> Path:
    """``modelopt.onnx.quantization.quantize`` to int8 with its defaults, in its own environment."""
    if python is None:
        raise Missing("no environment with nvidia-modelopt[onnx] was named (--modelopt)")
    source, calibration, target = prepared(graph, folder), folder / "modelopt.npz", folder / "modelopt.onnx"
    np.savez(calibration, **{name: np.concatenate([row[name] for row in feeds]) for name in _batched(feeds)})
    words = [str(python), "-c", MODELOPT, str(source), str(calibration), str(target), "int8"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0 or not target.is_file():
        raise Missing(f"modelopt failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return target


def _batched(feeds: Sequence[Feeds]) -> list[str]:
    return list(feeds[0])
