"""The denoiser as the loop sees it: a spec, and something that runs feeds (an engine, or eager PyTorch at export)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lehr.runtime.device_network import DeviceNetwork
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.noise import standard_normal
from lehr.runtime.spec import DType, ModelSpec, Varies, check_labels

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Preparable(Protocol):
    """A network that works out beforehand what a loop leaves unchanged (:mod:`lehr.runtime.hoisted`)."""

    def announce(self, timesteps: Iterable[float]) -> None: ...

    def prepare(self, sample_sizes: Sequence[int], conditions: Sequence[Mapping[str, Array]]) -> None: ...


@runtime_checkable
class Scheduled(Protocol):
    """A network whose precision depends on an evaluation's place in its loop."""

    def enter(self, timesteps: Iterable[float]) -> tuple[float, ...]: ...


class Denoiser:
    """Checked calls of one network: ``denoiser(sample, timestep, conditions) -> output``.

    Args:
        spec: what the network takes and returns.
        run: feeds in, outputs out.
        hoisted: what prepares ``run`` for a loop, if anything does.
        resident: the same network for loops on a GPU, if it may be on one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        run: Run,
        *,
        hoisted: Preparable | None = None,
        resident: DeviceNetwork | None = None,
    ) -> None:
        self.spec, self._run, self._hoisted, self.resident = spec, run, hoisted, resident
        self._constants: dict[str, Array] = {}
        self._fitting: tuple[Any, dict[str, int]] = (None, {})

    def prepare(
        self, timesteps: Iterable[float], sample_sizes: Sequence[int], conditions: Sequence[Mapping[str, Array]]
    ) -> None:
        """Say what is coming, which saves time and memory and changes no result.

        Args:
            timesteps: that the network will be evaluated at.
            sample_sizes: a sample's shape without the batch.
            conditions: sets of conditions by name, each with any number of samples; empty sets are left out.
        """
        if self._hoisted is None:
            return
        self._hoisted.announce(timesteps)
        names = {tensor.name for tensor in self.spec.fixed}
        self._hoisted.prepare(sample_sizes, [given for given in conditions if names <= set(given)])

    @contextmanager
    def loop(self, timesteps: Iterable[float]) -> Iterator[None]:
        """Say that what is evaluated meanwhile is a loop over these timesteps, in this order.

        Engines with a precision schedule choose by an evaluation's place in it; to all others it means nothing.
        Outside of a loop the model's own decides (:mod:`lehr.runtime.precision_schedule`).
        """
        if not isinstance(self._hoisted, Scheduled):
            yield
            return
        before = self._hoisted.enter(timesteps)
        try:
            yield
        finally:
            self._hoisted.enter(before)

    def __call__(self, sample: Array, timestep: float, conditions: Mapping[str, Array]) -> Array:
        """Evaluate at one timestep for the whole batch.

        Args:
            sample: (B, C, …) in the spec's dtype.
            timestep: what the path calls the timestep.
            conditions: every input of ``spec.conditions`` by name.

        Returns:
            (B, C, …): the prediction, without the extra channels of a learned variance.

        Raises:
            InvalidInput: feeds that do not fit the spec.
            RunFailed: the engine returned a shape the spec does not allow.
        """
        return self.with_variance(sample, timestep, conditions)[:, : sample.shape[1]]

    def with_variance(self, sample: Array, timestep: float, conditions: Mapping[str, Array]) -> Array:
        """The same with all channels that the network returns, for solver tables with a learned variance."""
        spec = self.spec
        steps = np.full(sample.shape[0], timestep, dtype=spec.timestep.dtype.numpy)
        feeds = {spec.sample.name: sample, spec.timestep.name: steps, **conditions}
        bound = self._check_feeds(feeds)
        self._check_constants(conditions)
        outputs = self._run(feeds)
        try:
            spec.check_outputs(outputs, bound)
        except InvalidInput as e:
            raise RunFailed(f"{e} The engine has a size baked in; export the model again.") from e
        return outputs[spec.outputs[0].name]

    def _check_feeds(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """Hold feeds against the spec; of what has the form of the last that fitted only the labels are looked at."""
        form = [(name, value.shape, value.dtype) for name, value in feeds.items()]
        if form != self._fitting[0]:
            self._fitting = form, self.spec.check_feeds(feeds)
        elif self.spec.num_classes is not None:
            check_labels(feeds["class_labels"], self.spec.num_classes, self.spec.null_class)
        return self._fitting[1]

    def check_loop(self, shape: tuple[int, ...], conditions: Mapping[str, Array]) -> None:
        """Hold a whole loop's feeds against the spec; raises InvalidInput as an evaluation would."""
        sample = np.broadcast_to(np.zeros((), self.spec.sample.dtype.numpy), shape)
        steps = np.zeros(shape[0], dtype=self.spec.timestep.dtype.numpy)
        self.spec.check_feeds({self.spec.sample.name: sample, self.spec.timestep.name: steps, **conditions})
        self._check_constants(conditions)

    def _check_constants(self, conditions: Mapping[str, Array]) -> None:
        for tensor in self.spec.conditions:
            if tensor.varies is not Varies.CONSTANT:
                continue
            known = self._constants.setdefault(tensor.name, np.array(conditions[tensor.name]))
            if not np.array_equal(known, conditions[tensor.name]):
                raise InvalidInput(
                    f"{self.spec.name}: input {tensor.name!r} is constant by the model's spec and has changed between "
                    "two evaluations; export the model with an input that varies with the prompt."
                )


def class_conditions(spec: ModelSpec, labels: npt.ArrayLike) -> dict[str, Array]:
    """The condition feeds of a class-conditional model; raises InvalidInput for a label it does not know."""
    others = [tensor.name for tensor in spec.conditions if tensor.name != "class_labels"]
    if spec.num_classes is None or others:
        raise InvalidInput(f"{spec.name} is not conditioned on a class alone; its conditions: {others or 'none'}.")
    array = np.asarray(labels, dtype=np.int64)
    bad = array[(array < 0) | (array >= spec.num_classes)]
    if bad.size:
        raise InvalidInput(f"class label {bad[0]} is out of range; {spec.name} knows 0 to {spec.num_classes - 1}.")
    return {"class_labels": array}


def null_conditions(spec: ModelSpec, batch: int) -> dict[str, Array]:
    """The conditions that mean "none", what guidance subtracts.

    Raises:
        InvalidInput: the model was not trained to be evaluated without its condition.
    """
    if spec.null_class is None:
        raise InvalidInput(
            f"{spec.name} has no 'no class' label, so classifier-free guidance cannot act; use --guidance-scale 1."
        )
    return {"class_labels": np.full(batch, spec.null_class, dtype=np.int64)}


def synthetic_conditions(spec: ModelSpec, batch: int, seed: int) -> dict[str, Array]:
    """Conditions for measuring where no real ones are known: classes in turn, unit normals, ones for masks and ids.

    Optional sizes take their defaults. The arrays depend on ``seed`` and the sample's index only.
    """
    sizes = spec.default_sizes(batch=batch)
    feeds: dict[str, Array] = {}
    for number, tensor in enumerate(spec.conditions):
        shape = tensor.sizes(sizes)
        if tensor.name == "class_labels" and spec.num_classes is not None:
            feeds[tensor.name] = (np.arange(batch) * 7 + seed) % spec.num_classes
        elif tensor.dtype in (DType.FLOAT32, DType.FLOAT16):
            rows = [standard_normal(seed, k, shape[1:], stream=1_000_000 + number) for k in range(shape[0])]
            feeds[tensor.name] = np.stack(rows).astype(tensor.dtype.numpy)
        else:
            feeds[tensor.name] = np.ones(shape, dtype=tensor.dtype.numpy)
    return feeds
