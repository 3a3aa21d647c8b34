"""The GPU through cuda-python (https://nvidia.github.io/cuda-python), driver API only, so no CUDA toolkit is needed.

cuda-python calls its modules ``cuda.bindings.driver`` since 12.6.2 and ``cuda.cuda`` before. Kernels come as PTX, which
the driver compiles for whatever GPU it drives.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lehr.runtime.device import Argument, CaptureImpossible, Stream
from lehr.runtime.errors import IncompatibleEngine, MissingExtra, RunFailed

MODULES = ("cuda.bindings.driver", "cuda.cuda")
EXTRA = "trt"
KERNELS = Path(__file__).with_name("kernels") / "table.ptx"
THREADS = 256  # of a block; the kernels stride, so nothing depends on it
MAX_BLOCKS = 4096


def driver() -> ModuleType:
    """cuda-python's driver module; raises MissingExtra without it."""
    for name in MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise MissingExtra("cuda", EXTRA)


@cache
def stream() -> Stream:
    """The one stream of this process on the first GPU.

    Raises:
        MissingExtra: cuda-python is not installed.
        IncompatibleEngine: there is no NVIDIA GPU, no driver, or one that is too old.
    """
    return Stream(CudaDevice(driver()))


class CudaDevice:
    """:class:`lehr.runtime.device.Device` on one NVIDIA GPU, in its primary context, which engine libraries use too.

    One thread drives it: CUDA's current context belongs to the thread that made it.
    """

    def __init__(self, cuda: Any, ordinal: int = 0) -> None:
        self._cuda = cuda
        try:
            self._call("cuInit", 0)
            device = self._call("cuDeviceGet", ordinal)
            context = self._call("cuDevicePrimaryCtxRetain", device)
        except RuntimeError as e:  # cuda-python raises it where it finds no driver library
            raise IncompatibleEngine(f"there is no NVIDIA driver here ({e}). Install one, or use --target cpu.") from e
        except RunFailed as e:
            raise IncompatibleEngine(
                f"no NVIDIA GPU can be used here: {e} Look at nvidia-smi (Jetson: at the JetPack release). If the "
                "driver is older than cuda-python, update it or install the cuda-python of its CUDA release (pip "
                "install 'cuda-python<13' for CUDA 12); or use --target cpu."
            ) from e
        self._call("cuCtxSetCurrent", context)
        self.name = self._call("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
        module = self._call("cuModuleLoadData", KERNELS.read_bytes() + b"\0")
        self._module = module  # functions live as long as their module
        self._functions: dict[str, Any] = {}
        weakref.finalize(self, cuda.cuDevicePrimaryCtxRelease, device).atexit = False

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function's result; raises RunFailed with the driver's own words."""
        status, *result = getattr(self._cuda, name)(*arguments)
        if int(status):
            raise self._failure(name, status)
        return result[0] if result else None

    def _failure(self, name: str, status: Any) -> RunFailed:
        _, text = self._cuda.cuGetErrorString(status)
        words = text.decode() if isinstance(text, bytes) else str(status)
        kinds = self._cuda.CUresult
        if status == kinds.CUDA_ERROR_OUT_OF_MEMORY:
            _, free, total = self._cuda.cuMemGetInfo()
            return RunFailed(
                f"the GPU's memory is full ({free / 1e6:.0f} of {total / 1e6:.0f} MB free). Draw fewer samples at once "
                "(--batch), stop other programs, or build for smaller sizes."
            )
        return RunFailed(f"CUDA failed in {name}: {words}.")

    # ---------------------------------------------------------------------------------------------------- memory

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_host(self, size: int) -> int:
        return int(self._call("cuMemHostAlloc", size, 0))

    def free_host(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def upload(self, target: int, host: int, size: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", target, host, size, self._cuda.CUstream(stream))

    def download(self, host: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", host, source, size, self._cuda.CUstream(stream))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, size, self._cuda.CUstream(stream))

    # ---------------------------------------------------------------------------------------------------- work

    def launch(self, kernel: str, arguments: Sequence[Argument], threads: int, stream: int) -> None:
        if kernel not in self._functions:
            self._functions[kernel] = self._call("cuModuleGetFunction", self._module, kernel.encode())
        values = tuple(argument.value or 0 for argument in arguments)
        types = tuple(type(argument) for argument in arguments)
        blocks = min(MAX_BLOCKS, max(1, -(-threads // THREADS)))
        shape = (blocks, 1, 1, min(THREADS, threads), 1, 1)
        queue = self._cuda.CUstream(stream)
        self._call("cuLaunchKernel", self._functions[kernel], *shape, 0, queue, (values, types), 0)

    def create_stream(self) -> int:
        # Not blocking: the legacy stream of other libraries must not be waited for.
        return int(self._call("cuStreamCreate", int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", self._cuda.CUstream(stream))

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", self._cuda.CUstream(stream))

    def create_event(self) -> int:
        return int(self._call("cuEventCreate", int(self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", self._cuda.CUevent(event))

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", self._cuda.CUevent(event), self._cuda.CUstream(stream))

    def wait(self, event: int) -> None:
        self._call("cuEventSynchronize", self._cuda.CUevent(event))

    # ---------------------------------------------------------------------------------------------------- graphs

    def begin_capture(self, stream: int) -> None:
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._cuda.CUstream(stream), mode)

    def end_capture(self, stream: int) -> int:
        try:
            graph = self._call("cuStreamEndCapture", self._cuda.CUstream(stream))
        except RunFailed as e:
            raise CaptureImpossible(str(e)) from e
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", self._cuda.CUgraphExec(graph), self._cuda.CUstream(stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", self._cuda.CUgraphExec(graph))
