"""OpenVINO (https://docs.openvino.ai), on the CPU unless an engine says otherwise.

Two defaults of OpenVINO are never left to it. Its CPU plugin computes in bf16 wherever the processor can, also when a
compiled model is imported without saying otherwise, so the precision is given every time and read back. Its threads
are pinned to the first cores, where those of a second process would be pinned too, so pinning is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.backends.base import Session
from lehr.runtime.errors import BundleError, IncompatibleEngine, MissingExtra, RunFailed

try:
    import openvino as ov
except ModuleNotFoundError as e:
    raise MissingExtra("openvino", "openvino") from e

DEVICE = "CPU"
# What OpenVINO raises on purpose; both are plain Python exceptions.
FAILURES = (RuntimeError, TypeError)


def configuration(options: Mapping[str, Any]) -> dict[str, Any]:
    """OpenVINO's properties from the plain values kept in ``build.json``.

    Keys: ``precision`` (OpenVINO's name of an element type, such as "f32"), ``threads`` (0: one a core), and perhaps
    ``device`` (else the processor) and ``mode``: "latency", or "throughput", where the cores are shared out among
    several calls at the same time.
    """
    general = {
        "INFERENCE_PRECISION_HINT": str(options["precision"]),
        "EXECUTION_MODE_HINT": "ACCURACY",  # no dynamic quantisation
        "PERFORMANCE_HINT": str(options.get("mode", "latency")).upper(),
    }
    if device(options) != DEVICE:
        return general
    return {**general, "INFERENCE_NUM_THREADS": int(options["threads"]), "ENABLE_CPU_PINNING": False}


def device(options: Mapping[str, Any]) -> str:
    """OpenVINO's name of the device that an engine is for."""
    return str(options.get("device", DEVICE))


def check_device(name: str) -> None:
    """Raise IncompatibleEngine for a device that OpenVINO does not find here."""
    found = [str(one) for one in ov.Core().available_devices]
    if not any(one.partition(".")[0] == name for one in found):
        raise IncompatibleEngine(
            f"OpenVINO finds no {name} on this machine (devices: {', '.join(found) or 'none'}). Install its driver, or "
            "build for the processor: lehr build NAME.lehr --target cpu --library openvino"
        )


def precision(compiled: ov.CompiledModel) -> str:
    """The format that a compiled model says it computes in, such as "f32"."""
    return str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())


class OpenVinoSession:
    """A compiled model, with a request for each call that may run at the same time: one, unless made for throughput.

    Args:
        compiled: the model.
        blob: what it was imported from, if it was: OpenVINO reads weights from there and does not keep it alive.
    """

    def __init__(self, compiled: ov.CompiledModel, blob: ov.Tensor | None = None) -> None:
        throughput = "THROUGHPUT" in str(compiled.get_property("PERFORMANCE_HINT")).upper()
        number = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) if throughput else 1
        self._idle: SimpleQueue[ov.InferRequest] = SimpleQueue()
        for _ in range(number):
            self._idle.put(compiled.create_infer_request())
        self._inputs = {port.get_any_name(): port for port in compiled.inputs}
        # A result that the compiler merged with another tensor bears the names of both.
        self._outputs = {name: port for port in compiled.outputs for name in sorted(port.get_names())}
        self._blob = blob  # the last attribute, so the last to go

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        self._check(feeds)
        request = self._idle.get()
        try:
            results = request.infer(dict(feeds), share_inputs=True)
            return {name: np.asarray(results[port]) for name, port in self._outputs.items()}
        except FAILURES as e:
            raise RunFailed(f"OpenVINO failed: {e}") from e
        finally:
            self._idle.put(request)

    def _check(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """OpenVINO casts inputs of another type without a word, and ignores some names it does not know."""
        if set(feeds) != set(self._inputs):
            raise RunFailed(f"OpenVINO failed: inputs are {sorted(self._inputs)}, got {sorted(feeds)}.")
        for name, port in self._inputs.items():
            array, shape = feeds[name], port.get_partial_shape()
            if array.dtype != port.get_element_type().to_dtype():
                expected = port.get_element_type().to_dtype()
                raise RunFailed(f"OpenVINO failed: input {name!r} is {array.dtype}, expected {expected}.")
            if not shape.compatible(ov.PartialShape(list(array.shape))):
                raise RunFailed(f"OpenVINO failed: input {name!r} has shape {array.shape}, expected {shape}.")


class OpenVinoBackend:
    """OpenVINO as an engine library."""

    name = "openvino"

    def version(self) -> str:
        return str(ov.__version__).partition("-")[0]

    def load(self, plan: Path, options: Mapping[str, Any]) -> Session:
        """Load a compiled model from a mapped file, so its weights are not read twice."""
        if device(options) != DEVICE:
            check_device(device(options))
        try:
            blob = ov.Tensor(np.memmap(plan, dtype=np.uint8, mode="c"), shared_memory=True)
            compiled = ov.Core().import_model(blob, device(options), configuration(options))
            achieved = precision(compiled)
        except (*FAILURES, ValueError) as e:  # ValueError: an empty file
            raise BundleError(f"OpenVINO cannot load {plan.name}: {e} Build it again with lehr build.") from e
        if achieved != options["precision"]:
            raise BundleError(
                f"OpenVINO computes {plan.name} in {achieved}, not in {options['precision']} as it was built. "
                "Build it again with lehr build."
            )
        return OpenVinoSession(compiled, blob)


BACKEND = OpenVinoBackend()
