"""Memory and work on a GPU: the few calls that are needed of it, and who owns what.

:class:`Device` is what a GPU (:mod:`lehr.runtime.cuda`) or a test offers, in addresses and handles. Everything else
here owns one of those and gives it back when it goes out of use. All work of a process stands in one :class:`Stream`,
so it runs in the order in which it was written down, and nothing waits but :meth:`Stream.download` and
:meth:`Stream.synchronize`.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import RunFailed

Array = npt.NDArray[Any]
Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_longlong | ctypes.c_double


class CaptureImpossible(RunFailed):
    """The library or the driver cannot write this work down as a graph; it can be done without one."""


class Device(Protocol):
    """A GPU. Streams, events and graphs are handles; addresses and sizes count bytes."""

    name: str

    def allocate(self, size: int) -> int:
        """Address of fresh memory; raises RunFailed where there is not enough."""

    def free(self, address: int) -> None:
        """Give memory back, after all work that was queued."""

    def allocate_host(self, size: int) -> int:
        """Address of host memory that copies read while the host goes on."""

    def free_host(self, address: int) -> None: ...

    def upload(self, target: int, host: int, size: int, stream: int) -> None:
        """Queue a copy from host memory, which must stay as it is until the copy is done."""

    def download(self, host: int, source: int, size: int, stream: int) -> None: ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None: ...

    def launch(self, kernel: str, arguments: Sequence[Argument], threads: int, stream: int) -> None:
        """Queue a kernel of ``runtime/kernels`` with at least as many threads as it has work for, or fewer."""

    def create_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Wait for everything queued; raises RunFailed for what went wrong in it."""

    def create_event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """Mark the place that the stream has been queued to."""

    def wait(self, event: int) -> None:
        """Wait until the stream has come to the mark; at once where none was set."""

    def begin_capture(self, stream: int) -> None:
        """From here on work is written down and not done; memory must neither be taken nor given back."""

    def end_capture(self, stream: int) -> int:
        """The graph of the work since :meth:`begin_capture`; raises CaptureImpossible."""

    def launch_graph(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...


# ---------------------------------------------------------------------------------------------------------- memory


class Buffer:
    """Memory on a device, which goes back when nobody refers to it any more."""

    def __init__(self, stream: Stream, size: int) -> None:
        self.stream, self.size = stream, size
        self.address = stream.device.allocate(max(size, 1))
        weakref.finalize(self, stream.give_back, self.address).atexit = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArray:
    """An array in device memory, contiguous; several may share a buffer, which lives as long as one of them."""

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        return self.buffer.address + self.offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def row(self, k: int) -> DeviceArray:
        """Element ``k`` of the first dimension, without a copy."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(buffer=self.buffer, offset=self.offset + k * size, shape=self.shape[1:], dtype=self.dtype)

    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """The same memory in another shape of as many elements."""
        return DeviceArray(buffer=self.buffer, offset=self.offset, shape=shape, dtype=self.dtype)

    def first(self, count: int) -> DeviceArray:
        """The first ``count`` elements of the first dimension, without a copy."""
        return self.reshape((count, *self.shape[1:]))


def stacked(rows: Sequence[DeviceArray]) -> DeviceArray:
    """One array with a row for each, copied on the device; without a copy for a single one."""
    if len(rows) == 1:
        return rows[0].reshape((1, *rows[0].shape))
    stream = rows[0].buffer.stream
    whole = stream.empty((len(rows), *rows[0].shape), rows[0].dtype)
    for k, row in enumerate(rows):
        stream.copy(whole.row(k), row)
    return whole


# ---------------------------------------------------------------------------------------------------------- stream


class Stream:
    """Work in order. Owned by whoever opened the device; every array made here must be dropped before :meth:`close`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = device.create_stream()
        self._borrowed: list[Array] = []  # host arrays that queued copies read
        self.capturing = False  # work is being written down, not done
        self.closed = False
        self._late: list[int] = []
        self._workspace: Buffer | None = None

    def close(self) -> None:
        """Finish what is queued and give everything of the stream's own back."""
        self.synchronize()
        self._workspace = None
        self.closed = True
        self.device.destroy_stream(self.handle)

    def give_back(self, address: int) -> None:
        """Free memory; later, where a capture is under way, which may not free any."""
        if self.capturing:
            self._late.append(address)
        else:
            self.device.free(address)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """An array of whatever stands there."""
        kind = np.dtype(dtype)
        buffer = Buffer(self, math.prod(shape) * kind.itemsize)
        return DeviceArray(buffer=buffer, offset=0, shape=shape, dtype=kind)

    def workspace(self, size: int) -> Buffer:
        """Scratch memory that all engines of the stream share, since they never run at the same time.

        It grows by being replaced; whoever still uses the smaller one keeps it alive.
        """
        if self._workspace is None or self._workspace.size < size:
            self._workspace = Buffer(self, size)
        return self._workspace

    # ------------------------------------------------------------------------------------------------ copies

    def put(self, array: Array) -> DeviceArray:
        """A copy of a host array on the device."""
        target = self.empty(array.shape, array.dtype)
        self.upload(target, array)
        return target

    def upload(self, target: DeviceArray, array: Array) -> None:
        """Queue a copy of ``array``, which the caller must not change before the stream was waited for."""
        source = np.ascontiguousarray(array, dtype=target.dtype)
        if source.nbytes != target.nbytes:
            raise RunFailed(f"an array of {source.nbytes} bytes does not fit one of {target.nbytes} on the device.")
        if source.nbytes:
            self._borrowed.append(source)
            self.device.upload(target.address, source.ctypes.data, source.nbytes, self.handle)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Queue a copy from device to device."""
        if source.nbytes != target.nbytes:
            raise RunFailed(f"an array of {source.nbytes} bytes does not fit one of {target.nbytes} on the device.")
        if source.nbytes:
            self.device.copy(target.address, source.address, source.nbytes, self.handle)

    def download(self, source: DeviceArray) -> Array:
        """A copy on the host, after everything queued."""
        array = np.empty(source.shape, source.dtype)
        if array.nbytes:
            self.device.download(array.ctypes.data, source.address, array.nbytes, self.handle)
        self.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for everything queued; host arrays that it read are free again."""
        if self.closed:
            return
        self.device.synchronize(self.handle)
        self._borrowed.clear()

    # ------------------------------------------------------------------------------------------------ work

    def launch(self, kernel: str, arguments: Sequence[Argument], threads: int) -> None:
        """Queue a kernel."""
        self.device.launch(kernel, arguments, threads, self.handle)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Write down what the block queues, and do none of it; the graph is ready after the block.

        Raises:
            CaptureImpossible: something in the block cannot be written down.
        """
        graph = Graph(self)
        self.device.begin_capture(self.handle)
        self.capturing = True
        try:
            yield graph
        except BaseException:
            self._end_capture(None)
            raise
        self._end_capture(graph)

    def _end_capture(self, graph: Graph | None) -> None:
        try:
            handle = self.device.end_capture(self.handle)
        except CaptureImpossible:
            if graph is not None:  # else the block has failed already, and says why
                raise
        else:
            if graph is not None:
                graph.keep(handle)
            else:
                self.device.destroy_graph(handle)
        finally:
            self.capturing = False
            for address in self._late:
                self.device.free(address)
            self._late.clear()


class Graph:
    """Captured work. What it reads and writes must outlive it: whoever captured it keeps those buffers beside it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._handle: int | None = None

    def keep(self, handle: int) -> None:
        """Own an instantiated graph."""
        self._handle = handle
        weakref.finalize(self, self._stream.device.destroy_graph, handle).atexit = False

    def launch(self) -> None:
        """Queue the work once more."""
        if self._handle is None:
            raise RunFailed("a graph is launched before its capture has ended.")
        self._stream.device.launch_graph(self._handle, self._stream.handle)


class Staging:
    """Uploads that go on while the host makes the next array: a few places in host memory, used in turn.

    A place is written again only when its last copy is done, which is the only wait.
    """

    def __init__(self, stream: Stream, size: int, places: int = 2) -> None:
        self._stream, self._size = stream, size
        device = stream.device
        self._places: deque[tuple[int, int]] = deque()
        for _ in range(places):
            host, event = device.allocate_host(size), device.create_event()
            weakref.finalize(self, _release_place, device, host, event).atexit = False
            self._places.append((host, event))

    def upload(self, target: DeviceArray, array: Array) -> None:
        """Queue a copy of ``array``, which is the caller's again at once."""
        device, stream = self._stream.device, self._stream.handle
        host, event = self._places[0]
        self._places.rotate(-1)
        device.wait(event)
        source = np.ascontiguousarray(array, dtype=target.dtype)
        if not source.nbytes == target.nbytes <= self._size:
            raise RunFailed(f"an array of {source.nbytes} bytes does not fit one of {target.nbytes} on the device.")
        ctypes.memmove(host, source.ctypes.data, source.nbytes)
        device.upload(target.address, host, source.nbytes, stream)
        device.record(event, stream)


def _release_place(device: Device, host: int, event: int) -> None:
    device.wait(event)  # a copy may still read there
    device.destroy_event(event)
    device.free_host(host)
