"""The range audit: how large every tensor of the step graph becomes along real trajectories, by timestep.

The portable float32 graph runs in ONNX Runtime inside the pipeline itself, guidance included, so the tensors are
those that an engine will see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.collected import BATCH
from lehr.calibration.probe import PEAK, RMS, Probe, instrument
from lehr.calibration.trajectories import calibration_request
from lehr.engines.portable import portable_denoiser, portable_session
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.hoisted import STEP
from lehr.runtime.loop import Step
from lehr.runtime.pipeline import Pipeline
from lehr.runtime.stored_tables import StoredTables

Array = npt.NDArray[Any]
OnStep = Callable[[int, int], None]

BUCKETS = 10  # of timesteps; steps of one bucket are judged together


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """What was measured.

    Attributes:
        probes: the tensors, in the order of the graph (T).
        timesteps: (K, 2) float64, the first and last timestep of each bucket in the order of the loop.
        peak: (T, K) float32, the largest magnitude.
        rms: (T, K) float32, root mean square over all evaluations of the bucket.
        weights: weight -> its largest magnitude.
        conditions: "class labels", "golden" (those recorded at export), "synthetic" or "none".
        sampler, evaluations, samples: of the trajectories.
    """

    probes: tuple[Probe, ...]
    timesteps: Array
    peak: Array
    rms: Array
    weights: Mapping[str, float]
    conditions: str
    sampler: str
    evaluations: int
    samples: int


def measure(
    bundle: Bundle, *, steps: int | None = None, num: int | None = None, threads: int = 0, on_step: OnStep | None = None
) -> Ranges:
    """Draw samples with the portable graph and measure every floating-point tensor on the way.

    Args:
        bundle: holds weights.
        steps: of the sampler; by default the model's own.
        num: samples; by default one a class up to 10, else 2.
        threads: of ONNX Runtime; 0 is one a core.
        on_step: told how many of all evaluations are done.

    Raises:
        BundleError: structure only, or damaged files.
        RunFailed: ONNX Runtime fails, or the float32 graph itself is not finite.
    """
    spec, entry = bundle.manifest.model, bundle.manifest.graphs[STEP]
    if entry.weights is None:
        raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only.")
    num = num or min(spec.num_classes or 2, 10)
    request, conditions = calibration_request(bundle, steps=steps, num=num, seed=0)
    graph = bundle.path(entry.file)
    bundle.path(entry.weights)
    model, probes = instrument(ir.load(graph))
    weights = weight_peaks(model)
    observed = _Observed(ir.to_proto(model).SerializeToString(), graph.parent, threads)

    denoiser = portable_denoiser(bundle, lambda: observed, threads=threads)
    pipeline = Pipeline(denoiser, tables=StoredTables(bundle))
    table = pipeline.table(request)
    bucket = buckets(table.timesteps)
    peak = np.zeros((len(probes), max(bucket.values()) + 1), np.float32)
    square, count = np.zeros(peak.shape), np.zeros(peak.shape[1])
    total, done = len(table) * -(-request.count // BATCH), 0

    def record(_: int, step: Step) -> None:
        nonlocal done
        k = bucket[step.timestep]
        for peaks, roots in observed.taken():
            bad = np.flatnonzero(~np.isfinite(peaks) | ~np.isfinite(roots))
            if bad.size:
                raise RunFailed(
                    f"tensor {probes[bad[0]].tensor!r} is not finite in float32 at timestep {step.timestep:g}; "
                    "the weights or the inputs are wrong. Check the model with lehr verify."
                )
            np.maximum(peak[:, k], peaks, out=peak[:, k])
            square[:, k] += roots.astype(np.float64) ** 2
            count[k] += 1
        done += 1
        if on_step is not None:
            on_step(done, total)

    pipeline(request, on_step=record)
    members = [[t for t in dict.fromkeys(table.timesteps.tolist()) if bucket[t] == k] for k in range(len(count))]
    return Ranges(
        probes=tuple(probes),
        timesteps=np.array([(ts[0], ts[-1]) for ts in members], np.float64),
        peak=peak,
        rms=np.sqrt(square / count).astype(np.float32),
        weights=weights,
        conditions=conditions,
        sampler=table.sampler,
        evaluations=len(table),
        samples=request.count,
    )


def buckets(timesteps: Array) -> dict[float, int]:
    """Timestep -> bucket, equally many different timesteps in each, in the order in which they first come."""
    different = list(dict.fromkeys(timesteps.tolist()))
    parts = np.array_split(np.arange(len(different)), min(BUCKETS, len(different)))
    return {different[i]: k for k, part in enumerate(parts) for i in part.tolist()}


def weight_peaks(model: ir.Model) -> dict[str, float]:
    """Weight -> its largest magnitude; one is in memory at a time."""
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.is_floating_point() and tensor.size:
            found[name] = float(np.abs(tensor.numpy()).max())
    return found


class _Observed:
    """The instrumented step graph as a session: returns what the step graph does, and keeps what was measured."""

    def __init__(self, graph: bytes, weights: Path, threads: int) -> None:
        self._session = portable_session(graph, weights, threads=threads)
        self._taken: list[tuple[Array, Array]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        self._taken.append((outputs.pop(PEAK), outputs.pop(RMS)))
        return outputs

    def taken(self) -> list[tuple[Array, Array]]:
        """What was measured since this was last asked."""
        taken, self._taken = self._taken, []
        return taken
