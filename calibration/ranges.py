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
import onnxruntime as ort

from lehr.calibration.probe import PEAK, RMS, Probe, instrument
from lehr.runtime import golden
from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.errors import BundleError, InvalidInput, RunFailed
from lehr.runtime.hoisted import STEP, hoisted_denoiser
from lehr.runtime.loop import Step
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.stored_tables import StoredTables

Array = npt.NDArray[Any]
OnStep = Callable[[int, int], None]

BUCKETS = 10  # of timesteps; steps of one bucket are judged together
BATCH = 4  # samples at once: ranges need no more memory than drawing does


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
    request, conditions = _request(bundle, steps, num)
    graph = bundle.path(entry.file)
    bundle.path(entry.weights)
    model, probes = instrument(ir.load(graph))
    weights = _weight_peaks(model)
    observed = _Observed(ir.to_proto(model).SerializeToString(), graph.parent, threads)

    def load(name: str) -> Any:
        if name == STEP:
            return observed
        other = bundle.manifest.graphs[name]
        for file in (other.file, other.weights):
            if file:
                bundle.path(file)
        return OnnxRuntimeSession(_session(str(bundle.path(other.file)), graph.parent, threads))

    signatures = {name: part.signature for name, part in bundle.manifest.graphs.items()}
    pipeline = Pipeline(hoisted_denoiser(spec, signatures, load), tables=StoredTables(bundle))
    table = pipeline.table(request)
    bucket = _buckets(table.timesteps)
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


def _buckets(timesteps: Array) -> dict[float, int]:
    """Timestep -> bucket, equally many different timesteps in each, in the order in which they first come."""
    different = list(dict.fromkeys(timesteps.tolist()))
    parts = np.array_split(np.arange(len(different)), min(BUCKETS, len(different)))
    return {different[i]: k for k, part in enumerate(parts) for i in part.tolist()}


def _request(bundle: Bundle, steps: int | None, num: int | None) -> tuple[Request, str]:
    """What to draw, and where its conditions come from."""
    spec = bundle.manifest.model
    num = num or min(spec.num_classes or 2, 10)
    names = [tensor.name for tensor in spec.conditions]
    if not names or names == ["class_labels"]:
        return Request(num=num, num_inference_steps=steps, batch=BATCH), "class labels" if names else "none"
    recorded = golden.read(bundle).steps.conditions if golden.INDEX_FILE in bundle.manifest.files else {}
    source = "golden" if recorded else "synthetic"
    found = recorded or synthetic_conditions(spec, num, seed=0)
    conditions = {
        tensor.name: np.resize(found[tensor.name], (num, *found[tensor.name].shape[1:]))
        if tensor.shape[:1] == ("batch",)
        else found[tensor.name]
        for tensor in spec.conditions
    }
    # What guidance subtracts is not known here; without guidance the network sees the condition alone.
    request = Request(num=num, num_inference_steps=steps, batch=BATCH, conditions=conditions, guidance_scale=1.0)
    return request, source


def _weight_peaks(model: ir.Model) -> dict[str, float]:
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.is_floating_point() and tensor.size:
            found[name] = float(np.abs(tensor.numpy()).max())
    return found


class _Observed:
    """The instrumented step graph as a session: returns what the step graph does, and keeps what was measured."""

    def __init__(self, graph: bytes, weights: Path, threads: int) -> None:
        self._session = OnnxRuntimeSession(_session(graph, weights, threads))
        self._taken: list[tuple[Array, Array]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        self._taken.append((outputs.pop(PEAK), outputs.pop(RMS)))
        return outputs

    def taken(self) -> list[tuple[Array, Array]]:
        """What was measured since this was last asked."""
        taken, self._taken = self._taken, []
        return taken


def _session(graph: bytes | str, weights: Path, threads: int) -> ort.InferenceSession:
    options = session_options({"intra_op_threads": threads, "spinning": False})
    # In the graph's order a tensor is measured as soon as it is there; ONNX Runtime's default order keeps all of them.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if isinstance(graph, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        return ort.InferenceSession(graph, options, providers=[PROVIDER])
    except FAILURES as e:
        raise InvalidInput(f"ONNX Runtime cannot run the graph with its measurements: {e}") from e
