"""The sampling loop on the device: latents, hoisted tensors and the table's sums never come to the host.

A step is: sum the row, gather what this row feeds the network, evaluate, keep what later rows need, count. Its work is
the same for every row, since the kernels (``runtime/kernels``) read the row's number and find coefficients, places and
addresses in device memory. So a step is captured into one CUDA graph and launched for all rows, and the graph stays
good for other prompts, whose tensors stand at other addresses. Short loops without injected noise become one graph as a
whole when they run again.

The network runs once before anything is captured, since libraries allocate and choose kernels on their first call, and
the first replay of a graph must give what the same work gave without it.

Shape legend: B samples, N evaluations, C channels.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.backends.base import Bindings, DeviceSession
from lehr.runtime.device import Argument, CaptureImpossible, DeviceArray, Graph, Staging, Stream
from lehr.runtime.errors import RunFailed
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.table_program import TableProgram, table_program

Array = npt.NDArray[Any]

# Kernels with atomics may round in another order each time; a graph that reads the wrong memory is off by all of it.
REPLAY_TOLERANCE = 1e-3
WHOLE_LOOP_EVALUATIONS = 8  # up to here the whole loop is captured too; a longer one gains under a per cent by it


class Capture(str, Enum):
    """How much of a loop becomes a CUDA graph."""

    AUTO = "auto"  # steps, and the whole loop where that is short and injects no noise
    STEP = "step"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFeeds:
    """What the step graph takes besides the sample, for one loop.

    Attributes:
        gathered: by input, for each evaluation the pieces that make it up, one after the other.
        fixed: what stays the same in the loop.
        values: those inputs of the host that decide shapes.
    """

    gathered: Mapping[str, Sequence[Sequence[DeviceArray]]]
    fixed: Mapping[str, DeviceArray | Array]
    values: Mapping[str, Array] = field(default_factory=dict)


class DeviceLoop:
    """A loop over one table at one batch; run it as often as there are batches.

    Args:
        session: the step graph's engine.
        table: one that :func:`lehr.runtime.table_program.obstacle` finds nothing against.
        shape: of the samples, (B, C, …).
        sample, output: names of the step graph's sample and prediction.
        scales: (N,) guidance scales of classifier-free guidance; None is none. Where a scale is 1, only the half with
            the condition is evaluated.
        capture: how much becomes a graph.
    """

    def __init__(
        self,
        session: DeviceSession,
        table: SolverTable,
        shape: tuple[int, ...],
        *,
        sample: str,
        output: str,
        scales: Array | None = None,
        capture: Capture = Capture.AUTO,
    ) -> None:
        self._session, self._stream, self._table = session, session.stream, table
        self._shape, self._names, self._capture = shape, (sample, output), capture
        self._program = table_program(table)
        n = len(table)
        self._guided = np.zeros(n, dtype=bool) if scales is None else np.asarray(scales) != 1.0
        kind = np.float64 if self._program.wide else np.float32
        self._slots = self._stream.empty((self._program.slots, *shape), kind)
        self._ring = self._stream.empty((self._program.ring, *shape), np.float32)
        self._final = self._stream.empty(shape, np.float32)
        self._row = self._stream.empty((1,), np.int32)
        weights = np.ones(n) if scales is None else np.asarray(scales, dtype=np.float64)
        self._on_device = {name: self._stream.put(array) for name, array in _constants(self._program, weights).items()}
        self._staging = Staging(self._stream, 4 * math.prod(shape)) if self._program.ring else None
        self._steps: dict[bool, _Step] = {}
        self._whole: Graph | None = None
        self._runs = 0

    def run(
        self,
        x_T: Array,
        feeds: Mapping[bool, LoopFeeds],
        *,
        injected: Callable[[int], Array] | None = None,
        on_queued: Callable[[int], None] | None = None,
    ) -> Array:
        """Draw samples.

        Args:
            x_T: (B, C, …) float32.
            feeds: of the network: True: of both halves of guidance, False: with the condition alone. They are read
                until this returns.
            injected: the noise of a number, (B, C, …) float32.
            on_queued: called with an evaluation's number when its work stands in the queue.

        Returns:
            (B, C, …) float32.

        Raises:
            RunFailed: the engine failed, or a captured step computes something else than the step itself.
        """
        self._prepare(feeds)
        self._stream.upload(self._slots.row(0), x_T.astype(self._slots.dtype))
        whole = self._capture is Capture.AUTO and not self._program.ring
        if whole and self._runs and len(self._table) <= WHOLE_LOOP_EVALUATIONS:
            final = self._run_whole(on_queued)
        else:
            final = self._run_steps(injected, on_queued)
        self._runs += 1
        return final

    # ------------------------------------------------------------------------------------------------ step by step

    def _run_steps(self, injected: Callable[[int], Array] | None, on_queued: Callable[[int], None] | None) -> Array:
        self._set_row(0)
        for i, guided in enumerate(self._guided.tolist()):
            self._inject(i, injected)
            self._advance_by_one(i, self._steps[guided])
            if on_queued is not None:
                on_queued(i)
        self._inject(len(self._table), injected)
        self._combine(self._final, 1)
        return self._stream.download(self._final)

    def _advance_by_one(self, i: int, step: _Step) -> None:
        step.calls += 1
        if step.graph is None and step.calls > 1 and self._capture is not Capture.NONE:
            self._capture_step(i, step)
        elif step.graph is not None:
            step.graph.launch()
        else:
            self._queue_step(step)

    def _capture_step(self, i: int, step: _Step) -> None:
        """Do row ``i`` without a graph and with one, and compare."""
        graph = self._captured(lambda: self._queue_step(step))
        self._queue_step(step)
        if graph is None:
            return
        made = [step.bindings.outputs[self._names[1]], self._slots.row(int(self._program.target[i]))]
        made += [self._slots.row(int(k)) for k in (self._program.kept_slot[i], self._program.clipped_slot[i]) if k >= 0]
        expected = [self._stream.download(array) for array in made]
        for array in made:  # so that a replay which writes nothing is noticed
            self._stream.upload(array, np.full(array.shape, np.nan, dtype=array.dtype))
        self._set_row(i)
        graph.launch()
        for array, reference in zip(made, expected, strict=True):
            self._check_replay(reference, self._stream.download(array), f"the step at evaluation {i}")
        step.graph = graph

    def _captured(self, queue: Callable[[], None]) -> Graph | None:
        try:
            with self._stream.capture() as graph:
                queue()
        except CaptureImpossible as e:
            self._capture = Capture.NONE
            warnings.warn(f"the loop runs without a CUDA graph: {e}", RuntimeWarning, stacklevel=2)
            return None
        return graph

    def _check_replay(self, reference: Array, replayed: Array, what: str) -> None:
        size = float(np.linalg.norm(reference.astype(np.float64)))
        error = float(np.linalg.norm(replayed.astype(np.float64) - reference))
        finite = np.isfinite(reference).all()  # what is not finite is reported with the samples
        if finite and not error <= REPLAY_TOLERANCE * size:
            raise RunFailed(
                f"{what} gives another result when its CUDA graph is replayed (relative error {error / size:.2g}). "
                "Run without graphs (Capture.NONE), and report it with the versions that lehr doctor shows."
                if size
                else f"{what} gives zeros without its CUDA graph and other values with it."
            )

    # ------------------------------------------------------------------------------------------------ as a whole

    def _run_whole(self, on_queued: Callable[[int], None] | None) -> Array:
        if self._whole is None:
            graph = self._captured(self._queue_loop)
            self._set_row(0)
            self._queue_loop()
            expected = self._stream.download(self._final)
            if graph is None:
                return expected
            self._stream.upload(self._final, np.full(self._shape, np.nan, dtype=np.float32))
            self._set_row(0)
            graph.launch()
            self._check_replay(expected, self._stream.download(self._final), "the whole loop")
            self._whole = graph
        else:
            self._set_row(0)
            self._whole.launch()
        if on_queued is not None:
            for i in range(len(self._table)):
                on_queued(i)
        return self._stream.download(self._final)

    def _queue_loop(self) -> None:
        for guided in self._guided.tolist():
            self._queue_step(self._steps[guided])
        self._combine(self._final, 1)

    # ------------------------------------------------------------------------------------------------ the work

    def _prepare(self, feeds: Mapping[bool, LoopFeeds]) -> None:
        """Let the steps read this run's conditions; whatever was captured reads them at the same places."""
        for guided in sorted(set(self._guided.tolist())):
            given = feeds[guided]
            if guided not in self._steps:
                self._steps[guided] = self._bound(given, copies=2 if guided else 1)
            self._steps[guided].feed(self._stream, given)

    def _bound(self, feeds: LoopFeeds, copies: int) -> _Step:
        shapes = {self._names[0]: (copies * self._shape[0], *self._shape[1:])}
        shapes |= {name: value.shape for name, value in feeds.fixed.items()}
        tables = {}
        for name, pieces in feeds.gathered.items():
            shapes[name] = (len(pieces[0]) * pieces[0][0].shape[0], *pieces[0][0].shape[1:])
            tables[name] = self._stream.empty((len(pieces), len(pieces[0])), np.uint64)
        bindings = self._session.bind(shapes, feeds.values)
        tables = {name: table for name, table in tables.items() if name in bindings.inputs}  # engines drop unread ones
        output = bindings.outputs[self._names[1]]
        if output.shape[0] != copies * self._shape[0] or output.shape[2:] != self._shape[2:]:
            raise RunFailed(
                f"the network returns shape {output.shape} for a sample of shape {shapes[self._names[0]]}. The engine "
                "has a size baked in; export the model again."
            )
        return _Step(bindings=bindings, copies=copies, tables=tables)

    def _queue_step(self, step: _Step) -> None:
        """One row: nothing in here depends on which."""
        stream, program, given = self._stream, self._program, self._on_device
        self._combine(step.bindings.inputs[self._names[0]], step.copies)
        for name, table in step.tables.items():
            into = step.bindings.inputs[name]
            count = table.shape[1]
            size = into.nbytes // count
            arguments = (_at(self._row), _at(table), _at(into), ctypes.c_int(count), ctypes.c_longlong(size))
            stream.launch("lehr_gather", arguments, into.nbytes // 4 or 1)
        step.bindings.enqueue()
        output = step.bindings.outputs[self._names[1]]
        elements = math.prod(self._shape)
        stream.launch(
            f"lehr_absorb_{self._slots.dtype.name}",
            (
                _at(self._row),
                _at(output),
                ctypes.c_int(step.copies - 1),
                *(_at(given[name]) for name in _ABSORBED),
                ctypes.c_double(program.limit),
                _at(self._slots),
                ctypes.c_longlong(elements),
                ctypes.c_longlong(elements // self._shape[0]),
                ctypes.c_longlong(math.prod(output.shape[1:])),
            ),
            elements,
        )
        stream.launch("lehr_advance", (_at(self._row),), 1)

    def _combine(self, into: DeviceArray, copies: int) -> None:
        given, elements = self._on_device, math.prod(self._shape)
        arguments: tuple[Argument, ...] = (
            _at(self._row),
            *(_at(given[name]) for name in ("first", "source", "factor", "target")),
            _at(self._slots),
            _at(self._ring),
            _at(into),
            ctypes.c_int(copies),
            ctypes.c_longlong(elements),
        )
        self._stream.launch(f"lehr_combine_{self._slots.dtype.name}", arguments, elements)

    def _set_row(self, i: int) -> None:
        self._stream.upload(self._row, np.array([i], dtype=np.int32))

    def _inject(self, i: int, injected: Callable[[int], Array] | None) -> None:
        """Bring the noises that row ``i`` is the first to use; the copy goes on while the host makes the next."""
        for number, place in self._program.noises[i]:
            if injected is None or self._staging is None:
                raise RunFailed(f"{self._table.sampler} injects {self._table.num_noises} noises, and none are given.")
            noise = injected(number)
            if noise.shape != self._shape:
                raise RunFailed(f"injected noise {number} has shape {noise.shape}, expected {self._shape}.")
            self._staging.upload(self._ring.row(place), noise)


_ABSORBED = (
    "scale",
    "kept_input",
    "kept_output",
    "denoised_input",
    "denoised_output",
    "target",
    "kept_slot",
    "clipped_slot",
)


@dataclass(slots=True, kw_only=True)
class _Step:
    """A step at one batch of the network: with both halves of guidance, or one."""

    bindings: Bindings
    copies: int
    tables: Mapping[str, DeviceArray]  # addresses of the pieces, (N, pieces) for each gathered input
    graph: Graph | None = None
    calls: int = 0

    def feed(self, stream: Stream, feeds: LoopFeeds) -> None:
        for name, table in self.tables.items():
            addresses = [[piece.address for piece in row] for row in feeds.gathered[name]]
            stream.upload(table, np.array(addresses, dtype=np.uint64))
        for name in set(feeds.fixed) & set(self.bindings.inputs):
            into, value = self.bindings.inputs[name], feeds.fixed[name]
            if isinstance(value, DeviceArray):
                stream.copy(into, value)
            else:
                stream.upload(into, value)


def _at(array: DeviceArray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.address)


def _constants(program: TableProgram, scales: Array) -> dict[str, Array]:
    names = ("first", "source", "factor", *(name for name in _ABSORBED if name != "scale"))
    return {name: np.ascontiguousarray(getattr(program, name)) for name in names} | {"scale": scales}
