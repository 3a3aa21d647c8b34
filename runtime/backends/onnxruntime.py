"""ONNX Runtime (https://onnxruntime.ai), on the CPU unless an engine names another execution provider.

ONNX Runtime falls back to the CPU without a word where a provider does not load, so what a session really has is looked
at, and a provider that is missing is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lehr.runtime.backends.base import Session
from lehr.runtime.errors import BundleError, IncompatibleEngine, MissingExtra, RunFailed
from lehr.runtime.lora_engine import OVERLAY

try:
    import onnxruntime as ort
except ModuleNotFoundError as e:
    raise MissingExtra("onnxruntime", "cpu") from e

PROVIDER = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
_BFLOAT16 = 16  # ONNX's number of the element type
_LIBRARIES = {CUDA: "CUDA and cuDNN", TENSORRT: "TensorRT, CUDA and cuDNN"}
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

    Keys: ``intra_op_threads`` (0: one a core), ``spinning`` (worker threads poll between operators, to the end of the
    call and not beyond: faster alone, slower for whatever else runs on the same cores), and perhaps ``prepacking``
    (weights are copied into the layout of the kernels when the graph is loaded; True if it is not given). Where the
    graph was seen to need no operator of the CPU, ``cpu_fallback`` is False, and a session that would use one does not
    open.
    """
    made = ort.SessionOptions()
    made.log_severity_level = 3
    made.intra_op_num_threads = int(options["intra_op_threads"])
    made.inter_op_num_threads = 1
    made.add_session_config_entry("session.intra_op.allow_spinning", "1" if options["spinning"] else "0")
    made.add_session_config_entry("session.force_spinning_stop", "1" if options["spinning"] else "0")
    made.add_session_config_entry("session.disable_prepacking", "0" if options.get("prepacking", True) else "1")
    if not options.get("cpu_fallback", True):
        made.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return made


def check_provider(provider: str) -> None:
    """Raise MissingExtra where this ONNX Runtime was made without an execution provider."""
    if provider not in ort.get_available_providers():
        raise MissingExtra(f"onnxruntime with {provider}", "ort-cuda")


def open_session(
    graph: Path | bytes,
    made: ort.SessionOptions,
    options: Mapping[str, Any],
    disabled_optimizers: Sequence[str] = (),
) -> ort.InferenceSession:
    """A session on the provider that ``options`` name under ``provider``, the CPU's behind it for shapes.

    Raises:
        MissingExtra: this ONNX Runtime was made without the provider.
        IncompatibleEngine: the provider does not load here, for want of a GPU, a driver or CUDA's libraries.
    """
    provider = str(options.get("provider", PROVIDER))
    if provider == PROVIDER:
        return ort.InferenceSession(graph, made, providers=[PROVIDER], disabled_optimizers=list(disabled_optimizers))
    check_provider(provider)
    settings = dict(options.get("provider_options", {}))
    # ONNX Runtime takes naming the processor and forbidding it at the same time for a contradiction.
    others = [PROVIDER] if options.get("cpu_fallback", True) else []
    session = ort.InferenceSession(
        graph,
        made,
        providers=[(provider, settings), *others],
        disabled_optimizers=list(disabled_optimizers),
        enable_fallback=0,  # by default what fails is printed and tried again on other providers
    )
    if provider not in session.get_providers():
        raise IncompatibleEngine(
            f"ONNX Runtime's {provider} does not load here, and it would compute on the processor without a word. "
            f"It needs an NVIDIA GPU with a driver, and the {_LIBRARIES[provider]} libraries of its version. "
            "lehr doctor says what is here."
        )
    return session


class OnnxRuntimeSession:
    """A graph loaded into ONNX Runtime; ``kept`` are values that it reads and does not own."""

    def __init__(self, session: ort.InferenceSession, kept: tuple[ort.OrtValue, ...] = ()) -> None:
        self._session, self._kept = session, kept
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
        overlay = {name: _value(kind, values) for name, (kind, values) in options.get(OVERLAY, {}).items()}
        for name, value in overlay.items():
            made.add_initializer(name, value)
        try:
            return OnnxRuntimeSession(open_session(plan, made, options), tuple(overlay.values()))
        except FAILURES as e:
            raise BundleError(f"ONNX Runtime cannot load {plan.name}: {e} Build it again with lehr build.") from e


def _value(kind: str, values: npt.NDArray[Any]) -> ort.OrtValue:
    if kind == "bfloat16":  # numpy has no such type: the bits, and what they are
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(values)


BACKEND = OnnxRuntimeBackend()
