"""Where an engine parts from the model: the first layer, found in graphs that show their tensors.

The graphs run by hand, one after the other, on the same recorded inputs: once as engine, once as reference. Tensors are
compared in the order of the graph; the culprit is the first one that errs by much more than everything it is computed
from. Tensors of a large graph are not all looked at in one pass: up to :data:`MARKS_A_PASS` evenly spaced ones are,
then those between the last good and the first bad one, so a graph of 4,096 tensors takes two instrumented graphs.

There are two references. What the exporter recorded (``golden/tensors.npz``) knows the weights as they were exported,
so it also finds what is wrong in the bundle itself; the portable graph in fp32 needs no recording and takes any
timestep, and finds what is wrong in the engine alone. Recorded are sketches: each sample's tensor, with random signs,
summed into :data:`WIDTH` buckets (Charikar, Chen and Farach-Colton 2002), which keeps the length of every difference in
expectation, so relative errors can be estimated from a few kilobytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.engines.marked import Mark, as_float32, engine_session, graph_session, marks, portable_session
from lehr.runtime.backends import Session
from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.golden import StepsGolden
from lehr.runtime.hoisted import PROMPT, SCHEDULE, SHAPE_SUFFIX, STEP
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.parity import WORST
from lehr.runtime.spec import ModelSpec

Array = npt.NDArray[Any]

TENSORS_FILE, TENSORS_INDEX = "golden/tensors.npz", "golden/tensors.json"
VERSION = 1
MARKS_A_PASS = 64  # tensors shown at a time: what a pass holds in memory
MOST_RECORDED = 512  # tensors of a graph; of more, evenly spaced ones are recorded
RECORDED_A_PASS = 32  # while recording: an export is measured by its memory too
WIDTH = 32  # buckets of a sketch: a relative error is estimated within about a quarter
JUMP = 4.0  # times the error of what a tensor is computed from; a sum or product of erring tensors stays below 2
# What an intermediate tensor may err where nothing is wrong: rounding, several layers deep, of cancelling sums.
TENSOR_ERROR = {"fp32": 5e-5, "fp16": 2e-2, "bf16": 1e-1}
_OTHER_RECIPES = 0.3  # of formats with few bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """The first tensor at which an engine parts from a reference.

    Attributes:
        graph, layer, tensor, operator: where; the layer is the module that was traced.
        error: relative, of the worst sample.
        before: the largest error of what the tensor is computed from.
        unseen: layers that lie between the tensors seen last and this one: the engine fused them away, so the fault may
            be in one of them.
        timestep: of the evaluation.
        reference: "recorded at export" or "portable graph".
        builds: instrumented graphs that were needed.
    """

    graph: str
    layer: str
    tensor: str
    operator: str
    error: float
    before: float
    unseen: tuple[str, ...]
    timestep: float
    reference: str
    builds: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        size = "not finite" if self.error >= WORST else f"error {self.error:.1e}"
        fused = f", fused with {', '.join(self.unseen)}" if self.unseen else ""
        return (
            f"layer {self.layer}{fused} ({self.operator}, tensor {self.tensor!r} of graph {self.graph}): {size}, "
            f"{self.before:.1e} before it, timestep {self.timestep:g}, against {_AGAINST[self.reference]}"
        )


RECORDED, PORTABLE = "recorded at export", "portable graph"
_AGAINST = {RECORDED: "what was recorded at export", PORTABLE: "the portable graph"}
_Open = Callable[[str, Sequence[str]], Session]
_Take = Callable[[str, str, Array], Array]  # graph, tensor, value -> what is compared

# ------------------------------------------------------------------------------------------------------ sketches


def sketch(values: Array, name: str) -> npt.NDArray[np.float32]:
    """(B, …) -> (B, WIDTH): signed sums, the same for the same name and size; a shared tensor counts as one sample."""
    rows = as_float32(values).reshape(len(values) if values.ndim else 1, -1)
    size = rows.shape[1]
    key = int.from_bytes(name.encode()[-8:], "little") % 2**63  # any fixed number; names need not differ
    bits = np.random.Philox(key=key).random_raw(-(-size // 8)).view(np.uint8)[:size]
    signed: Array = rows * np.where(bits & 128, np.float32(1), np.float32(-1))
    order = np.argsort(bits % WIDTH, kind="stable")
    starts = np.searchsorted((bits % WIDTH)[order], np.arange(WIDTH))
    padded = np.concatenate([signed[:, order], np.zeros((len(rows), 1), np.float32)], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so, which is the finding
        sums = np.add.reduceat(padded, starts, axis=1)
    empty = np.diff([*starts.tolist(), size]) == 0  # reduceat gives an element for an empty range
    sums[:, empty] = 0
    return np.asarray(sums, dtype=np.float32)


def record(
    edit: Edit, spec: ModelSpec, graphs: Mapping[str, GraphEntry], path: Callable[[str], Path], steps: StepsGolden
) -> None:
    """Add sketches of the portable graphs' tensors, at the middle recorded timestep, to a bundle that is being made.

    The graphs must have been held against eager before: what is recorded is what they compute.

    Args:
        edit: of the bundle.
        spec: the denoiser's.
        graphs: the portable graphs.
        path: where a file of the bundle stands.
        steps: recorded inputs; all samples of the batch are recorded.
    """
    index: list[list[str]] = []
    arrays: dict[str, Array] = {}
    k = len(steps.timesteps) // 2
    known = _feeds(spec, steps.inputs[k], float(steps.timesteps[k]), steps.conditions)
    for graph in _graphs(graphs):
        file = path(graphs[graph].file)
        names = [mark.tensor for mark in _spaced(marks(ir.load(file), graph), MOST_RECORDED)]
        made: dict[str, Array] = {}
        for first in range(0, max(1, len(names)), RECORDED_A_PASS):
            part = names[first : first + RECORDED_A_PASS]
            outputs = _run(graphs[graph], graph_session(file, part), known)
            made = {tensor.name: outputs[tensor.name] for tensor in graphs[graph].signature.outputs}
            for name in part:
                arrays[str(len(index))] = sketch(outputs[name], name)
                index.append([graph, name])
        known |= made
    edit.add_arrays(TENSORS_FILE, arrays)
    edit.add_json(
        TENSORS_INDEX,
        {"version": VERSION, "timestep": float(steps.timesteps[k]), "inputs": _digest(steps, k)} | {"tensors": index},
    )


# --------------------------------------------------------------------------------------------------------- search


def recorded_culprit(bundle: Bundle, record: EngineRecord, steps: StepsGolden) -> Culprit | None:
    """The first tensor at which an engine parts from what was recorded at export; None if it follows it.

    Raises:
        RunFailed: the engine cannot be looked into.
        BundleError: what was recorded is damaged.
    """
    if TENSORS_INDEX not in bundle.manifest.files:
        return None
    index, arrays = bundle.read_json(TENSORS_INDEX), bundle.read_arrays(TENSORS_FILE)
    try:
        if index["version"] != VERSION:
            return None
        reference = {(str(graph), str(name)): arrays[str(n)] for n, (graph, name) in enumerate(index["tensors"])}
        k = steps.timesteps.tolist().index(index["timestep"])
        if index["inputs"] != _digest(steps, k):
            return None  # recorded for other inputs than the bundle now holds
    except (KeyError, TypeError, ValueError) as e:
        raise BundleError(f"{TENSORS_INDEX} of {bundle.root.name} is damaged ({e!r}). Export the model again.") from e

    def known_marks(graph: str) -> list[Mark]:
        return [mark if (graph, mark.tensor) in reference else _hidden(mark) for mark in _marks(bundle, graph)]

    return _search(
        bundle,
        _feeds(bundle.manifest.model, steps.inputs[k], float(steps.timesteps[k]), steps.conditions),
        known_marks,
        engine=lambda graph, names: engine_session(bundle, record.at(float(steps.timesteps[k])), graph, names),
        take=lambda graph, name, value: sketch(value, name),
        reference=lambda graph, names: {name: reference[graph, name] for name in names},
        limit=TENSOR_ERROR.get(record.recipe, _OTHER_RECIPES),
        about=(float(steps.timesteps[k]), RECORDED),
    )


def portable_culprit(bundle: Bundle, record: EngineRecord, steps: StepsGolden, k: int, row: int) -> Culprit | None:
    """The first tensor at which an engine parts from the portable graph; None if it follows it.

    Args:
        bundle: holds the portable graphs and their weights.
        record: of the engine.
        steps: recorded inputs.
        k: which of the recorded timesteps.
        row: which sample of the batch.

    Raises:
        RunFailed: the engine cannot be looked into.
        BundleError: this copy of the bundle holds no portable graphs.
    """
    spec = bundle.manifest.model
    batched = {tensor.name for tensor in spec.conditions if tensor.batched}
    conditions = {n: v[row : row + 1] if n in batched else v for n, v in steps.conditions.items()}
    feeds = _feeds(spec, steps.inputs[k][row : row + 1], float(steps.timesteps[k]), conditions)
    own = dict(feeds)  # the reference hands its own tensors on

    def reference(graph: str, names: Sequence[str]) -> dict[str, Array]:
        outputs = _run(bundle.manifest.graphs[graph], portable_session(bundle, graph, names), own)
        own.update({t.name: outputs[t.name] for t in bundle.manifest.graphs[graph].signature.outputs})
        return {name: as_float32(outputs[name]) for name in names}

    return _search(
        bundle,
        feeds,
        lambda graph: _marks(bundle, graph),
        engine=lambda graph, names: engine_session(bundle, record.at(float(steps.timesteps[k])), graph, names),
        take=lambda graph, name, value: as_float32(value),
        reference=reference,
        limit=TENSOR_ERROR.get(record.recipe, _OTHER_RECIPES),
        about=(float(steps.timesteps[k]), PORTABLE),
    )


def _search(
    bundle: Bundle,
    feeds: Mapping[str, Array],
    marks_of: Callable[[str], list[Mark]],
    *,
    engine: _Open,
    take: _Take,
    reference: Callable[[str, Sequence[str]], dict[str, Array]],
    limit: float,
    about: tuple[float, str],
) -> Culprit | None:
    known, builds = dict(feeds), 0
    for graph in _graphs(bundle.manifest.graphs):
        found = marks_of(graph)
        errors: dict[int, float] = {}
        window = [n for n, mark in enumerate(found) if mark.operator]
        while True:
            asked = _spaced(window, MARKS_A_PASS)
            names = [found[n].tensor for n in asked]
            outputs = _run(bundle.manifest.graphs[graph], engine(graph, names), known)
            builds += 1
            shown = [n for n in asked if found[n].tensor in outputs]
            expected = reference(graph, [found[n].tensor for n in shown])
            for n in shown:
                name = found[n].tensor
                errors[n] = _error(expected[name], take(graph, name, outputs[name]))
            bad = min((n for n, error in errors.items() if error > limit), default=None)
            if bad is None:
                known |= {t.name: outputs[t.name] for t in bundle.manifest.graphs[graph].signature.outputs}
                break
            good = max((n for n in errors if n < bad), default=-1)
            window = [n for n in window if good < n < bad and n not in asked]
            if not window:
                return _first(found, errors, limit, about, builds)
    return None


def _first(
    found: Sequence[Mark], errors: Mapping[int, float], limit: float, about: tuple[float, str], builds: int
) -> Culprit:
    """The first mark that errs beyond the limit and :data:`JUMP` times what it reads; else the largest jump."""

    def before(n: int) -> float:
        return max((errors[m] if m in errors else before(m) for m in found[n].reads), default=0.0)

    bad = [n for n in sorted(errors) if errors[n] > limit]
    jumps = {n: errors[n] / max(before(n), limit / JUMP) for n in bad}
    chosen = next((n for n in bad if jumps[n] > JUMP), max(bad, key=lambda n: jumps[n]))
    mark = found[chosen]

    def hidden(n: int) -> list[str]:
        return [layer for m in found[n].reads if m not in errors for layer in (*hidden(m), found[m].layer)]

    return Culprit(
        graph=mark.graph,
        layer=mark.layer,
        tensor=mark.tensor,
        operator=mark.operator,
        error=errors[chosen],
        before=before(chosen),
        unseen=tuple(dict.fromkeys(layer for layer in hidden(chosen) if layer != mark.layer)),
        timestep=about[0],
        reference=about[1],
        builds=builds,
    )


# ------------------------------------------------------------------------------------------------------ the graphs


def _graphs(graphs: Mapping[str, GraphEntry]) -> list[str]:
    return [name for name in (PROMPT, SCHEDULE, STEP) if name in graphs]


def _marks(bundle: Bundle, graph: str) -> list[Mark]:
    return marks(ir.load(bundle.path(bundle.manifest.graphs[graph].file)), graph)


def _hidden(mark: Mark) -> Mark:
    """A mark that cannot be compared: it keeps its place, so that what others read stays true."""
    return Mark(graph=mark.graph, tensor=mark.tensor, node=mark.node, operator="", reads=mark.reads)


def _feeds(spec: ModelSpec, sample: Array, timestep: float, conditions: Mapping[str, Array]) -> dict[str, Array]:
    """What the graphs take from outside, for one evaluation."""
    return {
        spec.sample.name: sample,
        spec.timestep.name: np.full(len(sample), timestep, dtype=spec.timestep.dtype.numpy),
        spec.sample.name + SHAPE_SUFFIX: np.array(sample.shape, dtype=np.int64),
        **conditions,
    }


def _digest(steps: StepsGolden, k: int) -> str:
    return hashlib.sha256(np.ascontiguousarray(steps.inputs[k]).tobytes()).hexdigest()


def _run(graph: GraphEntry, session: Session, known: Mapping[str, Array]) -> dict[str, Array]:
    missing = [tensor.name for tensor in graph.signature.inputs if tensor.name not in known]
    if missing:
        raise RunFailed(f"{graph.file} takes {missing[0]!r}, which no graph before it returns.")
    return session.run({tensor.name: known[tensor.name] for tensor in graph.signature.inputs})


def _error(expected: Array, value: Array) -> float:
    """Relative error of the worst sample; WORST for another shape or values that are not finite."""
    if expected.shape != value.shape:
        return 0.0  # kept under this name in another layout: it says nothing
    a = expected.astype(np.float64).reshape(len(expected) if expected.ndim else 1, -1)
    b = value.astype(np.float64).reshape(a.shape)
    if not np.all(np.isfinite(b)):
        return WORST if np.all(np.isfinite(a)) else 0.0
    sizes = np.linalg.norm(a, axis=1)
    typical = max(float(np.max(sizes)), np.finfo(np.float64).tiny)
    return min(WORST, float(np.max(np.linalg.norm(b - a, axis=1) / np.maximum(sizes, 1e-3 * typical))))


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, evenly spaced, the last one always."""
    if len(items) <= most:
        return list(items)
    picked = sorted({round((k + 1) * len(items) / most) - 1 for k in range(most)})
    return [items[k] for k in picked]
