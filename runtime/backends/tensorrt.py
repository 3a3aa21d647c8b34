"""TensorRT 10.3 to 11 on an NVIDIA GPU (https://docs.nvidia.com/deeplearning/tensorrt), without PyTorch.

TensorRT-RTX has the same interface and shares this code (:mod:`lehr.runtime.backends.tensorrt_rtx`). Lehr owns all
memory: inputs, outputs, and the scratch memory that contexts share, since they run one after the other. Where TensorRT
says what went wrong it does so in its log alone, so the log is part of every message here.
"""

from __future__ import annotations

import importlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime import cuda
from lehr.runtime.backends.base import Session
from lehr.runtime.device import CaptureImpossible, DeviceArray, Stream
from lehr.runtime.errors import BundleError, IncompatibleEngine, LehrError, MissingExtra, RunFailed
from lehr.runtime.refit import refit
from lehr.runtime.spec import GraphSpec

Array = npt.NDArray[Any]

MAX_BOUND = 4  # shapes that a session keeps contexts and memory for
_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}

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


class Log:
    """What the library said since it was last asked."""

    def __init__(self, library: Any) -> None:
        lines: list[str] = []

        class Logger(library.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                library.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                    lines.append(" ".join(msg.split()))

        self.logger, self._lines = Logger(), lines

    def said(self) -> str:
        """Errors since the last call, in one line."""
        text = "; ".join(self._lines) or "no reason given"
        self._lines.clear()
        return text


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


class LoadedEngine:
    """What a session and its bindings share."""

    def __init__(self, library: Any, runtime: Any, engine: Any, stream: Stream, log: Log) -> None:
        self.library, self.engine, self.stream, self.log = library, engine, stream, log
        self._runtime = runtime  # engines need theirs alive
        names = [engine.get_tensor_name(k) for k in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = tuple(name for name in names if modes[name] == library.TensorIOMode.INPUT)
        self.outputs = tuple(name for name in names if modes[name] == library.TensorIOMode.OUTPUT)
        self.on_host = tuple(n for n in self.inputs if engine.get_tensor_location(n) == library.TensorLocation.HOST)
        # Queued work must be done before the engine goes; this runs before its attributes do.
        weakref.finalize(self, stream.synchronize).atexit = False

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of an input or output; raises BundleError for a type that no array here has."""
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise BundleError(f"the engine's {name!r} is {kind}, which Lehr hands to no engine. Build it again.")
        return np.dtype(_TYPES[kind])


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


class TensorRtBindings:
    """An execution context with fixed shapes, and the memory that it reads and writes."""

    def __init__(
        self, engine: LoadedEngine, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Array]
    ) -> None:
        self._engine, self._stream = engine, engine.stream
        self._shapes = {name: shapes[name] for name in engine.inputs if name in shapes}
        # Held: the library reads them when it is told to run.
        self._values = {name: np.ascontiguousarray(values[name], engine.dtype(name)) for name in engine.on_host}
        self.inputs: dict[str, DeviceArray] = {}
        self.outputs: dict[str, DeviceArray] = {}
        self.allocators: dict[str, Any] = {}
        self._owned: dict[str, DeviceArray] = {}
        self._taken: set[str] = set()
        self._context = self._created()
        self._check(self._context.set_optimization_profile_async(self._profile(), self._stream.handle), "the profile")
        for name, shape in self._shapes.items():
            self._check(self._context.set_input_shape(name, shape), f"shape {shape} of input {name!r}")
        for name, value in self._values.items():
            self._check(self._context.set_tensor_address(name, value.ctypes.data), f"input {name!r}")
        unknown = self._context.infer_shapes()
        if unknown:
            raise RunFailed(f"TensorRT failed: the shapes of {unknown} do not follow from its inputs.")
        for name in engine.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                self.allocators[name] = _output_allocator(engine, name)
                self._check(self._context.set_output_allocator(name, self.allocators[name]), f"output {name!r}")
            else:
                self._place(self.outputs, name, self._stream.empty(shape, engine.dtype(name)))
        self._scratch_size = int(self._context.update_device_memory_size_for_shapes())
        self._scratch = self._stream.workspace(self._scratch_size)
        self._context.set_device_memory(self._scratch.address, self._scratch.size)

    def _created(self) -> Any:
        """A context that brings no memory of its own, and compiles for its shapes before it runs."""
        library, engine = self._engine.library, self._engine.engine
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        specialised = getattr(library, "DynamicShapesKernelSpecializationStrategy", None)
        if specialised is None:
            context = engine.create_execution_context(strategy)
        else:
            # TensorRT-RTX compiles kernels beside the run by default, and would change them behind a captured graph.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = specialised.EAGER
            context = engine.create_execution_context(config)
        if context is None:
            raise RunFailed(f"TensorRT cannot prepare the engine: {self._engine.log.said()}.")
        return context

    def _profile(self) -> int:
        """The narrowest profile that holds these shapes; raises RunFailed with the ranges if none does."""
        engine = self._engine.engine
        fitting: list[tuple[int, int]] = []
        for index in range(engine.num_optimization_profiles):
            ranges = {name: self._range(name, index) for name in self._shapes}
            if all(_within(shape, ranges[name]) for name, shape in self._shapes.items()):
                fitting.append((sum(math.prod(r[1]) for r in ranges.values() if r is not None), index))
        if fitting:
            return min(fitting)[1]
        for name, shape in self._shapes.items():
            found = [self._range(name, index) for index in range(engine.num_optimization_profiles)]
            if not any(_within(shape, given) for given in found):
                allowed = " or ".join(f"{low} to {high}" for low, high in filter(None, found))
                raise RunFailed(
                    f"input {name!r} has shape {shape}, and the engine was built for {allowed}. Draw fewer samples at "
                    "once (--batch; guidance doubles it), or build again with larger --batch or --sizes."
                )
        raise RunFailed(
            f"the engine has no profile for inputs of shapes {self._shapes} together; each alone is within its ranges. "
            "Build again with --batch and --sizes that hold them all."
        )

    def _range(self, name: str, index: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        if name in self._engine.on_host:
            return None  # its values have a range; its shape has one value
        low, _, high = self._engine.engine.get_tensor_profile_shape(name, index)
        return tuple(low), tuple(high)

    # ------------------------------------------------------------------------------------------------ memory

    def own_inputs(self) -> None:
        """Give every input a place of its own."""
        for name in self._shapes:
            if name not in self._engine.on_host:
                self._place(self.inputs, name, self._own(name))

    def _own(self, name: str) -> DeviceArray:
        if name not in self._owned:
            self._owned[name] = self._stream.empty(self._shapes[name], self._engine.dtype(name))
        return self._owned[name]

    def feed(self, name: str, value: Array | DeviceArray) -> None:
        """Let an input be read from where it is in device memory, or copy it there."""
        if isinstance(value, DeviceArray):
            self._place(self.inputs, name, value)
        else:
            self._place(self.inputs, name, self._own(name))
            self._stream.upload(self.inputs[name], value)

    def renew_outputs(self) -> None:
        """Fresh memory for outputs that somebody has taken."""
        for name in self._taken - set(self.allocators):
            old = self.outputs[name]
            self._place(self.outputs, name, self._stream.empty(old.shape, old.dtype))
        self._taken.clear()

    def output(self, name: str) -> DeviceArray:
        """An output after it was queued; one whose shape follows from its values is waited for."""
        if name not in self.allocators:
            return self.outputs[name]
        self._stream.synchronize()
        array: DeviceArray = self.allocators[name].array
        return array

    def taken(self, name: str) -> DeviceArray:
        """The same, and the memory is the caller's."""
        array = self.output(name)
        self._taken.add(name)
        if name in self.allocators:
            self.allocators[name].memory = None
        return array

    def _place(self, places: dict[str, DeviceArray], name: str, array: DeviceArray) -> None:
        places[name] = array
        self._check(self._context.set_tensor_address(name, array.address), f"the place of {name!r}")

    # ------------------------------------------------------------------------------------------------ work

    def enqueue(self) -> None:
        """Queue one evaluation."""
        stream = self._stream.handle
        capturable = getattr(self._context, "is_stream_capturable", None)
        if self._stream.capturing and capturable is not None and not capturable(stream):
            raise CaptureImpossible("TensorRT-RTX says that this engine cannot be captured on its stream.")
        if not self._context.execute_async_v3(stream):
            said = f"TensorRT failed: {self._engine.log.said()}"
            raise CaptureImpossible(said) if self._stream.capturing else RunFailed(said)

    def _check(self, taken: bool, what: str) -> None:
        if not taken:
            raise RunFailed(f"TensorRT does not take {what}: {self._engine.log.said()}.")


def _within(shape: Sequence[int], given: tuple[Sequence[int], Sequence[int]] | None) -> bool:
    if given is None:
        return True
    low, high = given
    return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def _output_allocator(engine: LoadedEngine, output: str) -> Any:
    """An allocator for an output whose shape follows from values; TensorRT calls it while it runs."""
    library, stream = engine.library, engine.stream

    class OutputAllocator(library.IOutputAllocator):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.IOutputAllocator.__init__(self)
            self.memory: DeviceArray | None = None
            self._shape: tuple[int, ...] = ()

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            # Device memory starts at multiples of 256 bytes, more than any alignment asked for.
            if self.memory is None or self.memory.nbytes < size:
                self.memory = stream.empty((max(size, 1),), np.uint8)
            return self.memory.address

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, _: int) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Sequence[int]) -> None:
            self._shape = tuple(shape)

        @property
        def array(self) -> DeviceArray:
            if self.memory is None:
                raise RunFailed(f"TensorRT asked for no memory for output {output!r}.")
            whole = self.memory
            return DeviceArray(buffer=whole.buffer, offset=0, shape=self._shape, dtype=engine.dtype(output))

    return OutputAllocator()


BACKEND = TensorRtBackend("tensorrt", "TensorRT", None)
