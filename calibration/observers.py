"""What calibration knows of activations: histograms and moments, gathered in one pass and without keeping any tensor.

For each tensor: the largest magnitude of every channel in each bucket of timesteps, a histogram for each bucket and
one for each channel, and each channel's mean, mean magnitude and mean square. From these follow ranges by tensor, by
channel and by block (:mod:`lehr.calibration.histogram`). What an evaluation counts is the square of its gain: an error
there moves the final sample that much (:mod:`lehr.runtime.error_gains`).

Shape legend: K buckets, C channels, D inputs of one output (C, or C times the kernel of a convolution).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.calibration.collected import Trajectories
from lehr.calibration.columns import columns
from lehr.calibration.histogram import BINS, count_by_channel
from lehr.calibration.layers import Kind, Layer, layers, probabilities_of
from lehr.calibration.observed import Statistics, TensorStatistics
from lehr.calibration.ranges import buckets
from lehr.engines.graph.cost import nbytes
from lehr.engines.graph.passes.decompose_attention import decompose_attention
from lehr.engines.portable import portable_denoiser, portable_session
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.hoisted import STEP

__all__ = ["MEMORY", "Gatherer", "Observer", "Statistics", "TensorStatistics", "digest_of", "observe"]

Array = npt.NDArray[Any]
OnStep = Callable[[int, int], None]

MEMORY = 1 << 29  # bytes of activations that one session hands out at a time
MAX_GRAM = 8192  # inputs of one output beyond which no matrix of their products is kept (512 MB)


def observe(
    bundle: Bundle,
    trajectories: Trajectories,
    *,
    model: ir.Model | None = None,
    grams: Collection[str] = (),
    memory: int = MEMORY,
    threads: int = 0,
    on_step: OnStep | None = None,
) -> Statistics:
    """Run the step graph over calibration data and gather what its layers read.

    All tensors are gathered in one pass; where they need more than ``memory`` at once, the graph runs once for each
    share of them.

    Args:
        bundle: with the portable graphs.
        trajectories: of this bundle's model.
        model: the step graph, by default the bundle's; it is not changed.
        grams: names of layers whose products of inputs are wanted.
        memory: bytes of activations at a time.
        threads: of ONNX Runtime; 0 is one a core.
        on_step: told how many of all evaluations are done.

    Raises:
        InvalidInput: the graph is quantised already, or a layer that it has not.
        RunFailed: a tensor is not finite; or ONNX Runtime fails.
    """
    entry = bundle.manifest.graphs[STEP]
    path = bundle.path(entry.file)
    spec = bundle.manifest.model
    graph = ir.load(path) if model is None else model
    place = buckets(trajectories.timesteps)
    gatherer = Gatherer(graph, layers(graph, sample=spec.sample.name), grams, _bucket_weights(trajectories, place))
    text = ir.to_proto(graph).SerializeToString(deterministic=True)
    first = next(trajectories.evaluations())
    sizes = {**spec.default_sizes(batch=len(first.sample)), "batch": len(first.sample)}
    observer = Observer(text, path.parent, gatherer.wanted, sizes, memory, threads)
    denoiser = portable_denoiser(bundle, lambda: observer, threads=threads)
    total, done = len(trajectories.timesteps) * len(trajectories.parts), 0
    for evaluation in trajectories.evaluations():
        bucket = place[float(trajectories.timesteps[evaluation.index])]  # the network was told it in fewer digits
        if done == 0 or evaluation.index == 0:
            denoiser.prepare(trajectories.timesteps, evaluation.sample.shape[1:], [evaluation.conditions])

        observer.take = gatherer.taking(bucket, f"at timestep {evaluation.timestep:g}")
        denoiser.with_variance(evaluation.sample, evaluation.timestep, evaluation.conditions)
        done += 1
        if on_step is not None:
            on_step(min(done, total), total)
    members = [[t for t in place if place[t] == k] for k in range(len(gatherer.weights))]
    return gatherer.result(
        timesteps=np.array([(ts[0], ts[-1]) for ts in members], np.float64),
        evaluations=done,
        samples=trajectories.samples,
        digest=digest_of(trajectories.digest, text),
    )


def digest_of(data: str, graph: bytes) -> str:
    """SHA-256 of what determines statistics: of the data, by its own digest, and of the graph."""
    return hashlib.sha256(data.encode() + hashlib.sha256(graph).digest()).hexdigest()


def _bucket_weights(trajectories: Trajectories, place: Mapping[float, int]) -> Array:
    """Mean square of the gains in each bucket, over the mean of all.

    Gains above 1 count as 1: the first ones of VP paths are large (40.8 for digits-adm), and the network takes it back
    (measured .34, :mod:`lehr.calibration.sensitivity`). Uncapped, int8-sq of digits-adm loses 3 dB of its final PSNR.
    """
    squares = np.minimum(np.asarray(trajectories.gains, np.float64), 1.0) ** 2
    squares = squares / squares.mean() if squares.mean() > 0 else np.ones_like(squares)
    of = np.array([place[float(t)] for t in trajectories.timesteps])
    # An evaluation whose error cannot reach the final sample at once still moves later ones: none counts for nothing.
    return np.array([max(float(squares[of == k].mean()), 1e-2) for k in range(max(place.values()) + 1)])


def _wanted(found: Collection[Layer]) -> dict[str, int]:
    """Tensor -> axis of its channels: every activation that a layer multiplies, attention's probabilities too."""
    wanted: dict[str, int] = {}
    for layer in found:
        for name in layer.inputs:
            wanted.setdefault(name, 1 if layer.kind is Kind.CONV else -1)
        if layer.kind is Kind.ATTENTION:
            wanted[probabilities_of(layer.name)] = -1
    return wanted


def _node(graph: ir.Model, name: str) -> ir.Node:
    return next(node for node in graph.graph if node.name == name)


# ------------------------------------------------------------------------------------------------ all tensors


class Gatherer:
    """What the layers of a graph read, gathered while the graph runs.

    Args:
        graph: it is not changed.
        found: its layers.
        grams: names of layers whose products of inputs are wanted.
        weights: (K,) what one number of each bucket counts.

    Raises:
        InvalidInput: a layer that the graph has not.
    """

    def __init__(self, graph: ir.Model, found: Iterable[Layer], grams: Collection[str], weights: Array) -> None:
        by_name = {layer.name: layer for layer in found}
        if unknown := sorted(set(grams) - set(by_name)):
            raise InvalidInput(f"the graph has no layer {unknown[0]!r} to gather products of inputs for.")
        self.weights = weights
        self.wanted = _wanted(by_name.values())
        self._tensors = {name: _Gathering(axis=axis, buckets=len(weights)) for name, axis in self.wanted.items()}
        self._products = {name: _Gram(layer=by_name[name], node=_node(graph, name)) for name in sorted(grams)}

    def taking(self, bucket: int, where: str) -> Callable[[str, Array], None]:
        """What takes the tensors of one evaluation; it raises RunFailed for one that is not finite ``where``."""
        weight = float(self.weights[bucket])

        def take(name: str, value: Array) -> None:
            if not np.all(np.isfinite(value)):
                raise RunFailed(
                    f"tensor {name!r} is not finite {where}; the weights or the calibration data are wrong. Check the "
                    "model with lehr verify."
                )
            self._tensors[name].add(value, bucket, weight)
            for product in self._products.values():
                if product.layer.inputs[0] == name:
                    product.add(value, weight)

        return take

    def result(self, *, timesteps: Array, evaluations: int, samples: int, digest: str) -> Statistics:
        """What was gathered; see :class:`Statistics`."""
        return Statistics(
            tensors={name: made.result(self.weights) for name, made in self._tensors.items()},
            grams={name: product.result() for name, product in self._products.items() if product.total > 0},
            timesteps=timesteps,
            evaluations=evaluations,
            samples=samples,
            digest=digest,
            without_gram=frozenset(name for name, product in self._products.items() if product.total == 0),
        )


# ------------------------------------------------------------------------------------------------- one tensor


@dataclass(slots=True)
class _Gathering:
    """Statistics of one tensor as they grow."""

    axis: int
    buckets: int
    low: float = math.inf
    high: float = -math.inf
    count: float = 0.0
    arrays: dict[str, Array] = field(default_factory=dict)

    def add(self, value: Array, bucket: int, weight: float) -> None:
        rows = np.moveaxis(value, self.axis, -1).reshape(-1, value.shape[self.axis])
        rows = np.ascontiguousarray(rows, np.float32)
        channels = rows.shape[1]
        if not self.arrays:
            self.arrays = {
                "peak": np.zeros((self.buckets, channels), np.float32),
                "histogram": np.zeros((self.buckets, BINS)),
                "by_channel": np.zeros((channels, BINS)),
                "lows": np.full(channels, np.inf, np.float32),
                "highs": np.full(channels, -np.inf, np.float32),
                **{name: np.zeros(channels) for name in ("mean", "magnitude", "square")},
            }
        kept = self.arrays
        counts = count_by_channel(rows)
        kept["histogram"][bucket] += counts.sum(axis=0)
        kept["by_channel"] += weight * counts
        low, high = rows.min(axis=0), rows.max(axis=0)
        np.maximum(kept["peak"][bucket], np.maximum(-low, high), out=kept["peak"][bucket])
        np.minimum(kept["lows"], low, out=kept["lows"])
        np.maximum(kept["highs"], high, out=kept["highs"])
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        kept["mean"] += weight * rows.sum(axis=0, dtype=np.float64)
        kept["square"] += weight * np.einsum("nc,nc->c", rows, rows, dtype=np.float64)
        kept["magnitude"] += weight * np.abs(rows).sum(axis=0, dtype=np.float64)
        self.count += weight * len(rows)

    def result(self, weights: Array) -> TensorStatistics:
        if not self.arrays:
            raise RunFailed("no calibration data reached the step graph; collect it again.")
        moments = {name: self.arrays[name] / self.count for name in ("mean", "magnitude", "square")}
        plain = {name: self.arrays[name] for name in ("lows", "highs", "peak", "histogram", "by_channel")}
        return TensorStatistics(
            axis=self.axis, low=self.low, high=self.high, weights=np.array(weights), **plain, **moments
        )


@dataclass(slots=True)
class _Gram:
    """Mean products of a layer's inputs, as they grow."""

    layer: Layer
    node: ir.Node
    total: float = 0.0
    sum: Array | None = None

    def add(self, value: Array, weight: float) -> None:
        rows = columns(self.node, value, self.layer.weight_shape)
        if rows is None or rows.shape[1] > MAX_GRAM:
            return
        products = (rows.T @ rows).astype(np.float64)
        self.sum = weight * products if self.sum is None else self.sum + weight * products
        self.total += weight * len(rows)

    def result(self) -> Array:
        return np.asarray(self.sum) / self.total


# ----------------------------------------------------------------------------------------------------- the session


class Observer:
    """A graph as a session that hands out the tensors that are gathered, one share of them after the other."""

    def __init__(
        self, text: bytes, weights: Path, wanted: Mapping[str, int], sizes: Mapping[str, int], memory: int, threads: int
    ) -> None:
        self._inputs: frozenset[str] = frozenset()
        self._sessions = []
        self.take: Callable[[str, Array], None] = lambda name, value: None
        for names in _shares(text, wanted, sizes, memory):
            model, inputs = _with_outputs(text, names)
            self._inputs |= inputs
            session = portable_session(ir.to_proto(model).SerializeToString(), weights, threads=threads)
            self._sessions.append((session, [name for name in names if name not in inputs]))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs: dict[str, Array] = {}
        for session, names in self._sessions:
            made = session.run(feeds)
            for name in names:
                self.take(name, made.pop(name))
            outputs = made
        for name in sorted(self._inputs):
            self.take(name, feeds[name])
        return outputs


def _with_outputs(text: bytes, names: Sequence[str]) -> tuple[ir.Model, frozenset[str]]:
    """The graph with more outputs; and which of ``names`` are inputs, which need none."""
    import onnx

    model = ir.from_proto(onnx.load_from_string(text))
    _show_probabilities(model, names)
    inputs = frozenset(str(value.name) for value in model.graph.inputs) & frozenset(names)
    known = {str(value.name) for value in model.graph.outputs}
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in names:
        if name not in inputs and name not in known:
            model.graph.outputs.append(values[name])
    return model, inputs


def _show_probabilities(model: ir.Model, names: Collection[str]) -> None:
    """Compute the largest probability of each attention that is asked for by :func:`probabilities_of`.

    The probabilities themselves never leave the engine: 4,096 tokens have 67 MB of them a head.
    """
    asked = [str(n.name) for n in model.graph if n.op_type == "Attention" and probabilities_of(str(n.name)) in names]
    decompose_attention(model, asked)
    for name in asked:
        whole = next(n for n in model.graph if n.op_type == "Softmax" and (n.name or "").startswith(f"{name}."))
        largest = ir.Value(name=probabilities_of(name), shape=ir.Shape([1] * 4), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node("ReduceMax", [whole.outputs[0]], {"keepdims": 1}, outputs=[largest])
        model.graph.insert_after(whole, node)


def _shares(text: bytes, wanted: Mapping[str, int], sizes: Mapping[str, int], memory: int) -> list[list[str]]:
    """The tensors in groups of at most ``memory`` bytes, a larger one alone; unknown sizes count for nothing."""
    import onnx

    model = ir.from_proto(onnx.load_from_string(text))
    values = {str(value.name): value for value in model.graph.inputs}
    values |= {str(value.name): value for node in model.graph for value in node.outputs}
    shares: list[list[str]] = [[]]
    held = 0
    for name in wanted:
        size = nbytes(values[name], sizes) or 0 if name in values else 0  # a largest probability is one number
        if shares[-1] and held + size > memory:
            shares.append([])
            held = 0
        shares[-1].append(name)
        held += size
    return shares
