"""A TensorRT engine with its shapes fixed: an execution context, and the memory that it reads and writes.

For :mod:`lehr.runtime.backends.tensorrt`. Lehr owns all memory: inputs, outputs, and the scratch memory that contexts
share, since they run one after the other.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.device import CaptureImpossible, DeviceArray, Stream
from lehr.runtime.errors import BundleError, RunFailed

Array = npt.NDArray[Any]

_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}


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
