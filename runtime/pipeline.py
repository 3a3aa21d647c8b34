"""Samples from a bundle: an engine, a sampler and its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser, class_conditions, null_conditions
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.guidance import classifier_free
from lehr.runtime.loop import Step, sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import default_sampler, solver_table
from lehr.runtime.spec import BATCH

Array = npt.NDArray[Any]
OnStep = Callable[[int, Step], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to draw. None stands for the model's own default.

    Attributes:
        num: how many samples; by default one a label, or one.
        seed: with the sample's number it determines the noise, whatever the batch.
        class_labels: used in turn; by default all classes in turn.
        conditions: for models with other conditions than a class: name -> (num, …).
        unconditional: what guidance subtracts, for such models.
        table: a solver table; overrides sampler, steps and eta.
        batch: how many samples run at once.
        sizes: dimensions other than the batch, such as height and width.
    """

    num: int | None = None
    seed: int = 0
    sampler: str | None = None
    num_inference_steps: int | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    class_labels: Sequence[int] = ()
    conditions: Mapping[str, Array] = field(default_factory=dict)
    unconditional: Mapping[str, Array] = field(default_factory=dict)
    table: SolverTable | None = None
    batch: int = 16
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num is not None and self.num < 1:
            raise InvalidInput(f"the number of samples must be at least 1, got {self.num}.")
        if not 1 <= self.batch <= BATCH.max // 2:
            raise InvalidInput(f"the batch must be 1 to {BATCH.max // 2} (guidance doubles it), got {self.batch}.")


class Pipeline:
    """A denoiser ready to draw. ``Pipeline.open("m.lehr")(Request(num=8, class_labels=[3]))``."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    @classmethod
    def open(cls, path: str | Path, *, target: str = "cpu", recipe: str = "fp32") -> Pipeline:
        """Load the engine of ``target`` and ``recipe`` from a bundle.

        Raises:
            BundleError, IncompatibleEngine: no such engine, a damaged file, or an engine of another machine.
            MissingExtra: the engine library is not installed.
        """
        bundle = Bundle.open(path)
        session = engines.load(bundle, engines.find(bundle, target, recipe))
        return cls(Denoiser(bundle.manifest.model, session.run))

    def table(self, request: Request) -> SolverTable:
        """The solver table a request asks for; InvalidInput for one that does not fit the model."""
        spec = self.denoiser.spec
        if request.table is not None:
            if request.table.prediction != spec.prediction:
                raise InvalidInput(
                    f"the solver table is for {request.table.prediction.kind.value} models, "
                    f"{spec.name} predicts {spec.prediction.kind.value}."
                )
            return request.table
        name = request.sampler or spec.sampling.sampler or default_sampler(spec.path)
        steps = (
            spec.sampling.num_inference_steps if request.num_inference_steps is None else request.num_inference_steps
        )
        return solver_table(name, spec.path, spec.prediction, steps, eta=request.eta)

    def __call__(self, request: Request, *, on_step: OnStep | None = None) -> Array:
        """Draw samples.

        Args:
            request: what to draw.
            on_step: called with the batch's first sample number after every evaluation; raise there to cancel.

        Returns:
            (N, C, H, W) float32 in the model's value range.

        Raises:
            InvalidInput: a request the model cannot meet.
            RunFailed: the engine failed, or drew values that are not finite.
        """
        spec, table = self.denoiser.spec, self.table(request)
        for name, size in request.sizes.items():
            spec.dim(name).check(size, "the sample")
        num = request.num or max(1, len(request.class_labels))
        conditions = self._conditions(request, num)
        drawn = []
        for first in range(0, num, request.batch):
            numbers = range(first, min(first + request.batch, num))
            part = {name: value[numbers.start : numbers.stop] for name, value in conditions.items()}
            drawn.append(self._draw(request, table, numbers, part, on_step))
        samples: Array = np.concatenate(drawn)
        broken = [int(k) for k in np.flatnonzero(~np.isfinite(samples).all(axis=tuple(range(1, samples.ndim))))]
        if broken:
            raise RunFailed(
                f"sample {broken[0]} ({len(broken)} of {num}) is not finite; the recipe overflows on this model. "
                "Check it with lehr verify, or use recipe fp32."
            )
        return samples

    def _draw(
        self,
        request: Request,
        table: SolverTable,
        numbers: range,
        conditions: Mapping[str, Array],
        on_step: OnStep | None,
    ) -> Array:
        """One batch: the samples ``numbers``."""
        shape = self.denoiser.spec.sample_shape(1, **request.sizes)[1:]
        x_T = batch_normal(request.seed, numbers, shape)
        x_T *= np.float32(table.init_noise_sigma)

        def injected(j: int) -> Array:
            return batch_normal(request.seed, numbers, shape, stream=1 + j)

        def report(step: Step) -> None:
            if on_step is not None:
                on_step(numbers.start, step)

        network = self._network(request, conditions, len(numbers))
        return sample(network, table, x_T, injected=injected, on_step=None if on_step is None else report)

    def _conditions(self, request: Request, num: int) -> dict[str, Array]:
        spec = self.denoiser.spec
        if spec.num_classes is None or request.conditions:
            if request.class_labels:
                raise InvalidInput(f"{spec.name} is not class-conditional; leave --class-label out.")
            for name, value in request.conditions.items():
                if len(value) != num:
                    raise InvalidInput(f"condition {name!r} holds {len(value)} samples, expected {num}.")
            return dict(request.conditions)
        labels = list(request.class_labels) or list(range(spec.num_classes))
        return class_conditions(spec, [labels[k % len(labels)] for k in range(num)])

    def _network(
        self, request: Request, conditions: Mapping[str, Array], batch: int
    ) -> Callable[[Array, float], Array]:
        spec = self.denoiser.spec
        scale = request.guidance_scale
        if scale is None:
            scale = spec.sampling.guidance_scale
        unconditional: Mapping[str, Array] = {}
        if scale != 1.0 and spec.conditions:
            unconditional = request.unconditional or null_conditions(spec, batch)
        return classifier_free(self.denoiser, conditions, unconditional, scale)
