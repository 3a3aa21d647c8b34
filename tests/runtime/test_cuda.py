"""The device over cuda-python calls the driver as each release takes it, and says what the driver says."""

from __future__ import annotations

import ctypes
import enum
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_device import FakeDevice
from kernels_on_a_processor import compiled_kernels

from lehr.runtime import cuda
from lehr.runtime.device import Staging, Stream
from lehr.runtime.errors import IncompatibleEngine, MissingExtra, RunFailed

HERE = Path(__file__).parent
RELEASES = json.loads((HERE / "cuda_api.json").read_text())["releases"]


class Handle:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


def driver(release: str, device: FakeDevice, **broken: str) -> SimpleNamespace:
    """cuda-python's module over the fake device; functions in ``broken`` return that status."""
    api = RELEASES[release]
    statuses = {**api["enums"]["CUresult"], "CUDA_ERROR_NO_DEVICE": 100, "CUDA_ERROR_ILLEGAL_ADDRESS": 700}
    statuses["CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"] = 901
    kinds = {name: enum.IntEnum(name, members) for name, members in api["enums"].items()}
    kinds["CUresult"] = enum.IntEnum("CUresult", statuses)
    handles = {name: type(name, (Handle,), {}) for name in api["handles"]}
    captured = []

    def end_capture(stream):
        captured.append(device.end_capture(int(stream)))
        return Handle(1)

    def launch(function, *rest):
        *shape, shared, stream, parameters, extra = rest
        values, types = parameters
        assert len(values) == len(types)
        assert min(shape) >= 1
        assert shape[0] <= 2**31 - 1
        assert shape[3] <= 1024
        assert shared == extra == 0
        device.launch(function, [kind(value) for kind, value in zip(types, values, strict=True)], 1, int(stream))

    doing = {
        "cuInit": lambda flags: None,
        "cuDeviceGet": Handle,
        "cuDevicePrimaryCtxRetain": lambda given: Handle(7),
        "cuDevicePrimaryCtxRelease": lambda given: None,
        "cuCtxSetCurrent": lambda context: None,
        "cuDeviceGetName": lambda length, given: b"a GPU".ljust(length, b"\0"),
        "cuModuleLoadData": lambda image: image.index(b".version") and Handle(8),
        "cuModuleGetFunction": lambda module, name: name.decode(),
        "cuMemAlloc": lambda size: Handle(device.allocate(size)),
        "cuMemFree": device.free,
        "cuMemHostAlloc": lambda size, flags: device.allocate_host(size),
        "cuMemFreeHost": device.free_host,
        "cuMemcpyHtoDAsync": lambda to, host, size, stream: device.upload(to, host, size, int(stream)),
        "cuMemcpyDtoHAsync": lambda host, source, size, stream: device.download(host, source, size, int(stream)),
        "cuMemcpyDtoDAsync": lambda to, source, size, stream: device.copy(to, source, size, int(stream)),
        "cuLaunchKernel": launch,
        "cuStreamCreate": lambda flags: Handle(device.create_stream()),
        "cuStreamDestroy": lambda stream: device.destroy_stream(int(stream)),
        "cuStreamSynchronize": lambda stream: device.synchronize(int(stream)),
        "cuEventCreate": lambda flags: Handle(device.create_event()),
        "cuEventDestroy": lambda event: device.destroy_event(int(event)),
        "cuEventRecord": lambda event, stream: device.record(int(event), int(stream)),
        "cuEventSynchronize": lambda event: device.wait(int(event)),
        "cuStreamBeginCapture": lambda stream, mode: device.begin_capture(int(stream)),
        "cuStreamEndCapture": end_capture,
        "cuGraphInstantiate": lambda graph, flags: Handle(captured.pop()),
        "cuGraphDestroy": lambda graph: None,
        "cuGraphLaunch": lambda graph, stream: device.launch_graph(int(graph), int(stream)),
        "cuGraphExecDestroy": lambda graph: device.destroy_graph(int(graph)),
        "cuGetErrorString": lambda status: f"the words for {status.name}".encode(),
    }

    def function(name: str):
        def called(*arguments):
            assert len(arguments) == len(api["functions"][name]), f"{name} takes {api['functions'][name]}"
            for expected, given in zip(api["functions"][name], arguments, strict=True):
                if expected in {"hStream", "hEvent", "hGraphExec"}:
                    assert type(given).__name__ == {"hStream": "CUstream", "hEvent": "CUevent"}.get(
                        expected, "CUgraphExec"
                    )
            if name in broken:
                return (kinds["CUresult"][broken[name]], *(None,) * (name != "cuInit"))
            if name == "cuMemGetInfo":
                return kinds["CUresult"].CUDA_SUCCESS, 5_000_000, 9_000_000
            result = doing[name](*arguments)
            return (kinds["CUresult"].CUDA_SUCCESS, *(() if result is None else (result,)))

        return called

    return SimpleNamespace(**{name: function(name) for name in api["functions"]}, **kinds, **handles)


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_is_made_as_the_release_takes_it(release):
    fake = FakeDevice()
    device = cuda.CudaDevice(driver(release, fake))
    assert device.name == "a GPU"
    stream = Stream(device)
    row, other = stream.put(np.array([4], np.int32)), stream.empty((1,), np.int32)
    staging = Staging(stream, 4)
    staging.upload(other, np.array([0], np.int32))
    with stream.capture() as graph:
        stream.launch("lehr_advance", (ctypes.c_void_p(row.address),), 1)
        stream.copy(other, row)
    for _ in range(3):
        graph.launch()
    assert stream.download(other).tolist() == [7]
    del row, other, staging, graph
    stream.close()
    fake.close()


@pytest.mark.parametrize("release", RELEASES)
def test_a_full_gpu_says_how_full_it_is_and_what_to_do(release):
    device = cuda.CudaDevice(driver(release, FakeDevice(), cuMemAlloc="CUDA_ERROR_OUT_OF_MEMORY"))
    with pytest.raises(RunFailed, match=r"memory is full \(5 of 9 MB free\).*--batch"):
        device.allocate(10)


def test_another_failure_has_the_drivers_words():
    device = cuda.CudaDevice(
        driver("cuda-bindings 13.0.0", FakeDevice(), cuStreamSynchronize="CUDA_ERROR_ILLEGAL_ADDRESS")
    )
    with pytest.raises(RunFailed, match="cuStreamSynchronize: the words for CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.synchronize(1)


def test_a_capture_that_the_driver_invalidates_is_told_from_other_failures():
    from lehr.runtime.device import CaptureImpossible

    broken = {"cuStreamEndCapture": "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}
    stream = Stream(cuda.CudaDevice(driver("cuda-python 12.6.0", FakeDevice(), **broken)))
    with pytest.raises(CaptureImpossible, match="STREAM_CAPTURE_INVALIDATED"), stream.capture():
        pass


def test_a_machine_without_a_gpu_is_refused_with_what_to_do():
    with pytest.raises(IncompatibleEngine, match=r"CUDA_ERROR_NO_DEVICE.*nvidia-smi.*--target cpu"):
        cuda.CudaDevice(driver("cuda-bindings 13.0.0", FakeDevice(), cuInit="CUDA_ERROR_NO_DEVICE"))


def test_a_machine_without_a_driver_is_refused_with_what_to_do():
    def missing(flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(IncompatibleEngine, match=r"no NVIDIA driver here \(Failed to dlopen libcuda.so.1\)"):
        cuda.CudaDevice(SimpleNamespace(cuInit=missing))


def test_either_name_of_cuda_python_is_found_and_none_is_said_with_the_pip_line(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"pip install 'lehr\[trt\]'"):
        cuda.driver()
    old, new = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.cuda", old)
    assert cuda.driver() is old
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", new)
    assert cuda.driver() is new


# ------------------------------------------------------------------------------------------- the real cuda-python

PIPELINES = """
import sys
import numpy as np
import ctypes
from lehr.runtime import cuda
from lehr.runtime.backends import tensorrt
import device_toy as toy
import test_device_loop as loops
from fake_tensorrt_runtime import library
from lehr.runtime.device import CaptureImpossible
from lehr.runtime.device_loop import Capture
from lehr.runtime.pipeline import Pipeline

stream = cuda.stream()

class AtOnce:
    queues = {stream.handle: []}

    def view(self, address, count, kind, writes):
        size = count * np.dtype(kind).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(address), kind)

    def queue(self, handle, operation):
        operation()

graphs = {"prompt": toy.prompt, "schedule": toy.schedule, "step": toy.step}
machine = object.__new__(toy.Machine)
machine.device, machine.stream, machine.loaded, machine.alive = AtOnce(), stream, {}, []
parts = {name: toy.engine(toy.SPLIT[name], function) for name, function in graphs.items()}
machine.library = library("tensorrt 11.4.0", machine.device, parts)
machine.log = toy.tensorrt_context.Log(machine.library)
for name, request in loops.REQUESTS.items():
    denoiser = toy.device_denoiser(machine, split=True)
    denoiser.resident.capture = Capture.NONE
    same = np.array_equal(Pipeline(denoiser)(request), Pipeline(toy.host_denoiser(split=True))(request))
    print(name, same)
try:
    with stream.capture():
        pass
except CaptureImpossible as e:
    print("refused", "the capture is refused" in str(e))
print(stream.device.name == "a processor")
"""


def test_the_real_cuda_python_draws_through_a_driver_that_is_a_processor(tmp_path):
    pytest.importorskip("cuda")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ here")
    kernels = compiled_kernels(compiler, tmp_path)
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", HERE / "fake_libcuda.cpp", "-ldl"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=60)
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    found = {"LD_LIBRARY_PATH": str(tmp_path), "LEHR_KERNELS": str(kernels), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PIPELINES],
        env={**os.environ, **found},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.endswith("True") for line in lines), lines
