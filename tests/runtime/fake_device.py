"""A GPU without a GPU: it does the work of a stream late, in order, and only when somebody waits.

Memory stands at invented addresses that are never used twice, and every byte knows whether it was written. So reading
what nobody wrote, touching what was given back, freeing twice, changing what a queued copy still reads, replaying a
graph whose memory is gone and forgetting to give something back are all seen.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lehr.runtime.device import Argument, CaptureImpossible

Operation = Callable[[], None]
GAP = 1 << 20


@contextmanager
def collecting() -> Iterator[None]:
    """Collect at the end what the block left in cycles, a caught error's frames as a rule; only that, to be quick."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


class Misuse(AssertionError):
    """Something that a real device would not forgive, or would silently compute nonsense from."""


class FakeDevice:
    name = "a GPU that is not there"

    def __init__(self) -> None:
        self._next = 0x7F0000000000
        self.memory: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # base -> bytes, whether written
        self._gone: dict[int, int] = {}
        self.host: dict[int, np.ndarray] = {}
        self.queues: dict[int, list[Operation]] = {}
        self.events: dict[int, tuple[int, int] | None] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self._capture: tuple[int, list[Operation]] | None = None
        self.refuses_capture = False
        self.done: dict[int, int] = {}
        self.peak = 0
        self.log: list[str] = []

    # ------------------------------------------------------------------------------------------------ memory

    def _handle(self, size: int = 1) -> int:
        handle = self._next
        self._next += -(-size // GAP) * GAP + GAP
        return handle

    def _not_capturing(self, what: str) -> None:
        if self._capture is not None:
            raise Misuse(f"{what} during a capture")

    def allocate(self, size: int) -> int:
        self._not_capturing("memory is taken")
        address = self._handle(size)
        self.memory[address] = np.full(size, 0xAB, np.uint8), np.zeros(size, bool)
        self.peak = max(self.peak, self.in_use)
        return address

    @property
    def in_use(self) -> int:
        return sum(len(block) for block, _ in self.memory.values())

    def free(self, address: int) -> None:
        self._not_capturing("memory is given back")
        if address not in self.memory:
            raise Misuse("memory is given back twice" if address in self._gone else "an unknown address is freed")
        for stream in self.queues:
            self._run(stream)  # as cudaFree waits
        self._gone[address] = len(self.memory.pop(address)[0])

    def allocate_host(self, size: int) -> int:
        self._not_capturing("host memory is taken")
        block = np.zeros(size, np.uint8)
        self.host[block.ctypes.data] = block
        return block.ctypes.data

    def free_host(self, address: int) -> None:
        self._not_capturing("host memory is given back")
        del self.host[address]

    def view(self, address: int, count: int, kind: Any, *, writes: bool) -> np.ndarray:
        """Elements at an address; reading asks whether they were written."""
        size = count * np.dtype(kind).itemsize
        for base, (block, written) in self.memory.items():
            if base <= address < base + len(block):
                start = address - base
                if start + size > len(block):
                    raise Misuse(f"{size} bytes are touched where {len(block) - start} are left")
                if writes:
                    written[start : start + size] = True
                elif not written[start : start + size].all():
                    raise Misuse("memory is read that nobody has written")
                return block[start : start + size].view(kind)
        for base, length in self._gone.items():
            if base <= address < base + length:
                raise Misuse("memory is used after it was given back")
        raise Misuse(f"address {address:#x} belongs to nothing")

    # ------------------------------------------------------------------------------------------------ the queue

    def queue(self, stream: int, operation: Operation) -> None:
        if stream not in self.queues:
            raise Misuse("work is given to a stream that is not there")
        if self._capture is not None and self._capture[0] == stream:
            self._capture[1].append(operation)
        else:
            self.queues[stream].append(operation)

    def _run(self, stream: int, until: int | None = None) -> None:
        queue = self.queues[stream]
        count = len(queue) if until is None else max(0, until - self.done[stream])
        for operation in queue[:count]:
            operation()
        del queue[:count]
        self.done[stream] += count

    def upload(self, target: int, host: int, size: int, stream: int) -> None:
        def operation() -> None:
            self.view(target, size, np.uint8, writes=True)[:] = np.frombuffer(ctypes.string_at(host, size), np.uint8)

        self.log.append(f"upload {size}")
        self.queue(stream, operation)

    def download(self, host: int, source: int, size: int, stream: int) -> None:
        self._not_capturing("a copy to the host")
        ctypes.memset(host, 0xFF, size)

        def operation() -> None:
            values = self.view(source, size, np.uint8, writes=False)
            ctypes.memmove(host, values.ctypes.data, size)

        self.log.append(f"download {size}")
        self.queue(stream, operation)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        def operation() -> None:
            self.view(target, size, np.uint8, writes=True)[:] = self.view(source, size, np.uint8, writes=False)

        self.log.append(f"copy {size}")
        self.queue(stream, operation)

    def launch(self, kernel: str, arguments: Sequence[Argument], threads: int, stream: int) -> None:
        values = [argument.value or 0 for argument in arguments]
        name, _, kind = kernel.removeprefix("lehr_").partition("_")
        function = getattr(self, f"_{name}")
        types = (np.dtype(kind),) if kind else ()
        if threads < 1:
            raise Misuse("a kernel without threads")
        self.queue(stream, lambda: function(*types, *values))

    def create_stream(self) -> int:
        stream = self._handle()
        self.queues[stream], self.done[stream] = [], 0
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._run(stream)
        del self.queues[stream]

    def synchronize(self, stream: int) -> None:
        self._not_capturing("waiting")
        self.log.append("synchronize")
        self._run(stream)

    def create_event(self) -> int:
        event = self._handle()
        self.events[event] = None
        return event

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        self.events[event] = stream, self.done[stream] + len(self.queues[stream])

    def wait(self, event: int) -> None:
        self._not_capturing("waiting")
        mark = self.events[event]
        if mark is not None and mark[0] in self.queues:
            self._run(*mark)

    # ------------------------------------------------------------------------------------------------ graphs

    def begin_capture(self, stream: int) -> None:
        self._not_capturing("a capture begins")
        self._capture = stream, []

    def end_capture(self, stream: int) -> int:
        if self._capture is None or self._capture[0] != stream:
            raise Misuse("no capture is under way")
        operations, self._capture = self._capture[1], None
        if self.refuses_capture:
            raise CaptureImpossible("operation not permitted when stream is capturing.")
        graph = self._handle()
        self.graphs[graph] = operations
        return graph

    def launch_graph(self, graph: int, stream: int) -> None:
        self.log.append(f"graph of {len(self.graphs[graph])}")
        for operation in self.graphs[graph]:
            self.queue(stream, operation)

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def close(self) -> None:
        """Everything must have been given back."""
        left = {"memory": self.memory, "host memory": self.host, "events": self.events, "graphs": self.graphs}
        left["streams"] = self.queues
        for what, rest in left.items():
            if rest:
                raise Misuse(f"{what} never given back: {len(rest)}")

    # ------------------------------------------------------------------------------------------------ kernels

    def _combine(self, kind, row, first, source, factor, target, slots, noises, into, copies, elements) -> None:
        def value(place: int) -> np.ndarray:
            if place >= 0:
                at = slots + place * elements * kind.itemsize
                return self.view(at, elements, kind, writes=False)
            return self.view(noises + (-1 - place) * elements * 4, elements, np.float32, writes=False).astype(kind)

        i = int(self.view(row, 1, np.int32, writes=False)[0])
        begin, end = (int(k) for k in self.view(first + 4 * i, 2, np.int32, writes=False))
        total = np.zeros(elements, kind)
        for k in range(begin, end):
            place = int(self.view(source + 4 * k, 1, np.int32, writes=False)[0])
            weight = kind.type(self.view(factor + 8 * k, 1, np.float64, writes=False)[0])
            term = value(place) * weight
            total = term if k == begin else total + term
        slot = int(self.view(target + 4 * i, 1, np.int32, writes=False)[0])
        if slot >= 0:
            self.view(slots + slot * elements * kind.itemsize, elements, kind, writes=True)[:] = total
        for c in range(copies):
            self.view(into + 4 * c * elements, elements, np.float32, writes=True)[:] = total

    def _absorb(
        self,
        kind,
        row,
        output,
        guided,
        scale,
        kept_input,
        kept_output,
        denoised_input,
        denoised_output,
        input_slot,
        kept_slot,
        clipped_slot,
        limit,
        slots,
        elements,
        per_sample,
        per_output,
    ) -> None:
        i = int(self.view(row, 1, np.int32, writes=False)[0])

        def number(address: int, of: Any = np.float64) -> Any:
            return self.view(address + np.dtype(of).itemsize * i, 1, of, writes=False)[0]

        def slot(place: int, *, writes: bool) -> np.ndarray:
            return self.view(slots + int(place) * elements * kind.itemsize, elements, kind, writes=writes)

        def pair(a: float, x: np.ndarray, b: float, y: np.ndarray) -> np.ndarray:
            terms = [values * kind.type(factor) for factor, values in ((a, x), (b, y)) if factor != 0]
            return terms[0] + terms[1] if len(terms) == 2 else terms[0] if terms else np.zeros_like(x)

        batch = elements // per_sample
        whole = self.view(output, (1 + guided) * batch * per_output, np.float32, writes=False)
        halves = whole.reshape(1 + guided, batch, per_output)[:, :, :per_sample].reshape(1 + guided, elements)
        prediction = halves[0]
        if guided:
            prediction = prediction + (halves[1] - halves[0]) * np.float32(number(scale))
        f, x = prediction.astype(kind), slot(number(input_slot, np.int32), writes=False)
        if (place := number(kept_slot, np.int32)) >= 0:
            slot(place, writes=True)[:] = pair(number(kept_input), x, number(kept_output), f)
        if (place := number(clipped_slot, np.int32)) >= 0:
            denoised = pair(number(denoised_input), x, number(denoised_output), f)
            slot(place, writes=True)[:] = np.clip(denoised, -kind.type(limit), kind.type(limit))

    def _gather(self, row, sources, into, count, size) -> None:
        i = int(self.view(row, 1, np.int32, writes=False)[0])
        for k, address in enumerate(self.view(sources + 8 * i * count, count, np.uint64, writes=False)):
            piece = self.view(int(address), size, np.uint8, writes=False)
            self.view(into + k * size, size, np.uint8, writes=True)[:] = piece

    def _advance(self, row) -> None:
        self.view(row, 1, np.int32, writes=True)[:] += 1
