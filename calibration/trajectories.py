"""Calibration data from the model itself: what the denoiser is fed along its own loops.

A quantised network errs by its own inputs, so those are recorded where they arise: the portable float32 graphs draw
samples with the model's sampler, guidance included, and every evaluation's inputs are written down. They are those of
the whole denoiser (sample, timestep, conditions); the graphs that run once a loop make the rest of them again.

One batch of samples is one file (:mod:`lehr.calibration.collected`). A collection that was interrupted goes on with the
batch that is missing, and one that was made before of the same model with the same settings is used as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from lehr.calibration.collected import (
    BATCH,
    VERSION,
    Evaluation,
    Trajectories,
    cache_folder,
    content,
    is_whole,
    write_part,
)
from lehr.engines.portable import portable_denoiser
from lehr.runtime import golden
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser, synthetic_conditions
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.files import storage_errors
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import ModelSpec
from lehr.runtime.stored_tables import StoredTables

Array = npt.NDArray[Any]
OnStep = Callable[[int, int], None]

SAMPLES = 32  # of a collection by default
CALIBRATION_SEEDS = 1 << 32  # calibration draws with this seed and the ones after it; what is held out lies below


# ---------------------------------------------------------------------------------------------------- the loops


def calibration_request(bundle: Bundle, *, steps: int | None, num: int, seed: int) -> tuple[Request, str]:
    """What calibration draws, and where its conditions come from: "class labels", "golden", "synthetic" or "none"."""
    spec = bundle.manifest.model
    names = [tensor.name for tensor in spec.conditions]
    if not names or names == ["class_labels"]:
        request = Request(num=num, num_inference_steps=steps, seed=seed, batch=BATCH)
        return request, "class labels" if names else "none"
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
    request = Request(
        num=num, num_inference_steps=steps, seed=seed, batch=BATCH, conditions=conditions, guidance_scale=1.0
    )
    return request, source


# ------------------------------------------------------------------------------------------------- collecting


def collect(
    bundle: Bundle,
    *,
    num: int = SAMPLES,
    steps: int | None = None,
    seed: int = 0,
    threads: int = 0,
    folder: Path | None = None,
    on_step: OnStep | None = None,
) -> Trajectories:
    """Draw samples with the portable graphs and keep every evaluation's inputs.

    Args:
        bundle: holds weights.
        num: samples; classes are taken in turn.
        steps: of the sampler; by default the model's own.
        seed: 0 to 2^31; another one draws other samples.
        threads: of ONNX Runtime; 0 is one a core.
        folder: where collections are kept, each in a folder of its own; by default :func:`cache_folder`.
        on_step: told how many of all evaluations are done, those of an interrupted collection included.

    Raises:
        BundleError: structure only, or damaged files.
        InvalidInput: a seed out of range, or the folder cannot be written.
        RunFailed: a graph fails, or is not finite.
    """
    if not 0 <= seed < CALIBRATION_SEEDS >> 1:
        raise InvalidInput(f"the calibration seed must lie in 0 … 2^31 - 1, got {seed}.")
    if num < 1:
        raise InvalidInput(f"the number of calibration samples must be at least 1, got {num}.")
    spec = bundle.manifest.model
    request, source = calibration_request(bundle, steps=steps, num=num, seed=CALIBRATION_SEEDS + seed)
    table = own_table(bundle, request)
    digest = _digest(bundle, num, seed, table.to_bytes(), request)
    place = (folder or cache_folder()) / digest[:32]
    with storage_errors(f"making {place}"):
        place.mkdir(parents=True, exist_ok=True)
    recorder: _Recorder | None = None
    parts, done, total = [], 0, len(table) * -(-num // BATCH)
    for number, first in enumerate(range(0, num, BATCH)):
        part = place / f"part-{number:05d}.npz"
        parts.append(part)
        if not is_whole(part):
            if recorder is None:
                recorder = _Recorder(bundle, threads)
            rows = slice(first, min(first + BATCH, num))
            recorder.draw(_part_of(request, spec, rows), done, total, on_step)
            write_part(part, recorder.taken())
        done += len(table)
        if on_step is not None:
            on_step(done, total)
    return Trajectories(
        parts=tuple(parts),
        timesteps=np.array(table.timesteps, np.float64),
        gains=np.abs(np.asarray(table.gains(), np.float64)),
        samples=num,
        source="loops",
        conditions=source,
        digest=digest,
    )


def own_table(bundle: Bundle, request: Request | None = None) -> SolverTable:
    """The solver table of a request; without one, that of the model's own sampler and number of steps."""
    spec = bundle.manifest.model
    return Pipeline(Denoiser(spec, _nothing), tables=StoredTables(bundle)).table(request or Request())


class _Recorder:
    """Draws batches and keeps what the network was fed."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._denoiser = portable_denoiser(bundle, threads=threads)
        self._tables = StoredTables(bundle)
        self._taken: list[Evaluation] = []

    def draw(self, request: Request, done: int, total: int, on_step: OnStep | None) -> None:
        spec = self._denoiser.spec
        indices = {"now": 0}

        def run(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
            timestep = float(feeds[spec.timestep.name][0])
            conditions = {tensor.name: np.array(feeds[tensor.name]) for tensor in spec.conditions}
            outputs = self._denoiser.with_variance(feeds[spec.sample.name], timestep, conditions)
            if not np.all(np.isfinite(outputs)):
                raise RunFailed(
                    f"the float32 network is not finite at timestep {timestep:g}; the weights or the inputs are wrong. "
                    "Check the model with lehr verify."
                )
            self._taken.append(
                Evaluation(
                    index=indices["now"],
                    sample=np.array(feeds[spec.sample.name]),
                    timestep=timestep,
                    conditions=conditions,
                )
            )
            indices["now"] += 1
            if on_step is not None:
                on_step(done + indices["now"], total)
            return {spec.outputs[0].name: outputs}

        Pipeline(Denoiser(spec, run, hoisted=_Announced(self._denoiser)), tables=self._tables)(request)

    def taken(self) -> list[Evaluation]:
        taken, self._taken = self._taken, []
        return taken


class _Announced:
    """Passes on to the recorded network what is coming."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._timesteps: tuple[float, ...] = ()

    def announce(self, timesteps: Any) -> None:
        self._timesteps = tuple(timesteps)

    def prepare(self, sample_sizes: Sequence[int], conditions: Sequence[Mapping[str, Array]]) -> None:
        self._denoiser.prepare(self._timesteps, sample_sizes, conditions)


def _nothing(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    raise RunFailed(f"this network is only asked for its tables, not for {sorted(feeds)}.")


def _part_of(request: Request, spec: ModelSpec, rows: slice) -> Request:
    """The samples ``rows`` of a request, with the noises that they have in it."""
    numbers = range(rows.start, rows.stop)
    labels = request.class_labels
    if spec.num_classes is not None and not request.conditions:
        labels = [k % spec.num_classes for k in numbers]
    batched = {tensor.name for tensor in spec.conditions if tensor.shape[:1] == ("batch",)}
    conditions = {name: value[rows] if name in batched else value for name, value in request.conditions.items()}
    # Seed s's sample k is what sample 0 of seed s + k would not be: each sample has a seed of its own here.
    return replace(
        request,
        num=len(numbers),
        seed=0,
        seeds=[request.seed + k for k in numbers],
        class_labels=labels,
        conditions=conditions,
    )


def _digest(bundle: Bundle, num: int, seed: int, table: bytes, request: Request) -> str:
    files = sorted({name for graph in bundle.manifest.graphs.values() for name in (graph.file, graph.weights) if name})
    about = {
        "version": VERSION,
        "sources": {name: bundle.manifest.files[name].sha256 for name in files},
        "table": hashlib.sha256(table).hexdigest(),
        "samples": num,
        "seed": seed,
        "guidance_scale": request.guidance_scale or bundle.manifest.model.sampling.guidance_scale,
        "conditions": {name: content(value) for name, value in sorted(request.conditions.items())},
        "onnxruntime": str(ort.__version__),
        "batch": BATCH,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
