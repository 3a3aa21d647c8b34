"""Rates: how often each tensor of a graph must be computed anew, decided by what it depends on.

In a sampling loop most of a denoiser's graph does not change at every step. Each tensor is labelled with the subset of
{sizes, prompt, timestep, sample} that it depends on: inputs bear what their :class:`~lehr.runtime.spec.TensorSpec`
says, a node's results the union of its operands'. "Sizes" are the sample's height, width and so on, which a graph
reads with ``Shape`` and which stay as they are during one loop. From the labels follows the rate:

    constant    depends on nothing                       never
    prompt      on the prompt or the sizes               once per prompt
    schedule    on the timestep, perhaps the prompt      once per (prompt, solver table), for all timesteps at once
    step        on the sample                            at every evaluation

Loop-invariant code motion is textbook compiler work (Aho et al., "Compilers", section 9.5); that the loop's invariants
fall into two classes of their own is what sampling adds. :mod:`lehr.engines.graph.split` cuts along the labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto

import onnx_ir as ir

from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import ExportFailed, InvalidInput, UnknownName
from lehr.runtime.hoisted import PROMPT, SCHEDULE, SHAPE_SUFFIX, STEP
from lehr.runtime.spec import TensorSpec, Varies


class Depends(Flag):
    """What a tensor depends on."""

    NOTHING = 0
    SIZES = auto()
    PROMPT = auto()
    TIMESTEP = auto()
    SAMPLE = auto()


class Rate(str, Enum):
    """How often a tensor is computed."""

    CONSTANT = "constant"
    PROMPT = "prompt"
    SCHEDULE = "schedule"
    STEP = "step"


_OF_INPUT = {
    # A constant input is still an input: nobody knows its value before the first call.
    Varies.CONSTANT: Depends.PROMPT,
    Varies.PROMPT: Depends.PROMPT,
    Varies.TIMESTEP: Depends.TIMESTEP,
    Varies.SAMPLE: Depends.SAMPLE,
}


def rate_of(depends: Depends) -> Rate:
    """The rate that follows from a label."""
    if Depends.SAMPLE in depends:
        return Rate.STEP
    if Depends.TIMESTEP in depends:
        return Rate.SCHEDULE
    return Rate.PROMPT if depends else Rate.CONSTANT


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one graph.

    Attributes:
        depends: of every value of the main graph; initialisers and what is made of them alone depend on nothing.
        batched: values that differ from sample to sample of a batch, so their first dimension is the batch's.
    """

    depends: Mapping[ir.Value, Depends]
    batched: frozenset[ir.Value]

    def rate(self, value: ir.Value) -> Rate:
        return rate_of(self.depends[value])


def label(graph: ir.Graph, inputs: Sequence[TensorSpec]) -> Labels:
    """Label every value of ``graph``.

    Args:
        graph: topologically sorted, as exporters leave it.
        inputs: what the graph's inputs vary with, by name.

    Raises:
        ExportFailed: the graph has an input that no spec describes.
    """
    specs = {tensor.name: tensor for tensor in inputs}
    depends: dict[ir.Value, Depends] = {}
    batched: set[ir.Value] = set()
    for value in graph.inputs:
        if value.name not in specs:
            raise ExportFailed(f"the graph has an input {value.name!r}; the model's spec describes {list(specs)}.")
        spec = specs[value.name]
        depends[value] = Depends.SIZES if spec.name.endswith(SHAPE_SUFFIX) else _OF_INPUT[spec.varies]
        if "batch" in spec.shape:
            batched.add(value)
    for value in graph.initializers.values():
        depends.setdefault(value, Depends.NOTHING)
    for node in graph:
        sources = list(operands(node))
        found = Depends.NOTHING
        for source in sources:
            found |= depends[source]
        differs = any(source in batched for source in sources)
        if node.op_type == "Shape" and sources[0].producer() is None:
            # A size of an input stays as it is while the loop runs, whatever the input holds.
            found, differs = Depends.SIZES if found else Depends.NOTHING, False
        for output in node.outputs:
            depends[output] = found
            if differs:
                batched.add(output)
    return Labels(depends, frozenset(batched))


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, values that its nested graphs take from outside included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield from _captured(attribute.as_graph())


def _captured(graph: ir.Graph) -> Iterator[ir.Value]:
    inside = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        yield from (value for value in operands(node) if value not in inside)
        inside.update(node.outputs)
    yield from (value for value in graph.outputs if value not in inside)


# ------------------------------------------------------------------------------------------------ explaining


def explain(graphs: Mapping[str, tuple[ir.Graph, Sequence[TensorSpec]]], name: str) -> list[str]:
    """Why a tensor has its rate: for all that it depends on a shortest way, through the graphs that hand it over.

    Args:
        graphs: the graphs of one model with their inputs, in the order in which they run.
        name: of a tensor in one of them.

    Raises:
        UnknownName: no graph has a tensor of that name.
    """
    known: dict[str, tuple[str, ir.Value, Labels]] = {}
    for role, (graph, inputs) in graphs.items():
        labels = label(graph, inputs)
        for value in labels.depends:
            # What a later graph is handed was made, and is explained, in an earlier one.
            if value.name and (value.producer() is not None or value.name not in known):
                known.setdefault(value.name, (role, value, labels))
    if name not in known:
        raise UnknownName("tensor", name, known)
    ways, depends = _all_ways(name, known), Depends.NOTHING
    for kind, _ in ways:
        depends |= kind
    names = ", ".join(str(kind.name).lower() for kind, _ in ways) or "nothing"
    first = f"{name}: {rate_of(depends).value}, depends on {names}; it stands in the {known[name][0]} graph"
    return [first, *(f"  {str(kind.name).lower()}: {' <- '.join(way)}" for kind, way in ways)]


def explain_bundle(bundle: Bundle, name: str) -> list[str]:
    """:func:`explain` for the graphs of a bundle; raises UnknownName as that does."""
    graphs = bundle.manifest.graphs
    return explain(
        {
            role: (ir.load(bundle.path(graphs[role].file)).graph, graphs[role].signature.inputs)
            for role in (PROMPT, SCHEDULE, STEP)
            if role in graphs
        },
        name,
    )


def _all_ways(name: str, known: Mapping[str, tuple[str, ir.Value, Labels]]) -> list[tuple[Depends, list[str]]]:
    """The shortest way to something of each kind, going on in the graph that makes what a graph is handed."""
    _, target, labels = known[name]
    found: dict[Depends, list[str]] = {}
    for kind in Depends:
        if kind not in labels.depends[target]:
            continue
        way = _way(target, kind, labels)
        maker = known.get(way[-1])
        if len(way) > 1 and maker is not None and maker[1].producer() is not None:
            for behind, rest in _all_ways(way[-1], known):
                found.setdefault(behind, way + rest[1:])
        else:
            found.setdefault(kind, way)
    return [(kind, found[kind]) for kind in Depends if kind in found]


def _way(target: ir.Value, kind: Depends, labels: Labels) -> list[str]:
    """Breadth first from ``target`` against the edges to an input of ``kind``, or to the Shape that reads a size."""
    came: dict[ir.Value, ir.Value | None] = {target: None}
    queue = [target]
    for value in queue:
        producer = value.producer()
        if producer is None or (kind is Depends.SIZES and producer.op_type == "Shape"):
            way: list[str] = []
            at: ir.Value | None = value
            while at is not None:
                way.append(str(at.name))
                at = came[at]
            way.reverse()
            if producer is not None:
                way.append(f"Shape({next(operands(producer)).name})")
            return way
        for source in operands(producer):
            if kind in labels.depends[source] and source not in came:
                came[source] = value
                queue.append(source)
    raise InvalidInput(f"tensor {target.name!r} does not depend on {kind}")
