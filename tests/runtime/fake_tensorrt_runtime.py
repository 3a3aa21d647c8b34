"""A TensorRT that runs numpy functions on the fake device; it has just the names of one release.

A plan is the text ``plan NAME``, NAME being that of an engine given to :func:`library`.
"""

from __future__ import annotations

import ctypes
import enum
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_device import FakeDevice, Misuse

RELEASES = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())["releases"]
KINDS = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32", "bool": "BOOL", "bfloat16": "BF16"}
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NumpyEngine:
    """Inputs and outputs are (dtype, shape) with -1 for what may vary; ``profiles`` give (min, opt, max) by input."""

    inputs: Mapping[str, tuple[str, Shape]]
    outputs: Mapping[str, tuple[str, Shape]]
    function: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    profiles: Sequence[Mapping[str, tuple[Shape, Shape, Shape]]] = ()
    on_host: frozenset[str] = frozenset()
    unknown_shapes: frozenset[str] = frozenset()
    capturable: bool = True
    fails: str = ""
    scratch: int = 1 << 12
    weights: Mapping[str, int] = field(default_factory=dict)  # of a stripped plan: name -> count
    taken: dict[str, np.ndarray] = field(default_factory=dict)


def library(release: str, device: FakeDevice, engines: Mapping[str, NumpyEngine]) -> Any:
    """The module of a release."""
    api = RELEASES[release]
    kinds = {name: enum.IntEnum(name, members, start=0) for name, members in api["enums"].items()}
    log: list[Any] = []  # the logger in use
    strategy = kinds["ExecutionContextAllocationStrategy"].USER_MANAGED

    class Strict:
        """An object with only those attributes that its class has in the release."""

        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_") and name not in api["classes"].get(type(self).__name__, ()):
                raise AttributeError(f"{type(self).__name__} has no {name} in {release}")
            return object.__getattribute__(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_") and name not in api["classes"].get(type(self).__name__, ()):
                raise AttributeError(f"{type(self).__name__} has no {name} in {release}")
            object.__setattr__(self, name, value)

    class ILogger:
        INTERNAL_ERROR, ERROR = 0, 1

        def log(self, severity: int, msg: str) -> None: ...

    class IOutputAllocator:
        pass

    class Runtime(Strict):
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            log[:] = [logger]

        def deserialize_cuda_engine(self, data: Any) -> Any:
            text = bytes(data).decode()
            if not text.startswith("plan "):
                log[0].log(ILogger.ERROR, text or "Cannot deserialize with an empty memory buffer.")
                return None
            return ICudaEngine(text.removeprefix("plan "))

    class IRuntimeConfig(Strict):
        dynamic_shapes_kernel_specialization_strategy = None

        def set_execution_context_allocation_strategy(self, chosen: Any) -> None:
            self._strategy = chosen

    class ICudaEngine(Strict):
        weight_streaming_budget_v2 = 0

        def __init__(self, name: str) -> None:
            self._made = engines[name]

        @property
        def num_io_tensors(self) -> int:
            return len(self._made.inputs) + len(self._made.outputs)

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._made.profiles) or 1

        def _all(self) -> dict[str, tuple[str, Shape]]:
            return {**self._made.inputs, **self._made.outputs}

        def get_tensor_name(self, k: int) -> str:
            return list(self._all())[k]

        def get_tensor_mode(self, name: str) -> Any:
            modes = kinds["TensorIOMode"]
            return modes.INPUT if name in self._made.inputs else modes.OUTPUT

        def get_tensor_location(self, name: str) -> Any:
            return kinds["TensorLocation"].HOST if name in self._made.on_host else None

        def get_tensor_dtype(self, name: str) -> Any:
            return kinds["DataType"][KINDS[self._all()[name][0]]]

        def get_tensor_shape(self, name: str) -> list[int]:
            return list(self._all()[name][1])

        def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
            shape = self._made.inputs[name][1]
            wide = [1 if k < 0 else k for k in shape], list(shape), [99 if k < 0 else k for k in shape]
            given = self._made.profiles[index][name] if self._made.profiles else wide
            return [list(row) for row in given]

        def get_weight_streaming_automatic_budget(self) -> int:
            return 12345

        def create_runtime_config(self) -> IRuntimeConfig:
            return IRuntimeConfig()

        def create_execution_context(self, how: Any) -> Any:
            if isinstance(how, IRuntimeConfig):
                assert how.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
                how = how._strategy
            assert how == strategy
            return IExecutionContext(self)

    class IExecutionContext(Strict):
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine, self._made = engine, engine._made
            self._shapes: dict[str, Shape] = {}
            self._at: dict[str, int] = {}
            self._allocators: dict[str, Any] = {}
            self._scratch: tuple[int, int] | None = None
            self._profile: int | None = None

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self._profile = index
            return stream in device.queues

        def set_input_shape(self, name: str, shape: Shape) -> bool:
            low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
            self._shapes[name] = tuple(shape)
            return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._at[name] = address
            return name in self._engine._all()

        def set_output_allocator(self, name: str, allocator: Any) -> bool:
            self._allocators[name] = allocator
            return True

        def infer_shapes(self) -> list[str]:
            return sorted(set(self._made.inputs) - set(self._shapes))

        def get_tensor_shape(self, name: str) -> Shape:
            if name in self._made.unknown_shapes:
                return (-1,)
            return self._function(zeros=True)[name].shape

        def update_device_memory_size_for_shapes(self) -> int:
            return self._made.scratch * self._shapes[next(iter(self._shapes))][0]

        def set_device_memory(self, address: int, size: int) -> None:
            assert size >= self.update_device_memory_size_for_shapes()
            self._scratch = address, size

        def is_stream_capturable(self, stream: int) -> bool:
            return self._made.capturable

        def _function(self, *, zeros: bool = False) -> Mapping[str, np.ndarray]:
            feeds = {}
            for name, (kind, _) in self._made.inputs.items():
                shape = self._shapes[name]
                count = int(np.prod(shape))
                if name in self._made.on_host:
                    size = count * np.dtype(kind).itemsize
                    feeds[name] = np.frombuffer(ctypes.string_at(self._at[name], size), kind).reshape(shape)
                elif zeros:
                    feeds[name] = np.zeros(shape, kind)
                else:
                    feeds[name] = device.view(self._at[name], count, kind, writes=False).reshape(shape).copy()
            return self._made.function(feeds)

        def execute_async_v3(self, stream: int) -> bool:
            if self._made.fails:
                log[0].log(ILogger.ERROR, self._made.fails)
                return False
            if self._scratch is None:
                raise Misuse("an engine runs without scratch memory")
            at, scratch = dict(self._at), self._scratch
            if missing := set(self._engine._all()) - set(at) - set(self._allocators):
                raise Misuse(f"an engine runs and {missing} have no address")

            alive = weakref.ref(self)

            def operation() -> None:
                context = alive()
                if context is None:
                    raise Misuse("an engine is gone while its work is queued")
                kept, context._at = context._at, at
                made = context._function()
                context._at = kept
                device.view(scratch[0], scratch[1], np.uint8, writes=True)[:] = 0xCD
                for name, value in made.items():
                    kind = context._made.outputs[name][0]
                    address = at.get(name)
                    if name in context._allocators:
                        allocator = context._allocators[name]
                        address = allocator.reallocate_output_async(name, 0, value.nbytes, 256, stream)
                        allocator.notify_shape(name, list(value.shape))
                    device.view(address, value.size, kind, writes=True)[:] = value.astype(kind).reshape(-1)

            device.queue(stream, operation)
            return True

    class Weights:
        def __init__(self, kind: Any, address: int, count: int) -> None:
            size = 4 if kind.name == "FLOAT" else 2
            self.kind, self.data, self.count = kind.name, ctypes.string_at(address, size * count), count

    class Refitter(Strict):
        def __init__(self, engine: ICudaEngine, logger: Any) -> None:
            self._made = engine._made

        def get_all_weights(self) -> list[str]:
            return list(self._made.weights)

        def set_named_weights(self, name: str, weights: Weights) -> bool:
            if weights.count != self._made.weights[name]:
                log[0].log(ILogger.ERROR, "count mismatch")
                return False
            self._made.taken[name] = np.frombuffer(weights.data, np.float32 if weights.kind == "FLOAT" else np.uint16)
            return True

        def get_missing_weights(self) -> list[str]:
            return sorted(set(self._made.weights) - set(self._made.taken))

        def refit_cuda_engine(self) -> bool:
            return not self.get_missing_weights()

    found = {"ILogger": ILogger, "IOutputAllocator": IOutputAllocator, "Runtime": Runtime, "Refitter": Refitter}
    return SimpleNamespace(__version__=release.split()[1], Weights=Weights, **found, **kinds)
