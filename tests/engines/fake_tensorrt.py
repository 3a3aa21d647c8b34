"""A TensorRT that builds nothing: it has just the names of one release, writes down every call, and fails on demand.

A test copies this file to ``tensorrt.py`` in a folder of its own, with ``release.json`` beside it: what the release is
called, its names (of ``tensorrt_api.json``) and how the build shall go.
"""

from __future__ import annotations

import enum
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_RELEASE = json.loads((_HERE / "release.json").read_text())
_CLASSES, _GOES = _RELEASE["classes"], _RELEASE["goes"]
__version__ = _RELEASE["version"]


def _note(*row: Any) -> None:
    with (_HERE / "calls.jsonl").open("a") as out:
        out.write(json.dumps([str(item) if isinstance(item, Path) else item for item in row]) + "\n")


class _Strict:
    """An object with only those attributes that the class of its name has in the release."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        kind = type(self).__name__
        if name not in _CLASSES.get(kind, ()) and not (kind.startswith("I") and name in _CLASSES["ILayer"]):
            raise AttributeError(f"{kind} has no {name} in {__version__}")
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self.__getattribute__(name) if hasattr(type(self), name) else _Strict._known(self, name)
            _note(type(self).__name__, name, value if isinstance(value, (int, str, bool)) else type(value).__name__)
        object.__setattr__(self, name, value)

    def _known(self, name: str) -> None:
        if name not in _CLASSES.get(type(self).__name__, ()):
            raise AttributeError(f"{type(self).__name__} has no {name} in {__version__}")


for _name, _members in _RELEASE["enums"].items():
    globals()[_name] = enum.IntEnum(_name, list(_members), start=0)


class ILogger:
    INTERNAL_ERROR, ERROR = 0, 1


class IProgressMonitor:
    pass


class ITensor(_Strict):
    def __init__(self, name: str) -> None:
        self._set("name", name)
        self._set("is_shape_tensor", name.endswith(".shape") or name == _GOES.get("shape_tensor"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class ILayer(_Strict):
    def __init__(self, name: str, kind: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "type", kind)


if "IAttention" in _CLASSES:

    class IAttention(_Strict):
        pass

    class IAttentionInputLayer(ILayer):
        @property
        def attention(self) -> IAttention:
            return IAttention()


class INetworkDefinition(_Strict):
    def __init__(self, flags: int) -> None:
        _note("Builder", "create_network", flags)
        kinds = globals()["LayerType"]
        self._inputs = [ITensor(name) for name in _GOES["inputs"]]
        self._layers = [ILayer("product", kinds.MATRIX_MULTIPLY)]
        if hasattr(kinds, "ATTENTION_INPUT"):
            self._layers.append(ILayer("attention", kinds.ATTENTION_INPUT))

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, k: int) -> ITensor:
        return self._inputs[k]

    def get_layer(self, k: int) -> ILayer:
        return self._layers[k]


class ParserError(_Strict):
    def node_name(self) -> str:
        return "blocks.0/odd"

    def node_operator(self) -> str:
        return "Odd"

    def desc(self) -> str:
        return "No importer registered for op: Odd"


class OnnxParser(_Strict):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network

    @property
    def num_errors(self) -> int:
        return 5 if _GOES["way"] == "parse" else 0

    def parse_from_file(self, path: str) -> bool:
        shutil.copy(path, _HERE / "parsed.onnx")
        return _GOES["way"] != "parse"

    def get_error(self, k: int) -> ParserError:
        return ParserError()


class IOptimizationProfile(_Strict):
    def set_shape(self, *row: Any) -> None:
        _note("IOptimizationProfile", "set_shape", *row)

    def set_shape_input(self, *row: Any) -> None:
        _note("IOptimizationProfile", "set_shape_input", *row)


class ITimingCache(_Strict):
    def __init__(self, known: bytes) -> None:
        self._known = known

    def serialize(self) -> bytes:
        return self._known + b"+timed"


class IBuilderConfig(_Strict):
    progress_monitor: Any = None
    num_compute_capabilities = 0
    builder_optimization_level = 3
    profiling_verbosity: Any = None
    hardware_compatibility_level: Any = None

    def set_flag(self, flag: Any) -> None:
        _note("IBuilderConfig", "set_flag", flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        _note("IBuilderConfig", "set_memory_pool_limit", pool.name, size)

    def create_timing_cache(self, known: bytes) -> ITimingCache | None:
        return ITimingCache(known) if not known.startswith(b"damaged") else None

    def set_timing_cache(self, timings: ITimingCache, ignore_mismatch: bool) -> bool:
        _note("IBuilderConfig", "set_timing_cache", timings._known.decode(), ignore_mismatch)
        self._timings = timings
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return getattr(self, "_timings", None)

    def clear_flag(self, flag: Any) -> None:
        _note("IBuilderConfig", "clear_flag", flag.name)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        return -1 if _GOES["way"] == "profile" else 0

    def set_compute_capability(self, capability: Any, k: int) -> None:
        _note("IBuilderConfig", "set_compute_capability", capability.name, k)


class Builder(_Strict):
    max_threads = 0

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        if _GOES["way"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if _GOES["way"] == "crash":
            os.write(1, b"the last words")
            os.kill(os.getpid(), signal.SIGABRT)
        if _GOES["way"] == "raise":
            raise ValueError("something nobody expected")
        if _GOES["way"] == "memory":
            self._logger.log(ILogger.ERROR, "[virtualMemoryBuffer.cpp] out of memory")
            return None
        if _GOES["way"] == "build":
            self._logger.log(
                ILogger.ERROR, "Cannot compile operation 'product_U117' for Turing: FP32 GEMM is not supported"
            )
            return None
        if _GOES["way"] == "bug" and b"GroupNormalization" in (_HERE / "parsed.onnx").read_bytes():
            self._logger.log(ILogger.ERROR, "MyelinCheckException: CHECK(valid) failed")
            return None
        if _GOES["way"] == "silence":
            return None
        return b"an engine"


class IExecutionContext(_Strict):
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        _note("IExecutionContext", "set_input_shape", name, shape)
        return True


class EngineInspector(_Strict):
    execution_context: Any = None

    def get_engine_information(self, form: Any) -> str:
        return json.dumps(_GOES["inspected"])


class ICudaEngine(_Strict):
    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext()


class Runtime(_Strict):
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        if _GOES["way"] == "driver":
            self._logger.log(ILogger.ERROR, "CUDA driver version is insufficient for CUDA runtime version")
            return None
        return ICudaEngine()
