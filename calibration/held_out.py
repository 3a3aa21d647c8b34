"""What a step graph costs in final samples: the real loop on held-out seeds, beside float32 on the same noise.

Held-out seeds lie below :data:`lehr.calibration.trajectories.CALIBRATION_SEEDS`, where those of calibration begin, so
the two never meet. There are two folds of them. A search chooses on one, and what it chose is confirmed on the other,
which had no part in the choice: the best of many candidates on the seeds that it was chosen by is better there than
elsewhere.

The conditioning is computed once for all candidates (:mod:`lehr.runtime.hoisted`), batches of samples run together,
and a measurement ends early where a budget is met or missed beyond doubt. Results are kept under the content of the
graph, its weights and the settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.budget import Budget, Losses
from lehr.calibration.execute import OrtGraph, Session, Written, hoisted_sessions
from lehr.calibration.tracks import SCORED, Track, evaluation_errors, evaluation_losses, record
from lehr.engines.feature_network import ImageNetwork
from lehr.runtime import golden
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser, synthetic_conditions
from lehr.runtime.distribution import frechet_distance
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.hoisted import STEP, HoistedNetwork, Residency
from lehr.runtime.parity import WORST, compare
from lehr.runtime.pipeline import OnStep, Pipeline, Request
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.stored_tables import StoredTables

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

MAX_SEED, MAX_NUM = 1 << 16, 1 << 14
STEPS = 20
NUM = 64
BATCH = 16


class Fold(Enum):
    """Which held-out seeds: what candidates are chosen by, and what the choice is confirmed on."""

    SELECT = 0
    CONFIRM = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How final samples are drawn.

    Attributes:
        num: samples; classes in turn.
        steps: of the sampler.
        seed: chooses other held-out seeds.
        fold: which of them.
        batch: samples at once.
        threads: of the engine library; 0 is one a core.
    """

    num: int = NUM
    steps: int = STEPS
    seed: int = 0
    fold: Fold = Fold.SELECT
    batch: int = BATCH
    threads: int = 0

    def __post_init__(self) -> None:
        if min(self.num, self.steps, self.batch) < 1 or self.threads < 0:
            raise InvalidInput(
                f"samples, steps and batch must be at least 1 and threads at least 0, got {self.num}, {self.steps}, "
                f"{self.batch} and {self.threads}."
            )
        if not 0 <= self.seed < MAX_SEED or self.num > MAX_NUM:
            raise InvalidInput(
                f"held-out samples take a seed from 0 to {MAX_SEED - 1} and at most {MAX_NUM} samples, got "
                f"{self.seed} and {self.num}."
            )

    def seeds(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Of the samples ``numbers``."""
        return tuple((self.fold.value * MAX_SEED + self.seed) * MAX_NUM + number for number in numbers)


# --------------------------------------------------------------------------------------------------- held out


class HeldOut:
    """Measures step graphs of a bundle against its float32 step graph.

    Args:
        bundle: holds weights.
        settings: how samples are drawn.
        cache: a folder for results, made when the first is kept; None keeps them for the life of this object only.
        reference: what stands for float32; by default the bundle's portable step graph on ONNX Runtime.
        features: network in whose features sets of samples are compared; None to measure no such distance.

    Raises:
        BundleError: structure only, or damaged files.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings | None = None,
        *,
        cache: Path | None = None,
        reference: Session | None = None,
        features: ImageNetwork | None = None,
    ) -> None:
        self._features = features
        self.bundle, self.settings, self._cache = bundle, settings or Settings(), cache
        self.spec = bundle.manifest.model
        self._current: Session = reference or OrtGraph.of_bundle(bundle, threads=self.settings.threads)
        self.reference = self._current
        self._hoisted = self._network()
        self.timestep = float("nan")  # of the evaluation at hand
        self._pipeline = Pipeline(Denoiser(self.spec, self._run, hoisted=self._hoisted), tables=StoredTables(bundle))
        self.output = bundle.manifest.graphs[STEP].signature.outputs[0].name
        self._drawn: dict[int, Array] = {}
        self._track: Track | None = None
        self._finite = True
        self._known: dict[str, Losses] = {}
        self._conditions, self.conditions = _conditions(bundle)

    # ------------------------------------------------------------------------------------------------ measuring

    def measure(
        self,
        graph: ir.Model | Session,
        *,
        budget: Budget | None = None,
        scored: bool | None = None,
        on_batch: Progress | None = None,
    ) -> Losses:
        """Final samples of a step graph beside the reference's.

        Args:
            graph: a step graph with the signature of the bundle's own, or a session that runs one (which is not
                cached, since what it computes is not known).
            budget: ends the measurement once this is met or missed beyond doubt.
            scored: also compare single evaluations; by default where the budget is on them.
            on_batch: told how many of all samples are drawn.

        Raises:
            InvalidInput: a graph with another signature.
            RunFailed: the engine library refuses the graph.
        """
        scored = (budget is not None and budget.measure.on_evaluations) if scored is None else scored
        written = Written.of(graph) if isinstance(graph, ir.Model) else None
        key = None if written is None else self._key(written)
        if key is not None:
            known = self._recall(key)
            if known is not None and (not scored or known.sqnr_db) and self._enough(known, budget):
                return known
        session = (
            graph if not isinstance(graph, ir.Model) else OrtGraph(written or graph, threads=self.settings.threads)
        )
        losses = evaluation_losses(evaluation_errors(self, self.track, session)) if scored else Losses()
        drawn: list[Array] = []
        for numbers in self._batches():
            more, final = self._losses(session, numbers)
            losses = losses.extended(more)
            drawn.append(final)
            if on_batch is not None:
                on_batch(losses.samples, self.settings.num)
            if budget is not None and budget.decided(losses):
                break
        if self._features is not None and losses.samples == self.settings.num:
            losses = replace(losses, fid=self._distance(self._features, np.concatenate(drawn)))
        if key is not None:
            self._keep(key, losses)
        return losses

    def _distance(self, features: ImageNetwork, final: Array) -> float:
        """Fréchet distance of all samples to the reference's; the largest one where some are not finite."""
        if not np.isfinite(final).all():
            return WORST
        expected = np.stack([self._drawn[number] for number in range(len(final))])
        first, second = (features(samples, self.spec.value_range).vectors for samples in (final, expected))
        return max(0.0, frechet_distance(first, second))

    @property
    def track(self) -> Track:
        """The reference loop of the first samples, call by call."""
        if self._track is None:
            self._track = record(self, min(SCORED, self.settings.batch, self.settings.num))
        return self._track

    @property
    def table(self) -> SolverTable:
        """The sampler."""
        return self._pipeline.table(self._request(range(1)))

    # ------------------------------------------------------------------------------------------------ drawing

    def _losses(self, session: Session, numbers: Sequence[int]) -> tuple[Losses, Array]:
        missing = [number for number in numbers if number not in self._drawn]
        if missing:
            self._drawn.update(zip(missing, self.draw(self.reference, missing), strict=True))
        reference = np.stack([self._drawn[number] for number in numbers])
        try:
            final = self.draw(session, numbers)
        except RunFailed:
            if self._finite:
                raise
            final = np.full_like(reference, np.nan)
        pairs = zip(reference, final, strict=True)
        parities = [compare(ref[None], got[None], self.spec.value_range) for ref, got in pairs]
        losses = Losses(
            psnr_db=tuple(p.psnr_db for p in parities),
            snr_db=tuple(p.snr_db for p in parities),
            ssim=tuple(p.ssim for p in parities),
            cosine=tuple(p.cosine for p in parities),
        )
        return losses, final

    def draw(self, session: Session, numbers: Sequence[int], on_step: OnStep | None = None) -> Array:
        """(N, C, H, W) final samples ``numbers`` of a step graph."""
        self._current, self._finite = session, True
        try:
            return self._pipeline(self._request(numbers), on_step=on_step)
        finally:
            self._current = self.reference

    def _request(self, numbers: Sequence[int]) -> Request:
        seeds, classes = self.settings.seeds(numbers), self.spec.num_classes
        steps, batch = self.settings.steps, self.settings.batch
        if self._conditions is None:
            labels = [number % classes for number in numbers] if classes is not None else []
            return Request(num=len(seeds), seeds=seeds, class_labels=labels, num_inference_steps=steps, batch=batch)
        conditions = {
            tensor.name: np.stack([self._conditions[tensor.name][n % _rows(self._conditions)] for n in numbers])
            if tensor.batched
            else self._conditions[tensor.name]
            for tensor in self.spec.conditions
        }
        return Request(
            num=len(seeds),
            seeds=seeds,
            conditions=conditions,
            num_inference_steps=steps,
            batch=batch,
            guidance_scale=1.0,
        )

    def _batches(self) -> Iterator[range]:
        for first in range(0, self.settings.num, self.settings.batch):
            yield range(first, min(first + self.settings.batch, self.settings.num))

    # ------------------------------------------------------------------------------------------------ networks

    def _network(self) -> HoistedNetwork | None:
        """The hoisted graphs, which serve every candidate; None for a bundle that was not cut."""
        signatures = {name: graph.signature for name, graph in self.bundle.manifest.graphs.items() if name != "loop"}
        if set(signatures) == {STEP}:
            return None
        load = hoisted_sessions(self.bundle, self._current_run, threads=self.settings.threads)
        return HoistedNetwork(self.spec, signatures, load, residency=Residency.ALL)

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """What the denoiser calls, with all of its inputs."""
        self.timestep = float(feeds[self.spec.timestep.name][0])
        return self._current_run(feeds) if self._hoisted is None else self._hoisted(feeds)

    def _current_run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._current.run(feeds)
        self._finite = self._finite and all(np.isfinite(value).all() for value in outputs.values())
        return outputs

    # ------------------------------------------------------------------------------------------------ results

    def _enough(self, losses: Losses, budget: Budget | None) -> bool:
        return losses.samples == self.settings.num or (budget is not None and budget.decided(losses))

    def _key(self, graph: Written) -> str:
        settings = self.settings
        about = {
            "sources": [
                self.bundle.manifest.files[name].sha256
                for graph in self.bundle.manifest.graphs.values()
                for name in (graph.file, graph.weights)
                if name is not None
            ],
            "sampler": self.table.sampler,
            "settings": [settings.num, settings.steps, settings.seed, settings.fold.value, settings.batch],
        } | ({} if self._features is None else {"features": self._features.sha256})
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(graph.digest())
        return digest.hexdigest()

    def _recall(self, key: str) -> Losses | None:
        if key not in self._known and self._cache is not None and (self._cache / f"{key}.json").is_file():
            self._known[key] = Losses.from_json(json.loads((self._cache / f"{key}.json").read_text(encoding="utf-8")))
        return self._known.get(key)

    def _keep(self, key: str, losses: Losses) -> None:
        self._known[key] = losses
        if self._cache is not None:
            self._cache.mkdir(parents=True, exist_ok=True)
            partial = self._cache / f".{key}.{os.getpid()}"
            partial.write_text(json.dumps(losses.to_json()), encoding="utf-8")
            partial.replace(self._cache / f"{key}.json")


def _rows(conditions: Mapping[str, Array]) -> int:
    return max(len(value) for value in conditions.values())


def _conditions(bundle: Bundle) -> tuple[dict[str, Array] | None, str]:
    """Conditions for models that take more than a class, and where they come from."""
    spec = bundle.manifest.model
    names = [tensor.name for tensor in spec.conditions]
    if not names or names == ["class_labels"]:
        return None, "class labels" if names else "none"
    recorded = golden.read(bundle).steps.conditions if golden.INDEX_FILE in bundle.manifest.files else {}
    if recorded:
        return dict(recorded), "golden"
    return synthetic_conditions(spec, NUM, seed=1), "synthetic"
