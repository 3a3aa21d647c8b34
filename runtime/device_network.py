"""A network on a GPU as whole loops see it: conditions in, samples out, everything between stays on the device."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lehr.runtime.backends.base import DeviceSession, Session
from lehr.runtime.device import DeviceArray
from lehr.runtime.device_loop import Capture, DeviceLoop, LoopFeeds
from lehr.runtime.errors import InvalidInput
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import GraphSpec, ModelSpec
from lehr.runtime.table_program import obstacle

Array = npt.NDArray[Any]
MAX_LOOPS = 4  # tables and shapes whose captured graphs are kept


class Hoisted(Protocol):
    """What hands cached tensors to the step graph (:mod:`lehr.runtime.hoisted`)."""

    def on_device(self) -> bool: ...

    def loop_feeds(
        self, conditions: Mapping[str, Array], sample_shape: tuple[int, ...], timesteps: Sequence[float]
    ) -> LoopFeeds: ...


class DeviceNetwork:
    """Loops of one network.

    Args:
        spec: the denoiser's.
        graph: the step graph's signature.
        session: the step graph's session, loaded where it is not.
        hoisted: what prepares the step graph's other inputs; None for a graph that was not taken apart.
    """

    def __init__(
        self, spec: ModelSpec, graph: GraphSpec, session: Callable[[], Session], *, hoisted: Hoisted | None = None
    ) -> None:
        self._spec, self._graph, self._session, self._hoisted = spec, graph, session, hoisted
        self._loops: OrderedDict[object, DeviceLoop] = OrderedDict()
        self.capture = Capture.AUTO

    def forget(self) -> None:
        """Let go of all loops, and so of the engine that they run."""
        self._loops.clear()

    def runs(self, table: SolverTable) -> bool:
        """Whether the engine is on a device and can run this table's loop there."""
        if self._spec.sample.dtype.numpy != np.float32 or obstacle(table) is not None:
            return False
        return isinstance(self._session(), DeviceSession) if self._hoisted is None else self._hoisted.on_device()

    def draw(
        self,
        table: SolverTable,
        x_T: Array,
        conditions: Mapping[str, Array],
        unconditional: Mapping[str, Array] | None,
        scales: Array | None,
        *,
        injected: Callable[[int], Array],
        on_queued: Callable[[int], None] | None = None,
    ) -> Array:
        """Run a loop; what :func:`lehr.runtime.loop.sample` returns for the same network.

        Args:
            table: one that :meth:`runs`.
            x_T: (B, C, …) float32.
            conditions: name -> (B, …), or without a batch where all samples share it.
            unconditional: the same for classifier-free guidance; None without it.
            scales: (N,) guidance scales; None without guidance.
            injected: the noise of a number.
            on_queued: called when an evaluation stands in the queue.

        Raises:
            InvalidInput: guidance of a model without conditions.
            RunFailed: the engine failed.
        """
        guided = np.zeros(len(table), dtype=bool) if scales is None else scales != 1.0
        feeds: dict[bool, LoopFeeds] = {}
        if guided.any():
            if not conditions or unconditional is None:
                raise InvalidInput("this model has no condition, so guidance cannot act; leave --guidance-scale at 1.")
            both = {
                name: np.concatenate([unconditional[name], value]) if name in unconditional else value
                for name, value in conditions.items()
            }
            feeds[True] = self._feeds(both, (2 * len(x_T), *x_T.shape[1:]), table)
        if not guided.all():
            feeds[False] = self._feeds(conditions, x_T.shape, table)
        loop = self._loop(table, x_T.shape, scales)
        return loop.run(x_T, feeds, injected=injected, on_queued=on_queued)

    def _loop(self, table: SolverTable, shape: tuple[int, ...], scales: Array | None) -> DeviceLoop:
        session = self._session()
        if not isinstance(session, DeviceSession):
            raise InvalidInput("this engine is not on a device; run its loop on the host.")
        key = _digest(table), shape, None if scales is None else scales.tobytes(), self.capture
        if key not in self._loops:
            while len(self._loops) >= MAX_LOOPS:
                self._loops.popitem(last=False)
            self._loops[key] = DeviceLoop(
                session,
                table,
                shape,
                sample=self._spec.sample.name,
                output=self._spec.outputs[0].name,
                scales=scales,
                capture=self.capture,
            )
        self._loops.move_to_end(key)
        return self._loops[key]

    def _feeds(self, conditions: Mapping[str, Array], shape: tuple[int, ...], table: SolverTable) -> LoopFeeds:
        spec = self._spec
        timesteps = table.timesteps.astype(spec.timestep.dtype.numpy)
        made = LoopFeeds(gathered={}, fixed={})
        if self._hoisted is not None:
            made = self._hoisted.loop_feeds(conditions, shape, [float(t) for t in timesteps])
        gathered, fixed = dict(made.gathered), dict(made.fixed)
        for tensor in self._graph.inputs:
            if tensor.name in conditions and tensor.name not in fixed:
                fixed[tensor.name] = np.asarray(conditions[tensor.name])
            elif tensor.name == spec.timestep.name:
                rows = self._on_device(np.repeat(timesteps[:, None], shape[0], axis=1))
                gathered[tensor.name] = [[rows.row(i)] for i in range(len(table))]
        needed = {tensor.name for tensor in self._graph.inputs}
        return LoopFeeds(
            gathered={name: pieces for name, pieces in gathered.items() if name in needed},
            fixed={name: value for name, value in fixed.items() if name in needed},
        )

    def _on_device(self, array: Array) -> DeviceArray:
        session = self._session()
        if not isinstance(session, DeviceSession):
            raise InvalidInput("this engine is not on a device; run its loop on the host.")
        return session.stream.put(array)


def _digest(table: SolverTable) -> bytes:
    """Of everything in a table that its loop depends on."""
    digest = hashlib.blake2b(digest_size=16)
    for item in fields(table):
        value = getattr(table, item.name)
        if isinstance(value, np.ndarray):
            digest.update(repr((item.name, value.shape)).encode() + value.tobytes())
    digest.update(repr((table.clip, table.variance)).encode())
    return digest.digest()
