"""TensorRT 10.3 to 11 on an NVIDIA GPU (https://docs.nvidia.com/deeplearning/tensorrt), without PyTorch.

TensorRT-RTX has the same interface and shares this code (:mod:`lehr.runtime.backends.tensorrt_rtx`). Where TensorRT
says what went wrong it does so in its log alone, so the log is part of every message here.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime import cuda
from lehr.runtime.backends.base import Session
from lehr.runtime.device import DeviceArray
from lehr.runtime.errors import BundleError, IncompatibleEngine, LehrError, MissingExtra, RunFailed
from lehr.runtime.refit import refit
from lehr.runtime.spec import GraphSpec
from lehr.runtime.tensorrt_context import LoadedEngine, Log, TensorRtBindings

Array = npt.NDArray[Any]

MAX_BOUND = 4  # shapes that a session keeps contexts and memory for

# What TensorRT's log contains -> why a plan does not load. The first that fits counts.
_DAMAGED = ("magicTag", "empty memory buffer", "Corrupted", "checksum")
_NO_DRIVER = ("cudaError 35", "error code 35", "driver version is insufficient", "no CUDA-capable device", "error 100")
_OTHER_MACHINE = (
    "ersion tag",
    "ersionTag",
    "serialization version",
    "different TensorRT version",
    "incompatible device",
    "compute capability",
    "different platform",
    "expecting compute",
    "not compatible",
    "created on another",
)


class MissingLibrary(MissingExtra):
    """An engine library that no extra installs; the message says where it comes from."""

    def __init__(self, text: str) -> None:
        LehrError.__init__(self, text)


@cache
def _log(library: Any) -> Log:
    """One logger a process: the library keeps the first one that it is given."""
    return Log(library)


class TensorRtBackend:
    """One library of the family.

    Args:
        name: the library's name, which is its Python module.
        title: for people.
        extra: of Lehr, that installs it; None if no package does.
    """

    def __init__(self, name: str, title: str, extra: str | None) -> None:
        self.name, self.title, self._extra = name, title, extra

    def version(self) -> str:
        return str(self._library().__version__)

    def _library(self) -> Any:
        try:
            return importlib.import_module(self.name)
        except ModuleNotFoundError as e:
            if self._extra is not None:
                raise MissingExtra(self.name, self._extra) from e
            raise MissingLibrary(
                f"{self.title} is not installed and this needs it. On a Jetson it comes with JetPack; elsewhere "
                "install the release that the engine was built with (pip install tensorrt, or NVIDIA's archive)."
            ) from e
        except (ImportError, OSError) as e:
            raise MissingLibrary(f"{self.title} is installed but does not load: {e}. Install it again.") from e

    def load(self, plan: Path, options: Mapping[str, Any]) -> Session:
        """Load a plan onto the GPU.

        Raises:
            MissingExtra: TensorRT or cuda-python is not installed.
            IncompatibleEngine: no GPU or driver, or an engine of another GPU or release.
            BundleError: the plan is damaged, or its weights do not fit it.
            RunFailed: the GPU has too little memory.
        """
        library, stream = self._library(), cuda.stream()
        log = _log(library)
        log.said()
        runtime = library.Runtime(log.logger)
        if options.get("compatible") == "version":
            runtime.engine_host_code_allowed = True  # such a plan carries the runtime of its own release
        data = np.memmap(plan, dtype=np.uint8, mode="r") if plan.stat().st_size else b""
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._unloadable(plan, log.said())
        if "refit" in options:
            refit(library, engine, log, options["refit"], plan)
        if options.get("weights") == "streamed":
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return TensorRtSession(LoadedEngine(library, runtime, engine, stream, log))

    def _unloadable(self, plan: Path, said: str) -> LehrError:
        what = f"{self.title} cannot load {plan.name}: {said}"
        if any(mark in said for mark in _DAMAGED):
            return BundleError(f"{what} The plan is damaged or no plan at all. Build it again with lehr build.")
        if any(mark in said for mark in _NO_DRIVER):
            return IncompatibleEngine(
                f"{what} There is no NVIDIA driver here, or it is older than {self.title} needs. Update the driver, or "
                "build for what is here with lehr build."
            )
        if any(mark in said for mark in _OTHER_MACHINE):
            return IncompatibleEngine(
                f"{what} It is a plan of another GPU or release. Rebuild it here with lehr build."
            )
        if "memory" in said.lower():
            return RunFailed(
                f"{what} The GPU has too little memory for it: stop other programs, or build a smaller one."
            )
        return BundleError(f"{what} Build it again with lehr build.")


# ---------------------------------------------------------------------------------------------------------- sessions


class TensorRtSession:
    """An engine on the GPU; :class:`lehr.runtime.backends.base.DeviceSession`."""

    def __init__(self, engine: LoadedEngine) -> None:
        self._engine, self.stream = engine, engine.stream
        self._bound: OrderedDict[object, TensorRtBindings] = OrderedDict()

    def check_signature(self, graph: GraphSpec) -> None:
        """Hold the engine's inputs and outputs against the graph's; an input that nothing reads may be missing."""
        declared = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
        extra = sorted({*self._engine.inputs, *self._engine.outputs} - set(declared))
        missing = sorted({tensor.name for tensor in graph.outputs} - set(self._engine.outputs))
        wrong = [f"it has {extra}, which the graph has not"] if extra else []
        wrong += [f"it lacks {missing}"] if missing else []
        for name in (*self._engine.inputs, *self._engine.outputs):
            if name not in declared:
                continue
            tensor, shape = declared[name], tuple(self._engine.engine.get_tensor_shape(name))
            fixed = [size if isinstance(size, int) else -1 for size in tensor.shape]
            same = len(shape) == len(fixed) and all(
                -1 in pair or pair[0] == pair[1] for pair in zip(shape, fixed, strict=True)
            )
            dtype = self._engine.dtype(name)
            if dtype != tensor.dtype.numpy or not same:
                wrong.append(f"{name!r} is {dtype} {shape}, and {tensor.dtype.value} {tensor.shape} in the graph")
        if wrong:
            raise BundleError(f"the engine is not of this graph: {'; '.join(wrong)}. Build it again with lehr build.")

    # ------------------------------------------------------------------------------------------------ running

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Host arrays in, host arrays out; feeds may also be in device memory."""
        bound = self._fed(feeds)
        bound.enqueue()
        return {name: self.stream.download(bound.output(name)) for name in self._engine.outputs}

    def run_resident(self, feeds: Mapping[str, Array | DeviceArray]) -> dict[str, DeviceArray]:
        """Results in fresh device memory, which is the caller's."""
        bound = self._fed(feeds)
        bound.enqueue()
        return {name: bound.taken(name) for name in self._engine.outputs}

    def bind(self, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Array]) -> TensorRtBindings:
        """Fix all shapes; see :class:`lehr.runtime.backends.base.DeviceSession`."""
        bound = TensorRtBindings(self._engine, shapes, values)
        if bound.allocators:
            raise RunFailed(
                f"outputs {sorted(bound.allocators)} have no shape before the engine has run, so they have no place."
            )
        bound.own_inputs()
        return bound

    def _fed(self, feeds: Mapping[str, Array | DeviceArray]) -> TensorRtBindings:
        missing = sorted(set(self._engine.inputs) - set(feeds))
        if missing:
            raise RunFailed(f"TensorRT failed: inputs {missing} are not fed, got {sorted(feeds)}.")
        for name in self._engine.inputs:
            if feeds[name].dtype != self._engine.dtype(name):
                raise RunFailed(
                    f"TensorRT failed: input {name!r} is {feeds[name].dtype}, expected {self._engine.dtype(name)}."
                )
        shapes = {name: tuple(feeds[name].shape) for name in self._engine.inputs}
        values = {name: np.asarray(feeds[name]) for name in self._engine.on_host}
        key = (tuple(shapes.items()), tuple((name, value.tobytes()) for name, value in values.items()))
        if key not in self._bound:
            self._bound[key] = TensorRtBindings(self._engine, shapes, values)
            if len(self._bound) > MAX_BOUND:
                self.stream.synchronize()
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        bound = self._bound[key]
        for name in self._engine.inputs:
            if name not in self._engine.on_host:
                bound.feed(name, feeds[name])
        bound.renew_outputs()
        return bound


BACKEND = TensorRtBackend("tensorrt", "TensorRT", None)
