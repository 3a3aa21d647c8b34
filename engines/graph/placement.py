"""Where to cut a graph: which tensors the step graph is handed, and which it works out itself.

The labels of :mod:`lehr.engines.graph.rates` say what *may* be computed once; this module decides what *is*. Nodes
that must run at every step are inside; any other may be, where handing its result over is dearer than computing it
anew: an ``Expand`` that multiplies bytes, a mask made of a few numbers. A node with weights stays out unless its
results outweigh them. Everything is counted in bytes, those read at a step and those held while the loop runs (for
every timestep of the schedule), and the cheapest cut is a minimum cut (Ford and Fulkerson, 1956) of a small network.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import networkx as nx  # type: ignore[import-untyped]
import onnx_ir as ir

from lehr.engines.graph.cost import flops, nbytes, weight_bytes
from lehr.engines.graph.rates import Depends, Labels, Rate, operands
from lehr.runtime.spec import DType

FLOPS_PER_BYTE = 200  # what a processor computes while it reads one byte: a CPU about 10, an Orin 200, an H100 300
STEPS = 20  # of a schedule, each of which keeps its own results
BYTES_PER_NODE = 1 << 16  # what could be read in the few microseconds that it takes to start a node
BYTES_PER_TENSOR = 256  # what handing over one more tensor costs; most are joined
ABSORBED_FLOPS = (
    1e8  # a sample; conditions worked out with less are recomputed for each timestep: no graph of their own
)

_CROSSING = {ir.DataType[dtype.name.replace("FLOAT32", "FLOAT")] for dtype in DType}
_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


@dataclass(slots=True)
class Region:
    """Nodes of one graph-to-be and the values that it is handed."""

    nodes: set[ir.Node]
    handed: set[ir.Value] = field(default_factory=set)


class Placement:
    """Cuts of one labelled graph, at the sizes ``dims``."""

    def __init__(self, graph: ir.Graph, labels: Labels, sample: ir.Value, dims: Mapping[str, int]) -> None:
        self._graph, self._labels, self._sample, self._dims = graph, labels, sample, dims

    # ----------------------------------------------------------------------------------------- which region

    def step(self) -> Region:
        """What runs at every step."""
        nodes = {node for node in self._graph if self._rate(node) is Rate.STEP}
        return self._settled(nodes, self._graph.outputs)

    def schedule(self, wanted: Collection[ir.Value]) -> Region:
        """What runs once per (prompt, solver table), to make those of ``wanted`` that depend on the timestep."""
        wanted = [value for value in wanted if self._labels.rate(value) is Rate.SCHEDULE]
        ancestors = self._ancestors(wanted)
        nodes = {node for node in ancestors if self._rate(node) is Rate.SCHEDULE}
        conditions = ancestors - nodes
        if sum(flops(node, self._dims) for node in conditions) / self._dims["batch"] <= ABSORBED_FLOPS:
            nodes = ancestors
        return self._settled(nodes, wanted)

    def prompt(self, wanted: Collection[ir.Value]) -> Region:
        """What runs once per prompt, to make those of ``wanted`` that no timestep changes."""
        wanted = [value for value in wanted if self._labels.rate(value) is Rate.PROMPT]
        return Region(self._ancestors(wanted), {value for value in wanted if value.producer() is None})

    def is_loose(self, node: ir.Node) -> bool:
        """Whether every graph that needs the node has it: arithmetic on sizes, and on what is constant."""
        depends = self._depends(node)
        return depends is Depends.NOTHING or (
            depends is Depends.SIZES and all(output.dtype in _INTEGERS for output in node.outputs)
        )

    # -------------------------------------------------------------------------------------------- the cut

    def _settled(self, required: set[ir.Node], outputs: Collection[ir.Value]) -> Region:
        """The cheapest region around ``required``: a minimum cut, the smallest region where several are as cheap.

        One side of the cut is inside. A node that may be outside pays its work for being inside; a value that is made
        outside and read inside pays for its bytes once, however many read it.
        """
        network = nx.DiGraph()
        network.add_nodes_from(("inside", "outside"))
        queue = [*dict.fromkeys([*self._frontier(required, outputs)])]
        read_by: dict[ir.Value, set[ir.Node]] = {value: set() for value in queue}
        known: set[ir.Node] = set()
        for value in queue:
            producer = value.producer()
            if producer is None or producer in known:
                continue
            known.add(producer)
            for source in self._sources(producer):
                if source not in read_by:
                    read_by[source] = set()
                    queue.append(source)
                read_by[source].add(producer)
        frontier = self._frontier(required, outputs)
        for value, readers in read_by.items():
            if value in frontier:
                network.add_edge("inside", value)
            for reader in readers:
                network.add_edge(reader, value)
            producer = value.producer()
            _pay(network, value, "outside" if producer is None else producer, self._price(value))
        for node in known:
            _pay(network, node, "outside", self._work(node))
        _, (inside, _) = nx.minimum_cut(network, "inside", "outside")
        nodes = required | {node for node in inside if isinstance(node, ir.Node)}
        return Region(nodes, self._frontier(nodes, outputs))

    def _frontier(self, nodes: set[ir.Node], outputs: Collection[ir.Value]) -> set[ir.Value]:
        read = {value for node in nodes for value in self._sources(node)}
        read |= {value for value in outputs if value.producer() not in nodes}
        return {value for value in read if value.producer() not in nodes}

    def _sources(self, node: ir.Node) -> set[ir.Value]:
        """What a node needs from elsewhere, seen through the loose nodes that come along with it."""
        found: set[ir.Value] = set()
        for value in operands(node):
            producer = value.producer()
            if producer is not None and self.is_loose(producer):
                found |= self._sources(producer)
            elif self._labels.depends[value] is not Depends.NOTHING and not (
                node.op_type == "Shape" and value is self._sample
            ):
                found.add(value)
        return found

    def _work(self, node: ir.Node) -> float:
        """Bytes that a node costs at a step: its weights, read and held, and its work.

        Tables of positions stay outside whatever they cost: sines of large angles are what low precision ruins first.
        """
        if self._depends(node) is Depends.SIZES and all(self.can_cross(value) for value in node.outputs):
            return math.inf
        return 2 * weight_bytes(node) + flops(node, self._dims) / FLOPS_PER_BYTE + BYTES_PER_NODE

    def can_cross(self, value: ir.Value) -> bool:
        """Whether a value can be cached sample by sample: its first dimension is the batch, or it has no batch."""
        sizes = [] if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
        if value.dtype not in _CROSSING or value.shape is None or nbytes(value, self._dims) is None:
            return False
        if value in self._labels.batched:
            return sizes[:1] == ["batch"] and not _mentions_batch(sizes[1:])
        return not _mentions_batch(sizes)

    def _price(self, value: ir.Value) -> float:
        """Bytes read at a step and bytes held, of a value that is handed over; infinite if it cannot be."""
        size = nbytes(value, self._dims)
        if value.producer() is None:
            return 0 if size is None else size
        if size is None or not self.can_cross(value):
            return math.inf
        held = STEPS if self._labels.rate(value) is Rate.SCHEDULE else 1
        return (1 + held) * size + BYTES_PER_TENSOR

    def _ancestors(self, values: Collection[ir.Value]) -> set[ir.Node]:
        found: set[ir.Node] = set()
        queue = list(values)
        while queue:
            producer = queue.pop().producer()
            if producer is None or producer in found or self._depends(producer) is Depends.NOTHING:
                continue
            found.add(producer)
            queue.extend(operands(producer))
        return found

    def _rate(self, node: ir.Node) -> Rate:
        return self._labels.rate(node.outputs[0])

    def _depends(self, node: ir.Node) -> Depends:
        return self._labels.depends[node.outputs[0]]


def _pay(network: nx.DiGraph, source: object, target: object, price: float) -> None:
    # networkx reads a missing capacity as infinite. Whole numbers, since rounding could keep a flow from ending.
    network.add_edge(source, target, **({} if math.isinf(price) else {"capacity": math.ceil(price)}))


def _mentions_batch(sizes: Collection[int | str | None]) -> bool:
    return any(size is None or (isinstance(size, str) and "batch" in size) for size in sizes)
