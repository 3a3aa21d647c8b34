"""Samples from a bundle: an engine, a sampler and its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser, class_conditions, null_conditions
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.guidance import (
    Evaluate,
    PerEvaluation,
    classifier_free,
    classifier_guided,
    distilled,
    embedded_scale,
    embedding_names,
    fed,
    guided,
)
from lehr.runtime.hoisted import Residency, load_denoiser
from lehr.runtime.loop import Network, Step, sample
from lehr.runtime.lora import Applied
from lehr.runtime.noise import START, batch_normal, standard_normal
from lehr.runtime.prediction import PredictionKind
from lehr.runtime.request import Request
from lehr.runtime.requested_table import requested_table
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.start import Known, fit_mask, fit_sample, keep_known, noised, show_known
from lehr.runtime.stored_tables import StoredTables

__all__ = ["OnProgress", "OnStep", "Pipeline", "Request", "open_denoiser"]

Array = npt.NDArray[Any]
OnStep = Callable[[int, Step], None]
OnProgress = Callable[[int, int], None]


def open_denoiser(
    path: str | Path,
    *,
    target: str = "cpu",
    recipe: str = "fp32",
    residency: Residency = Residency.AUTO,
    loras: Sequence[Applied] = (),
) -> Denoiser:
    """The network of a bundle, run by its engine for ``target`` and ``recipe``; ``residency`` says what stays loaded.

    Args:
        path: the bundle.
        target: class of machine.
        recipe: of the engine.
        residency: which graphs stay in memory.
        loras: merged into the weights as they are loaded; the engine on disk stays as it is.

    Raises:
        BundleError, IncompatibleEngine: no such engine, a damaged file, an engine of another machine, or one that
            cannot take LoRAs once it is built.
        InvalidInput: LoRAs of another model.
        MissingExtra: the engine library is not installed.
    """
    bundle = Bundle.open(path)
    return load_denoiser(bundle, engines.find(bundle, target, recipe), residency=residency, loras=loras)


class Pipeline:
    """A denoiser ready to draw. ``Pipeline.open("m.lehr")(Request(num=8, class_labels=[3]))``.

    Args:
        denoiser: the network.
        guide: a network of its own for what guidance subtracts, of the same path, prediction and sample.
        classifier: a network that returns the gradient of log p(y | x_t), for classifier guidance.
        tables: of the model's own scheduler, by number of steps; requests that name no sampler use them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        guide: Denoiser | None = None,
        classifier: Denoiser | None = None,
        tables: Mapping[int, SolverTable] | None = None,
    ) -> None:
        self.denoiser, self.guide, self.classifier = denoiser, guide, classifier
        self.tables: Mapping[int, SolverTable] = tables or {}
        self._opened: Callable[[Sequence[Applied]], Denoiser] | None = None
        spec = denoiser.spec
        for role, other in (("guide", guide), ("classifier", classifier)):
            if other is not None and (other.spec.path != spec.path or other.spec.sample.shape != spec.sample.shape):
                raise InvalidInput(
                    f"{role} {other.spec.name} has another path or sample than {spec.name}: {other.spec.path} and "
                    f"{other.spec.sample.shape} for {spec.path} and {spec.sample.shape}."
                )
        if guide is not None and guide.spec.prediction != spec.prediction:
            raise InvalidInput(
                f"guide {guide.spec.name} predicts {guide.spec.prediction.kind.value}, "
                f"{spec.name} {spec.prediction.kind.value}; they must predict the same."
            )
        if classifier is not None and classifier.spec.prediction.kind is not PredictionKind.SCORE:
            raise InvalidInput(
                f"classifier {classifier.spec.name} predicts {classifier.spec.prediction.kind.value}; a classifier's "
                "gradient is a score. Export it with lehr.export.classifier_gradient."
            )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        target: str = "cpu",
        recipe: str = "fp32",
        residency: Residency = Residency.AUTO,
        loras: Sequence[Applied] = (),
    ) -> Pipeline:
        """Load the engine of ``target`` and ``recipe`` from a bundle; raises what :func:`open_denoiser` does."""

        def opened(loras: Sequence[Applied]) -> Denoiser:
            return open_denoiser(path, target=target, recipe=recipe, residency=residency, loras=loras)

        pipeline = cls(opened(loras), tables=StoredTables(Bundle.open(path)))
        pipeline._opened = opened
        return pipeline

    def use_loras(self, loras: Sequence[Applied] = ()) -> None:
        """Exchange the LoRAs in the weights; without any, the weights are the model's own again, bit for bit.

        Raises what :meth:`open` does, and InvalidInput for a pipeline that was not opened from a bundle.
        """
        if self._opened is None:
            raise InvalidInput("this pipeline was made of a denoiser; open it from its bundle to exchange LoRAs.")
        self.denoiser = self._opened(loras)

    def table(self, request: Request) -> SolverTable:
        """The solver table a request asks for; InvalidInput for one that does not fit the model."""
        return requested_table(request, self.denoiser.spec, self.tables)

    def __call__(
        self,
        request: Request,
        *,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        per_evaluation: PerEvaluation | None = None,
    ) -> Array:
        """Draw samples.

        Args:
            request: what to draw.
            on_step: called with the batch's first sample number after every evaluation; raise there to cancel. It
                sees every latent, so on a GPU the loop comes back to the host for it.
            on_progress: called with the batch's first sample number and the evaluation's, which on a GPU is then
                queued and not yet done; raise there to cancel.
            per_evaluation: makes further inputs of the network at every evaluation, such as a ControlNet's residuals;
                see :func:`lehr.runtime.guidance.fed`. The loop then stands on the host.

        Returns:
            (N, C, H, W) float32 in the model's value range.

        Raises:
            InvalidInput: a request the model cannot meet.
            RunFailed: the engine failed, or drew values that are not finite.
        """
        spec, table, num = self.denoiser.spec, self.table(request), request.count
        for name, size in request.sizes.items():
            spec.dim(name).check(size, "the sample")
        shape = spec.sample_shape(num, **request.sizes)
        given = {
            "init": None if request.init is None else fit_sample(request.init, shape, "the sample to start from"),
            "mask": None if request.mask is None else fit_mask(request.mask, shape),
            "noisy": None if request.noisy is None else fit_sample(request.noisy, shape, "the noisy sample"),
        }
        conditions = self._conditions(request, num)
        self._prepare(request, table, shape[1:], conditions)
        drawn = []
        for first in range(0, num, request.batch):
            numbers = range(first, min(first + request.batch, num))
            rows = slice(numbers.start, numbers.stop)
            part = self._rows(conditions, rows)
            starts = {name: None if value is None else value[rows] for name, value in given.items()}
            drawn.append(self._draw(request, table, numbers, part, starts, on_step, on_progress, per_evaluation))
        samples: Array = np.concatenate(drawn)
        broken = [int(k) for k in np.flatnonzero(~np.isfinite(samples).all(axis=tuple(range(1, samples.ndim))))]
        if broken:
            raise RunFailed(
                f"sample {broken[0]} ({len(broken)} of {num}) is not finite; the recipe overflows on this model. "
                "Check it with lehr verify, or use recipe fp32."
            )
        return samples

    # --------------------------------------------------------------------------------------------- one batch

    def _draw(
        self,
        request: Request,
        table: SolverTable,
        numbers: range,
        conditions: Mapping[str, Array],
        starts: Mapping[str, Array | None],
        on_step: OnStep | None,
        on_progress: OnProgress | None,
        per_evaluation: PerEvaluation | None,
    ) -> Array:
        """The samples ``numbers``; ``starts`` holds their rows of init, mask and noisy."""
        shape = self.denoiser.spec.sample_shape(1, **request.sizes)[1:]

        def noise(stream: int) -> Array:
            if request.seeds:
                return np.stack([standard_normal(request.seeds[k], 0, shape, stream=stream) for k in numbers])
            return batch_normal(request.seed, numbers, shape, stream=stream)

        def report(step: Step) -> None:
            if on_step is not None:
                on_step(numbers.start, step)
            passed(step.index)

        def passed(evaluation: int) -> None:
            if on_progress is not None:
                on_progress(numbers.start, evaluation)

        def injected(j: int) -> Array:
            return noise(1 + request.first_noise + j)

        init, mask, noisy = starts["init"], starts["mask"], starts["noisy"]
        network = self._network(request, table, conditions, numbers, per_evaluation)
        from_noise = request.known is Known.INPUT and mask is not None and request.share == 1.0
        if noisy is not None:
            x_T = np.array(noisy)
        elif init is not None and not from_noise:
            x_T = noised(table, init, noise(START))
        else:
            x_T = noise(START)
            x_T *= np.float32(table.init_noise_sigma)
        if init is not None and mask is not None:
            if request.known is Known.INPUT:
                network = show_known(network, table, init, mask, noise(START))
            else:
                network = keep_known(network, table, init, mask)
        elif (
            on_step is None
            and per_evaluation is None
            and (resident := self.denoiser.resident) is not None
            and resident.runs(table)
        ):
            linear = self._linear_guidance(request, table, conditions, numbers)
            if linear is not None:
                self.denoiser.check_loop(x_T.shape, linear[0])
                return resident.draw(table, x_T, *linear, injected=injected, on_queued=passed)
        with self.denoiser.loop(table.timesteps), (self.guide or self.denoiser).loop(table.timesteps):
            final = sample(
                network,
                table,
                x_T,
                injected=injected,
                on_step=None if on_step is None and on_progress is None else report,
            )
        # The loop leaves the known region within rounding; it is given, so it is given back exactly.
        return final if init is None or mask is None else np.where(mask == 0, init, final)

    def _prepare(
        self, request: Request, table: SolverTable, sizes: tuple[int, ...], conditions: Mapping[str, Array]
    ) -> None:
        """Let the networks compute what all batches will need before the first of them runs."""
        spec, guidance = self.denoiser.spec, request.guidance
        scale = spec.sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale
        without: dict[str, Array] = {}
        if request.unconditional:
            without = {**conditions, **request.unconditional}
        elif spec.null_class is not None and self.guide is None and (scale != 1.0 or guidance.schedule):
            without = null_conditions(spec, 1)
        self.denoiser.prepare(table.timesteps, sizes, [conditions, without])
        if self.guide is not None:
            self.guide.prepare(table.timesteps, sizes, [{**conditions, **request.unconditional}])

    def _conditions(self, request: Request, num: int) -> dict[str, Array]:
        spec = self.denoiser.spec
        if spec.num_classes is None or request.conditions:
            if request.class_labels and self.classifier is None:
                raise InvalidInput(f"{spec.name} is not class-conditional; leave --class-label out.")
            self._check_rows(request.conditions, num)
            self._check_rows(request.unconditional, num)
            return dict(request.conditions)
        return class_conditions(spec, _labels(request, spec.num_classes, range(num)))

    def _check_rows(self, conditions: Mapping[str, Array], num: int) -> None:
        for name in self._batched & set(conditions):
            if len(conditions[name]) != num:
                raise InvalidInput(f"condition {name!r} holds {len(conditions[name])} samples, expected {num}.")

    def _rows(self, conditions: Mapping[str, Array], rows: slice) -> dict[str, Array]:
        """Those of some samples; what all samples share stays whole."""
        return {name: value[rows] if name in self._batched else value for name, value in conditions.items()}

    @property
    def _batched(self) -> set[str]:
        shared = {tensor.name for tensor in self.denoiser.spec.conditions if tensor.shape[:1] != ("batch",)}
        return {tensor.name for tensor in self.denoiser.spec.conditions} - shared

    # --------------------------------------------------------------------------------------------- guidance

    def _network(
        self,
        request: Request,
        table: SolverTable,
        conditions: Mapping[str, Array],
        numbers: range,
        per_evaluation: PerEvaluation | None,
    ) -> Network:
        network = self._guided(request, table, conditions, numbers, per_evaluation)
        if self.classifier is None:
            return network
        classes = self.classifier.spec.num_classes
        if classes is None:
            raise InvalidInput(f"{self.classifier.spec.name} takes no class label, so it cannot guide to a class.")
        labels = class_conditions(self.classifier.spec, _labels(request, classes, numbers))
        return classifier_guided(network, self.classifier, labels, table, request.classifier_scale)

    def _guided(
        self,
        request: Request,
        table: SolverTable,
        conditions: Mapping[str, Array],
        numbers: range,
        per_evaluation: PerEvaluation | None,
    ) -> Network:
        spec, guidance, batch = self.denoiser.spec, request.guidance, len(numbers)
        given = self._rows(request.unconditional, slice(numbers.start, numbers.stop))
        evaluate: Evaluate = self.denoiser if table.variance is None else self.denoiser.with_variance
        if per_evaluation is not None:
            evaluate = fed(evaluate, per_evaluation, numbers)
        default = spec.sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale
        embedded = [name for name in embedding_names(spec) if name not in conditions]
        if embedded and self.guide is None:
            return distilled(evaluate, conditions, spec, table, guidance, batch=batch, default_scale=default)
        plain = not (guidance.acts_on_denoised or guidance.schedule or guidance.interval or self.guide)
        scale = default if guidance.scale is None else guidance.scale
        if scale == 1.0 and not guidance.schedule:
            if not plain:
                raise InvalidInput(
                    f"guidance of scale 1 is none, so its other settings cannot act on {spec.name}; "
                    "give another scale (--guidance-scale) or leave them out."
                )
            return classifier_free(evaluate, conditions, {}, 1.0)
        if self.guide is not None:
            without = self._guide_conditions(self.guide, {**conditions, **given})
            return guided(
                evaluate, conditions, without, table, guidance, default_scale=default, guide=self.guide.with_variance
            )
        unconditional = self._unconditional(request, conditions, numbers)
        if plain:
            return classifier_free(evaluate, conditions, unconditional, scale)
        return guided(evaluate, conditions, unconditional, table, guidance, default_scale=default)

    def _unconditional(self, request: Request, conditions: Mapping[str, Array], numbers: range) -> Mapping[str, Array]:
        """Conditions of these samples that mean "none"."""
        if not self.denoiser.spec.conditions:
            return {}
        given = self._rows(request.unconditional, slice(numbers.start, numbers.stop))
        same = {name: value for name, value in conditions.items() if name in self._batched}
        return {**same, **given} if given else null_conditions(self.denoiser.spec, len(numbers))

    def _linear_guidance(
        self, request: Request, table: SolverTable, conditions: Mapping[str, Array], numbers: range
    ) -> tuple[Mapping[str, Array], Mapping[str, Array] | None, Array | None] | None:
        """Conditions, those that mean "none", and the scale of each evaluation, where guidance is no more than that.

        None where it is not linear in the network's outputs, asks another network, or changes a condition on the way:
        then the loop stands on the host.
        """
        spec, guidance = self.denoiser.spec, request.guidance
        if self.classifier is not None or self.guide is not None or guidance.acts_on_denoised:
            return None
        default = spec.sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale
        scales = guidance.scales(table, default)
        if [name for name in embedding_names(spec) if name not in conditions]:
            if len(np.unique(scales)) > 1:
                return None
            return {**conditions, **embedded_scale(spec, float(scales[0]), len(numbers))}, None, None
        if np.all(scales == 1.0):
            return conditions, None, None
        return conditions, self._unconditional(request, conditions, numbers), scales

    @staticmethod
    def _guide_conditions(guide: Denoiser, known: Mapping[str, Array]) -> dict[str, Array]:
        """What the guide is fed of the unconditional inputs and, where those lack a name, of the conditions."""
        names = [tensor.name for tensor in guide.spec.conditions]
        missing = [name for name in names if name not in known]
        if missing:
            raise InvalidInput(f"guide {guide.spec.name} needs conditions {missing}, which the request does not hold.")
        return {name: known[name] for name in names}


def _labels(request: Request, classes: int, numbers: range) -> list[int]:
    labels = list(request.class_labels) or list(range(classes))
    return [labels[k % len(labels)] for k in numbers]
