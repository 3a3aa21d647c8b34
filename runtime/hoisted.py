"""A denoiser in three graphs, run as one: what a prompt and a schedule fix is computed once and handed to every step.

Results are cached sample by sample, under the content of that sample's conditions, so any batch that is put together
from known samples is served: classifier-free guidance with its two halves, mixed classes, a guidance schedule that
leaves one half out, the next batch of the same prompt. Nothing is assumed about who calls.

The prompt and schedule graphs run before the loop and, where they are large, are released before the step graph is
loaded, so memory peaks at the larger of the two phases and not at their sum (:class:`Residency`).

On a GPU what they compute never leaves it: the cache holds places in device memory, and batches are composed there.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime import engine as engines
from lehr.runtime.backends.base import DeviceSession, Session
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.device_loop import LoopFeeds
from lehr.runtime.device_network import DeviceNetwork
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import InvalidInput
from lehr.runtime.hoisted_rows import Key, Shared, Tensor, as_batch, digest_of, results_of, row_of, stacked_rows
from lehr.runtime.lora import Applied
from lehr.runtime.precision_schedule import Ends, graph_of, plan_of, steps_of
from lehr.runtime.spec import GraphSpec, ModelSpec

Array = npt.NDArray[Any]
Load = Callable[[str], Session]

PROMPT, SCHEDULE, STEP = "prompt", "schedule", "step"
SHAPE_SUFFIX = ".shape"
RELEASED_ABOVE = 1 << 26  # bytes of hoisted plans; loading a step graph again takes some ten milliseconds and more
CACHE_BYTES = 1 << 30  # of hoisted results kept beyond the call at hand
CHUNK_BYTES = 1 << 26  # of results made by one call of a hoisted graph
MAX_SHARED = 8  # sizes and shared conditions remembered at a time


class Residency(str, Enum):
    """Which graphs stay in memory."""

    AUTO = "auto"  # one phase's where the hoisted graphs are large, else all
    PHASES = "phases"  # those of one phase at a time: before the loop, or in it
    ALL = "all"  # all of them: what a server that changes prompts all the time wants


def load_denoiser(
    bundle: Bundle,
    record: EngineRecord,
    *,
    residency: Residency = Residency.AUTO,
    loras: Sequence[Applied] = (),
) -> Denoiser:
    """The network of a bundle, run by one of its engines, with LoRAs in its weights.

    Graphs of a phase are released for the other's where that frees at least :data:`RELEASED_ABOVE` bytes; below,
    loading them again at every prompt costs more than it saves.

    Raises:
        IncompatibleEngine, BundleError, MissingExtra: see :func:`lehr.runtime.engine.check`.
        InvalidInput: LoRAs of another model.
    """
    graphs = bundle.manifest.graphs
    signatures = {name: graphs[name].signature for name in (PROMPT, SCHEDULE, STEP) if name in graphs}
    for name in signatures:
        engines.check(bundle, record, name)
    if residency is Residency.AUTO:
        plans = [f"{record.folder}/{name}." for name in signatures if name != STEP]
        hoisted = sum(bundle.manifest.files[name].bytes for start in plans for name in bundle.names(start))
        residency = Residency.PHASES if hoisted >= RELEASED_ABOVE else Residency.ALL
    for end in record.end_recipes:
        engines.check(bundle, record, plan_of(end))
    return hoisted_denoiser(
        bundle.manifest.model,
        signatures,
        lambda name: engines.load(bundle, record, name, loras=loras),
        residency=residency,
        ends=record.ends,
    )


def hoisted_denoiser(
    spec: ModelSpec,
    graphs: Mapping[str, GraphSpec],
    load: Load,
    *,
    residency: Residency = Residency.PHASES,
    ends: Ends | None = None,
) -> Denoiser:
    """The network whose graphs ``load`` loads by name: one graph, or the parts it was split into.

    With a precision schedule ``load`` also has "step.first" and "step.last". Which of them computes an evaluation is
    decided on the host, so such a network draws there, wherever its engine is.
    """
    if ends is not None:
        scheduled = HoistedNetwork(spec, graphs, load, residency=residency, ends=ends)
        return Denoiser(spec, scheduled, hoisted=scheduled)
    if spec.fixed != spec.conditions:  # a loop on the device would not come back for what each evaluation brings
        network = HoistedNetwork(spec, graphs, load, residency=residency)
        return Denoiser(spec, network, hoisted=network)
    if set(graphs) == {STEP}:
        session = load(STEP)
        return Denoiser(spec, session.run, resident=DeviceNetwork(spec, graphs[STEP], lambda: session))
    network = HoistedNetwork(spec, graphs, load, residency=residency)
    resident = DeviceNetwork(spec, graphs[STEP], lambda: network.session(STEP), hoisted=network)
    network.loops = weakref.ref(resident)  # a cycle would keep device memory until it is collected
    return Denoiser(spec, network, hoisted=network, resident=resident)


class HoistedNetwork:
    """Feeds in, outputs out, as an unsplit engine would return them.

    Args:
        spec: the denoiser's.
        graphs: signatures of "step" and of "prompt" and "schedule" as far as they exist.
        load: the session of a graph by name.
        residency: which graphs stay in memory.
        ends: of a precision schedule, if there is one.

    Attributes:
        loops: returns what must let go of the step graph before it can be released.
    """

    def __init__(
        self,
        spec: ModelSpec,
        graphs: Mapping[str, GraphSpec],
        load: Load,
        *,
        residency: Residency = Residency.PHASES,
        ends: Ends | None = None,
    ) -> None:
        self._ends, self._steps = ends, tuple[float, ...]()
        self._spec, self._graphs, self._load, self._residency = spec, dict(graphs), load, residency
        self._sessions: dict[str, Session] = {}
        self.loops: Callable[[], DeviceNetwork | None] = _none
        self._hoisted = {
            tensor.name: tensor for name in (PROMPT, SCHEDULE) if name in graphs for tensor in graphs[name].outputs
        }
        self._of_prompt = [t for t in graphs[PROMPT].outputs if t.batched] if PROMPT in graphs else []
        self._of_schedule = list(graphs[SCHEDULE].outputs) if SCHEDULE in graphs else []
        taken = {tensor.name for tensor in graphs[SCHEDULE].inputs} if SCHEDULE in graphs else set()
        conditions = {tensor.name for tensor in spec.fixed if tensor.batched}
        # A schedule that no condition enters is computed once for all samples.
        self._schedule_is_shared = not taken & (conditions | {tensor.name for tensor in self._of_prompt})
        self._timesteps: tuple[float, ...] = ()
        self._shared: OrderedDict[bytes, Shared] = OrderedDict()
        self._prompts: OrderedDict[Key, tuple[Tensor, ...]] = OrderedDict()
        self._schedules: OrderedDict[tuple[Key | bytes, float], tuple[Tensor, ...]] = OrderedDict()
        self._bytes = 0
        self._last: tuple[dict[str, Array], tuple[int, ...], tuple[Key, ...]] | None = None
        self._assembled: tuple[tuple[Key, ...], dict[str, Tensor]] | None = None
        self._served: tuple[tuple[Key, ...], frozenset[float]] | None = None

    # ------------------------------------------------------------------------------------------------ calling

    def announce(self, timesteps: Iterable[float]) -> None:
        """Say which timesteps will come, so that whoever is met first is prepared for all of them at once."""
        kind = self._spec.timestep.dtype.numpy.type
        self._timesteps = tuple(dict.fromkeys(float(kind(t)) for t in timesteps))
        self._served = None

    def enter(self, timesteps: Iterable[float]) -> tuple[float, ...]:
        """Say which loop begins, or with no timesteps that none does; returns those of the one before."""
        before, kind = self._steps, self._spec.timestep.dtype.numpy.type
        self._steps = steps_of(float(kind(t)) for t in timesteps)
        return before

    def prepare(self, sample_sizes: Sequence[int], conditions: Sequence[Mapping[str, Array]]) -> None:
        """Compute what the announced timesteps need for samples that will come.

        Args:
            sample_sizes: a sample's shape without the batch.
            conditions: sets of conditions by name, each with any number of samples.
        """
        for given in conditions:
            batch = next((len(given[t.name]) for t in self._spec.fixed if t.batched), 1)
            self._rows(given, (batch, *sample_sizes))

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Evaluate; ``feeds`` holds every input of the spec by name."""
        handed = self.step_feeds(feeds)  # first: it may need the graphs that make room for the step graph
        return self.session(self._plan(feeds)).run(handed)  # type: ignore[arg-type]  # on a GPU a session takes its own arrays, too

    def _plan(self, feeds: Mapping[str, Array]) -> str:
        """Which plan of the step graph computes an evaluation."""
        if self._ends is None:
            return STEP
        plans = {plan_of(self._ends.end_of(float(t), self._steps)) for t in feeds[self._spec.timestep.name]}
        if len(plans) != 1:
            raise InvalidInput(
                f"one evaluation holds timesteps that the precision schedule gives to {', '.join(sorted(plans))}. "
                "Evaluate them one after the other."
            )
        return plans.pop()

    def on_device(self) -> bool:
        """Whether the engine is on a GPU; loads a graph where none is, and the one that is needed first."""
        first = next(name for name in (*self._sessions, PROMPT, SCHEDULE, STEP) if name in self._graphs)
        return isinstance(self.session(first), DeviceSession)

    def loop_feeds(
        self, conditions: Mapping[str, Array], sample_shape: tuple[int, ...], timesteps: Sequence[float]
    ) -> LoopFeeds:
        """What is handed to the step graph in a loop on the device, for the evaluations at ``timesteps``."""
        keys = self._rows(conditions, sample_shape, timesteps)
        rows = [[self._schedules[self._schedule_key(key), t] for key in keys] for t in timesteps if self._of_schedule]
        gathered = {
            tensor.name: [[as_batch(row[k]) for row in batch] for batch in rows]
            for k, tensor in enumerate(self._of_schedule)
        }
        return LoopFeeds(
            gathered=gathered, fixed={**self._prompt_tensors(keys), **self._shared[keys[0].shared].tensors}
        )

    def step_feeds(self, feeds: Mapping[str, Array]) -> dict[str, Tensor]:
        """What the step graph takes for ``feeds``."""
        sample = feeds[self._spec.sample.name]
        conditions = {tensor.name: feeds[tensor.name] for tensor in self._spec.conditions}
        timesteps = [float(t) for t in feeds[self._spec.timestep.name]]
        keys = self._rows(conditions, sample.shape, timesteps)
        handed: dict[str, Tensor] = {}
        if self._of_schedule:
            rows = [self._schedules[self._schedule_key(key), t] for key, t in zip(keys, timesteps, strict=True)]
            handed.update(stacked_rows(self._of_schedule, rows))
        handed.update(self._prompt_tensors(keys))
        handed.update(self._shared[keys[0].shared].tensors)
        return {t.name: handed.get(t.name, feeds.get(t.name)) for t in self._graphs[STEP].inputs}  # type: ignore[misc]

    def _prompt_tensors(self, keys: tuple[Key, ...]) -> dict[str, Tensor]:
        if self._assembled is None or self._assembled[0] != keys:
            self._assembled = keys, stacked_rows(self._of_prompt, [self._prompts[key] for key in keys])
        return self._assembled[1]

    # ------------------------------------------------------------------------------------------------ who is who

    def _rows(
        self, conditions: Mapping[str, Array], sample_shape: tuple[int, ...], timesteps: Sequence[float] = ()
    ) -> tuple[Key, ...]:
        """Keys of a batch's samples, everything that they need computed."""
        conditions = {tensor.name: conditions[tensor.name] for tensor in self._spec.fixed}
        keys = self._keys(conditions, sample_shape)
        if self._served is not None and keys is self._served[0] and self._served[1].issuperset(timesteps):
            return keys
        new = [(k, key) for k, key in enumerate(keys) if key not in self._prompts]
        if new:
            first = {key: k for k, key in reversed(new)}
            self._compute_prompts(list(first), conditions, list(first.values()))
        wanted = dict.fromkeys((*self._timesteps, *timesteps))
        missing = {
            (self._schedule_key(key), t): (key, k, t)
            for k, key in enumerate(keys)
            for t in wanted
            if (self._schedule_key(key), t) not in self._schedules
        }
        if missing and self._of_schedule:
            self._compute_schedules(missing, conditions)
        self._evict(keys)
        self._served = keys, frozenset(wanted)
        return keys

    def _keys(self, conditions: Mapping[str, Array], sample_shape: tuple[int, ...]) -> tuple[Key, ...]:
        if self._last is not None:
            known, shape, keys = self._last
            if shape == sample_shape and all(np.array_equal(known[name], value) for name, value in conditions.items()):
                return keys
        batched = [tensor.name for tensor in self._spec.fixed if tensor.batched]
        shared = {name: value for name, value in conditions.items() if name not in batched}
        sizes = sample_shape[1:]
        about = repr(
            (sizes, [(n, conditions[n].shape[1:]) for n in batched], [(n, v.shape) for n, v in shared.items()])
        )
        digest = hashlib.blake2b(about.encode(), digest_size=16)
        for value in shared.values():
            digest.update(value.tobytes())
        common = digest.digest()
        if common not in self._shared:
            self._shared[common] = Shared(sizes)
            while len(self._shared) > MAX_SHARED:
                self._forget(self._shared.popitem(last=False)[0])
        keys = tuple(Key(common, digest_of(conditions, batched, k)) for k in range(sample_shape[0]))
        # Copies, so that a caller who changes an array in place is noticed.
        self._last = {name: np.array(value) for name, value in conditions.items()}, sample_shape, keys
        return keys

    def _schedule_key(self, key: Key) -> Key | bytes:
        return key.shared if self._schedule_is_shared else key

    # ------------------------------------------------------------------------------------------------ computing

    def _compute_prompts(self, keys: Sequence[Key], conditions: Mapping[str, Array], rows: Sequence[int]) -> None:
        shared = self._shared[keys[0].shared]
        if PROMPT not in self._graphs or (shared.tensors and not self._of_prompt):
            self._prompts.update(dict.fromkeys(keys, ()))
            return
        graph, start, length = self._graphs[PROMPT], 0, 1
        while start < len(keys):
            part = slice(start, start + length)
            feeds = self._feeds(graph, conditions, rows[part], shared)
            made = results_of(self.session(PROMPT), feeds)
            shared.tensors.update({t.name: made[t.name] for t in graph.outputs if not t.batched})
            tensors = [made[tensor.name] for tensor in self._of_prompt]
            for k, key in enumerate(keys[part]):
                self._prompts[key] = tuple(row_of(tensor, k) for tensor in tensors)
            start, length = start + length, self._account(tensors)

    def _compute_schedules(
        self, missing: Mapping[tuple[Key | bytes, float], tuple[Key, int, float]], conditions: Mapping[str, Array]
    ) -> None:
        graph, wanted = self._graphs[SCHEDULE], list(missing)
        shared = self._shared[missing[wanted[0]][0].shared]
        start, length = 0, 1
        while start < len(wanted):
            chunk = wanted[start : start + length]
            part = [missing[want] for want in chunk]
            feeds = self._feeds(graph, conditions, [k for _, k, _ in part], shared)
            feeds.update(stacked_rows(self._of_prompt, [self._prompts[key] for key, _, _ in part]))
            feeds.update(shared.tensors)
            timestep = self._spec.timestep
            feeds[timestep.name] = np.array([t for _, _, t in part], dtype=timestep.dtype.numpy)
            made = results_of(self.session(SCHEDULE), {tensor.name: feeds[tensor.name] for tensor in graph.inputs})
            tensors = [made[tensor.name] for tensor in self._of_schedule]
            for k, want in enumerate(chunk):
                self._schedules[want] = tuple(row_of(tensor, k) for tensor in tensors)
            start, length = start + length, self._account(tensors)

    def _account(self, tensors: Sequence[Tensor]) -> int:
        """Count what was made; returns how many samples the next call may make, now that their size is known."""
        made = sum(tensor.nbytes for tensor in tensors)
        self._bytes += made
        rows = max((len(tensor) for tensor in tensors), default=1)
        return max(1, CHUNK_BYTES * rows // max(1, made))

    def _feeds(
        self, graph: GraphSpec, conditions: Mapping[str, Array], rows: Sequence[int], shared: Shared
    ) -> dict[str, Tensor]:
        """Feeds of a hoisted graph for some samples of a batch; what other graphs make is left to the caller."""
        declared = {tensor.name: tensor for tensor in self._spec.fixed}
        feeds: dict[str, Tensor] = {}
        for tensor in graph.inputs:
            if tensor.name in declared:
                value = conditions[tensor.name]
                feeds[tensor.name] = value[list(rows)] if tensor.batched else value
            elif tensor.name == self._spec.sample.name + SHAPE_SUFFIX:
                feeds[tensor.name] = np.array([len(rows), *shared.sizes], dtype=np.int64)
        return feeds

    def session(self, name: str) -> Session:
        """A graph's session, loaded where it is not."""
        if name not in self._sessions:
            if self._residency is not Residency.ALL:
                self._release(in_loop=graph_of(name) == STEP)
            self._sessions[name] = self._load(name)
        return self._sessions[name]

    def _release(self, *, in_loop: bool) -> None:
        """Let the graphs of the other phase go."""
        for name in [name for name in self._sessions if (graph_of(name) == STEP) is not in_loop]:
            if name == STEP and (loops := self.loops()) is not None:
                loops.forget()
            del self._sessions[name]

    def _evict(self, needed: Sequence[Key]) -> None:
        """Forget the oldest samples beyond the limit, none that the call at hand needs."""
        kept = set(needed)
        for key in [key for key in self._prompts if key not in kept]:
            if self._bytes <= CACHE_BYTES:
                return
            self._forget(key)

    def _forget(self, owner: Key | bytes) -> None:
        """Drop what belongs to one sample, or to everything that shares a context."""
        self._served = None

        def belongs(key: Key | bytes) -> bool:
            return owner in (key, getattr(key, "shared", None))

        for key in [key for key in self._prompts if belongs(key)]:
            self._bytes -= sum(tensor.nbytes for tensor in self._prompts.pop(key))
        for want in [want for want in self._schedules if belongs(want[0])]:
            self._bytes -= sum(tensor.nbytes for tensor in self._schedules.pop(want))


def _none() -> None:
    """Nobody runs loops."""
