"""ONNX Runtime on the CPU (https://onnxruntime.ai)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lehr.runtime.backends.base import Session
from lehr.runtime.errors import BundleError, MissingExtra, RunFailed

try:
    import onnxruntime as ort
except ModuleNotFoundError as e:
    raise MissingExtra("onnxruntime", "cpu") from e

PROVIDER = "CPUExecutionProvider"
# Everything ONNX Runtime raises on purpose; they share no public base class.
FAILURES = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NoSuchFile,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
)


def session_options(options: Mapping[str, Any]) -> ort.SessionOptions:
    """ONNX Runtime's options from the plain values kept in ``build.json``.

    Keys: ``intra_op_threads`` (0: one a core), ``spinning`` (worker threads poll between operators: a few per cent
    faster alone, up to 2 x slower for whatever else runs on the same cores), and perhaps ``prepacking`` (weights are
    copied into the layout of the kernels when the graph is loaded; True if it is not given).
    """
    made = ort.SessionOptions()
    made.log_severity_level = 3
    made.intra_op_num_threads = int(options["intra_op_threads"])
    made.inter_op_num_threads = 1
    made.add_session_config_entry("session.intra_op.allow_spinning", "1" if options["spinning"] else "0")
    made.add_session_config_entry("session.disable_prepacking", "0" if options.get("prepacking", True) else "1")
    return made


class OnnxRuntimeSession:
    """A graph loaded into ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
        except (*FAILURES, ValueError) as e:  # ValueError: an input is missing
            raise RunFailed(f"ONNX Runtime failed: {e}") from e


class OnnxRuntimeBackend:
    """ONNX Runtime as an engine library."""

    name = "onnxruntime"

    def version(self) -> str:
        return str(ort.__version__)

    def load(self, plan: Path, options: Mapping[str, Any]) -> Session:
        """Load a graph that was optimised at build, so nothing is optimised again here."""
        made = session_options(options)
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return OnnxRuntimeSession(ort.InferenceSession(plan, made, providers=[PROVIDER]))
        except FAILURES as e:
            raise BundleError(f"ONNX Runtime cannot load {plan.name}: {e} Build it again with lehr build.") from e


BACKEND = OnnxRuntimeBackend()
