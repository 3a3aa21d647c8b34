"""Calibration data: what the denoiser is fed along its own loops, or what a user recorded.

A quantised network errs by its own inputs, so those are recorded where they arise: the portable float32 graphs draw
samples with the model's sampler, guidance included, and every evaluation's inputs are written down. They are those of
the whole denoiser (sample, timestep, conditions); the graphs that run once a loop make the rest of them again.

One batch of samples is one file, written whole or not at all. A collection that was interrupted goes on with the batch
that is missing, and one that was made before of the same model with the same settings is used as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from lehr.runtime import golden
from lehr.runtime.arrays import read_arrays, write_arrays
from lehr.runtime.backends.base import Session
from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser, synthetic_conditions
from lehr.runtime.errors import BundleError, InvalidInput, RunFailed
from lehr.runtime.files import storage_errors
from lehr.runtime.hoisted import PROMPT, SCHEDULE, STEP, Residency, hoisted_denoiser
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.spec import ModelSpec
from lehr.runtime.stored_tables import StoredTables

Array = npt.NDArray[Any]
OnStep = Callable[[int, int], None]
LoadStep = Callable[[], Session]

VERSION = 1  # of the files and of what is collected
BATCH = 4  # samples at once, as many again under guidance
SAMPLES = 32  # of a collection by default
LEAST_RECORDED = 16  # rows of recorded inputs; fewer tell more about themselves than about the model
CALIBRATION_SEEDS = 1 << 32  # calibration draws with this seed and the ones after it; what is held out lies below


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation's inputs.

    Attributes:
        index: number of the evaluation in its loop; of recorded inputs that of their timestep, in falling order.
        sample: (B, C, …) float32.
        timestep: of all of them.
        conditions: name -> (B, …), or what all samples share.
    """

    index: int
    sample: Array
    timestep: float
    conditions: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Calibration data on disk.

    Attributes:
        parts: files, read one at a time.
        timesteps: (N,) float64, of the evaluations by their index.
        gains: (N,) float64, how an error of each evaluation enters the final sample
            (:meth:`lehr.runtime.solver_table.SolverTable.gains`); ones for recorded inputs.
        samples: how many rows of each evaluation there are; of recorded inputs, how many rows in all.
        source: "loops" or "recorded".
        conditions: as of :class:`lehr.calibration.ranges.Ranges`, or "recorded".
        digest: SHA-256 of what determines the data: model, sampler, seeds; of recorded inputs their content.
    """

    parts: tuple[Path, ...]
    timesteps: Array
    gains: Array
    samples: int
    source: str
    conditions: str
    digest: str

    def evaluations(self) -> Iterator[Evaluation]:
        """Every evaluation; one part is in memory at a time.

        Raises:
            BundleError: a part is damaged.
        """
        for part in self.parts:
            yield from _read_part(part)


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


def portable_session(graph: bytes | str, weights: Path, threads: int) -> ort.InferenceSession:
    """A portable graph, or a copy with more outputs, in ONNX Runtime; ``weights`` is the folder of its weights file.

    Raises:
        InvalidInput: ONNX Runtime refuses it.
    """
    options = session_options({"intra_op_threads": threads, "spinning": False})
    # In the graph's order a tensor is measured as soon as it is there; ONNX Runtime's default order keeps all of them.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if isinstance(graph, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        return ort.InferenceSession(graph, options, providers=[PROVIDER])
    except FAILURES as e:
        raise InvalidInput(f"ONNX Runtime cannot run the graph: {e}") from e


def portable_denoiser(bundle: Bundle, load_step: LoadStep | None = None, *, threads: int = 0) -> Denoiser:
    """The network by its portable float32 graphs; ``load_step`` puts something else in the step graph's place.

    Raises:
        BundleError: structure only, or damaged files.
    """
    graphs = bundle.manifest.graphs

    def load(name: str) -> Session:
        if name == STEP and load_step is not None:
            return load_step()
        entry = graphs[name]
        if entry.weights is None:
            raise BundleError(
                f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only."
            )
        bundle.path(entry.weights)
        path = bundle.path(entry.file)
        return OnnxRuntimeSession(portable_session(str(path), path.parent, threads))

    signatures = {name: graphs[name].signature for name in (PROMPT, SCHEDULE, STEP) if name in graphs}
    return hoisted_denoiser(bundle.manifest.model, signatures, load, residency=Residency.ALL)


# ------------------------------------------------------------------------------------------------- collecting


def cache_folder() -> Path:
    """Where calibration data is kept between runs unless told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lehr" / "trajectories"


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
    table = Pipeline(Denoiser(spec, _nothing), tables=StoredTables(bundle)).table(request)
    digest = _digest(bundle, num, seed, table.to_bytes(), request)
    place = (folder or cache_folder()) / digest[:32]
    with storage_errors(f"making {place}"):
        place.mkdir(parents=True, exist_ok=True)
    recorder: _Recorder | None = None
    parts, done, total = [], 0, len(table) * -(-num // BATCH)
    for number, first in enumerate(range(0, num, BATCH)):
        part = place / f"part-{number:05d}.npz"
        parts.append(part)
        if not _is_whole(part):
            if recorder is None:
                recorder = _Recorder(bundle, threads)
            rows = slice(first, min(first + BATCH, num))
            recorder.draw(_part_of(request, spec, rows), done, total, on_step)
            _write_part(part, recorder.taken())
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
        "conditions": {name: _content(value) for name, value in sorted(request.conditions.items())},
        "onnxruntime": str(ort.__version__),
        "batch": BATCH,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _content(array: Array) -> str:
    return hashlib.sha256(
        f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
    ).hexdigest()


# ------------------------------------------------------------------------------------------------- recorded inputs


def recorded(bundle: Bundle, path: Path, *, folder: Path | None = None) -> Trajectories:
    """Calibration data from inputs that a user recorded.

    Args:
        bundle: of the model that they were fed to.
        path: an ``.npz`` file, or a folder of them, with an array for every input of the denoiser by its name: the
            sample (N, C, …), the timestep (N,), conditions (N, …).
        folder: where the data is kept in parts; by default :func:`cache_folder`.

    Raises:
        InvalidInput: no such file, an input that is missing or unknown, another shape, values that are not finite, or
            too few rows; the message names file, array and row.
    """
    spec, files = bundle.manifest.model, _files_of(path)
    names = {spec.sample.name, spec.timestep.name, *(tensor.name for tensor in spec.conditions)}
    digest = hashlib.sha256(f"recorded {VERSION}".encode())
    rows: dict[float, list[tuple[Path, int]]] = {}
    loaded: dict[Path, dict[str, Array]] = {}
    for file in files:
        arrays = _checked(spec, file, names)
        loaded[file] = arrays
        for name in sorted(arrays):
            digest.update(_content(arrays[name]).encode())
        for k, t in enumerate(arrays[spec.timestep.name].tolist()):
            rows.setdefault(float(t), []).append((file, k))
    count = sum(len(found) for found in rows.values())
    if count < LEAST_RECORDED:
        raise InvalidInput(
            f"{path} holds {count} recorded inputs; calibration needs at least {LEAST_RECORDED}, better some hundred "
            "over all timesteps. Record more, or leave --data out to draw them."
        )
    place = (folder or cache_folder()) / digest.hexdigest()[:32]
    with storage_errors(f"making {place}"):
        place.mkdir(parents=True, exist_ok=True)
    timesteps = sorted(rows, reverse=True)
    parts: list[Path] = []
    for index, t in enumerate(timesteps):
        for first in range(0, len(rows[t]), 2 * BATCH):
            part = place / f"part-{len(parts):05d}.npz"
            parts.append(part)
            _write_part(part, [_gathered(spec, loaded, rows[t][first : first + 2 * BATCH], index, t)])
    return Trajectories(
        parts=tuple(parts),
        timesteps=np.array(timesteps, np.float64),
        gains=np.ones(len(timesteps)),
        samples=count,
        source="recorded",
        conditions="recorded",
        digest=digest.hexdigest(),
    )


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise InvalidInput(f"{path} holds no .npz file. Expected recorded inputs of the denoiser, a file or more.")
        return files
    if not path.is_file():
        raise InvalidInput(f"no such file: {path}. Expected an .npz of recorded inputs, or a folder of them.")
    return [path]


def _checked(spec: ModelSpec, file: Path, names: set[str]) -> dict[str, Array]:
    try:
        arrays = read_arrays(file)
    except BundleError as e:
        raise InvalidInput(f"{file} cannot be read: {e}") from e
    if set(arrays) != names:
        missing, unknown = sorted(names - set(arrays)), sorted(set(arrays) - names)
        what = "; ".join(
            f"{word} {', '.join(found)}" for word, found in (("lacks", missing), ("has the unknown", unknown)) if found
        )
        raise InvalidInput(
            f"{file} {what}. Expected an array for each input of {spec.name}: {', '.join(sorted(names))}."
        )
    for name, array in arrays.items():
        bad = np.argwhere(~np.isfinite(array)) if array.dtype.kind == "f" else np.empty((0, 1))
        if len(bad):
            raise InvalidInput(
                f"{file}: {name!r} is {array[tuple(bad[0])]} in row {bad[0][0]}, expected finite numbers. "
                "Record the inputs again, or leave that row out."
            )
        dtype = next(tensor.dtype.numpy for tensor in spec.inputs if tensor.name == name)
        if not np.can_cast(array.dtype, dtype, casting="same_kind"):
            raise InvalidInput(f"{file}: {name!r} holds {array.dtype}, expected {dtype}. Convert it before saving.")
        arrays[name] = array.astype(dtype)
    spec.check_feeds(arrays)
    return arrays


def _gathered(
    spec: ModelSpec, loaded: Mapping[Path, Mapping[str, Array]], rows: Sequence[tuple[Path, int]], index: int, t: float
) -> Evaluation:
    """Rows of several files as one evaluation; what all samples of a file share is taken from the first."""
    shared = {tensor.name for tensor in spec.conditions if tensor.shape[:1] != ("batch",)}

    def gather(name: str) -> Array:
        first = loaded[rows[0][0]][name]
        return first if name in shared else np.stack([loaded[file][name][k] for file, k in rows])

    conditions = {tensor.name: gather(tensor.name) for tensor in spec.conditions}
    return Evaluation(index=index, sample=gather(spec.sample.name), timestep=t, conditions=conditions)


# ------------------------------------------------------------------------------------------------------- the parts


def _write_part(part: Path, evaluations: Sequence[Evaluation]) -> None:
    """One file, renamed when it is whole; conditions that several evaluations share are written once."""
    arrays: dict[str, Array] = {}
    sets: list[str] = []
    of = []
    for k, evaluation in enumerate(evaluations):
        arrays[f"sample.{k:05d}"] = evaluation.sample
        key = json.dumps({name: _content(value) for name, value in evaluation.conditions.items()}, sort_keys=True)
        if key not in sets:
            sets.append(key)
            arrays |= {f"condition.{len(sets) - 1:05d}.{n}": v for n, v in evaluation.conditions.items()}
        of.append(sets.index(key))
    arrays["conditions"] = np.array(of, np.int64)
    arrays["index"] = np.array([evaluation.index for evaluation in evaluations], np.int64)
    arrays["timestep"] = np.array([evaluation.timestep for evaluation in evaluations], np.float64)
    partial = part.with_name(f".{part.name}.{os.getpid()}.partial")
    try:
        with storage_errors(f"writing {part}"):
            write_arrays(partial, arrays)
            partial.replace(part)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _is_whole(part: Path) -> bool:
    """Whether a part is there and can be read."""
    try:
        return part.is_file() and len(_read_part(part)) > 0
    except BundleError:
        return False


def _read_part(part: Path) -> list[Evaluation]:
    try:
        arrays = read_arrays(part)
        return [
            Evaluation(
                index=int(arrays["index"][k]),
                sample=arrays[f"sample.{k:05d}"],
                timestep=float(arrays["timestep"][k]),
                conditions=_prefixed(arrays, f"condition.{int(arrays['conditions'][k]):05d}."),
            )
            for k in range(len(arrays["index"]))
        ]
    except (KeyError, IndexError, FileNotFoundError) as e:
        raise BundleError(f"calibration data {part} is missing or damaged ({e}). Delete it and calibrate again.") from e


def _prefixed(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
