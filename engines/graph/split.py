"""One graph into three by rate: ``prompt``, ``schedule`` and ``step``.

The step graph reads what the other two have computed, as inputs that vary with the prompt or the timestep. Small
tensors of one shape, such as the modulations of every block, are joined in the graph that makes them and taken apart
in the step graph, so a transformer of 57 blocks hands over a handful of tensors and not hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from lehr.engines.graph.cost import nbytes, shape_at
from lehr.engines.graph.placement import Placement, Region
from lehr.engines.graph.rates import Labels, Rate, label
from lehr.runtime.errors import ExportFailed
from lehr.runtime.hoisted import PROMPT, SCHEDULE, SHAPE_SUFFIX, STEP
from lehr.runtime.spec import DType, GraphSpec, ModelSpec, TensorSpec, Varies

JOINED_BELOW = 1 << 17  # bytes a sample of one tensor; taking a joined tensor apart copies it at every step
_VARIES = {Rate.PROMPT: Varies.PROMPT, Rate.SCHEDULE: Varies.TIMESTEP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the graphs, with its signature. Its weights are still to be bound, all parts to one file."""

    model: ir.Model
    spec: GraphSpec


def split(model: ir.Model, spec: ModelSpec) -> dict[str, Part]:
    """Cut ``model`` by rate.

    Args:
        model: a denoiser's graph with named sizes, as :func:`lehr.export.trace.trace` makes it; it is left alone, the
            parts are copies that share its tensors.
        spec: what the graph's inputs vary with.

    Returns:
        The parts by name in the order in which they run: "prompt" and "schedule" where there is anything in them, and
        "step", which takes the sample and returns what ``model`` returns.

    Raises:
        ExportFailed: the spec does not describe the graph, or the output does not depend on the sample.
    """
    model = model.clone()
    _read_sizes_from_sample(model.graph, spec)
    dims = spec.default_sizes()
    labels = label(model.graph, spec.inputs)
    if any(labels.rate(value) is not Rate.STEP for value in model.graph.outputs):
        raise ExportFailed(f"{spec.name}: the output does not depend on the sample; check what its inputs vary with.")
    sample = next(value for value in model.graph.inputs if value.name == spec.sample.name)
    placement = Placement(model.graph, labels, sample, dims)
    step = placement.step()
    schedule = placement.schedule(step.handed)
    prompt = placement.prompt([*step.handed, *schedule.handed])
    order = {value: k for k, value in enumerate(_values(model.graph))}
    cutter = _Cutter(model, spec, labels, dims, order)
    parts = {
        PROMPT: cutter.hoisted(prompt, to_step=_made(prompt, step), to_schedule=_made(prompt, schedule)),
        SCHEDULE: cutter.hoisted(schedule, to_step=_made(schedule, step), to_schedule=[]),
    }
    joined = {value: join for part in parts.values() if part is not None for value, join in part.joined.items()}
    found = {name: part.finished for name, part in parts.items() if part is not None}
    return {**found, STEP: cutter.step(step, joined)}


def _made(by: Region, for_: Region) -> list[ir.Value]:
    return [value for value in for_.handed if value.producer() in by.nodes]


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _read_sizes_from_sample(graph: ir.Graph, spec: ModelSpec) -> None:
    """Let every ``Shape`` of one size that the sample has read the sample, whose shape all graphs know."""
    sample = next(value for value in graph.inputs if value.name == spec.sample.name)
    for node in list(graph):
        if node.op_type != "Shape" or node.inputs[0] is sample or node.inputs[0] is None:
            continue
        names = _names(node.inputs[0])[slice(*_range(node))]
        if len(names) == 1 and isinstance(names[0], str) and names[0] in spec.sample.shape:
            axis = spec.sample.shape.index(names[0])
            node.replace_input_with(0, sample)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)


def _range(shape: ir.Node) -> tuple[int, int]:
    """The axes that a ``Shape`` reads."""
    rank = len(_names(shape.inputs[0])) if shape.inputs[0] is not None else 0
    start = shape.attributes["start"].as_int() if "start" in shape.attributes else 0
    end = shape.attributes["end"].as_int() if "end" in shape.attributes else rank
    return start + rank * (start < 0), end + rank * (end < 0)


def _read_sizes_from_others(graph: ir.Graph) -> None:
    """Drop inputs that serve only to tell a size which another input tells too."""
    for value in list(graph.inputs):
        readers = [node for node, _ in value.uses()]
        if not readers or any(node.op_type != "Shape" for node in readers):
            continue
        others = {
            name: (other, axis)
            for other in graph.inputs
            if other is not value
            for axis, name in enumerate(_names(other))
        }
        for node in readers:
            names = _names(value)[slice(*_range(node))]
            name = names[0] if len(names) == 1 else None
            if isinstance(name, str) and name in others:
                other, axis = others[name]
                node.replace_input_with(0, other)
                node.attributes["start"] = ir.AttrInt64("start", axis)
                node.attributes["end"] = ir.AttrInt64("end", axis + 1)
        if not value.uses():
            graph.inputs.remove(value)


# ------------------------------------------------------------------------------------------------- joining


@dataclass(frozen=True, slots=True)
class _Join:
    """Values handed over as one, one behind the other along ``axis``."""

    name: str
    values: tuple[ir.Value, ...]
    axis: int

    @property
    def sizes(self) -> list[int]:
        shapes = [value.shape for value in self.values]
        return [int(shape[self.axis]) for shape in shapes if shape is not None]  # type: ignore[arg-type]

    @property
    def shape(self) -> list[int | str | None]:
        shape = _names(self.values[0])
        shape[self.axis] = sum(self.sizes)
        return shape


def _names(value: ir.Value) -> list[int | str | None]:
    return [] if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]


@dataclass(frozen=True, slots=True)
class _Hoisted:
    finished: Part
    joined: Mapping[ir.Value, _Join]


class _Cutter:
    """Copies regions of one graph into graphs of their own."""

    def __init__(
        self,
        model: ir.Model,
        spec: ModelSpec,
        labels: Labels,
        dims: Mapping[str, int],
        order: Mapping[ir.Value, int],
    ) -> None:
        self._model, self._spec, self._labels, self._dims, self._order = model, spec, labels, dims, order
        self._sample = next(value for value in model.graph.inputs if value.name == spec.sample.name)

    def hoisted(
        self, region: Region, *, to_step: Sequence[ir.Value], to_schedule: Sequence[ir.Value]
    ) -> _Hoisted | None:
        """A graph that makes what the others need, joined where only the step graph does; None if they need nothing."""
        outputs = sorted({*to_step, *to_schedule}, key=self._order.__getitem__)
        if not outputs:
            return None
        graph = self._extract(region, outputs)
        made = dict(zip(outputs, list(graph.outputs), strict=True))
        graph.outputs.clear()
        joins = self._joins([value for value in outputs if value not in to_schedule])
        single = [value for value in outputs if not any(value in join.values for join in joins)]
        for join in joins:
            result = ir.Value(name=join.name, shape=ir.Shape(join.shape), type=ir.TensorType(_dtype(join.values[0])))
            sources = [made[value] for value in join.values]
            graph.append(ir.node("Concat", sources, {"axis": join.axis}, outputs=[result], name=join.name))
            graph.outputs.append(result)
        graph.outputs.extend(made[value] for value in single)
        self._feed_shape(graph)
        part = self._part(graph, {join.name: join.values[0] for join in joins})
        return _Hoisted(part, {value: join for join in joins for value in join.values})

    def step(self, region: Region, joined: Mapping[ir.Value, _Join]) -> Part:
        """The step graph, which takes joined values apart."""
        graph = self._extract(region, self._model.graph.outputs)
        inputs = {value.name: value for value in graph.inputs}
        first = graph[0] if len(graph) else None
        for join in dict.fromkeys(joined.values()):
            whole = ir.Value(name=join.name, shape=ir.Shape(join.shape), type=ir.TensorType(_dtype(join.values[0])))
            graph.inputs.append(whole)
            taken = [inputs[value.name] for value in join.values]
            for value in taken:
                graph.inputs.remove(value)
            pieces = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in taken]
            sizes = _constant(graph, f"{join.name}.sizes", join.sizes)
            node = ir.node("Split", [whole, sizes], {"axis": join.axis}, outputs=pieces, name=f"{join.name}/Split")
            if first is None:
                graph.append(node)
            else:
                graph.insert_before(first, node)
            for value, piece in zip(taken, pieces, strict=True):
                ir.convenience.replace_all_uses_with(value, piece)
        _read_sizes_from_others(graph)
        origin = {str(value.name): value for value in region.handed}
        origin |= {join.name: join.values[0] for join in joined.values()}
        return self._part(graph, origin)

    # --------------------------------------------------------------------------------------------- pieces

    def _extract(self, region: Region, outputs: Sequence[ir.Value]) -> ir.Graph:
        """A copy of the nodes that ``outputs`` need down to what the region is handed, its inputs in a fixed order."""
        source = self._model.graph
        boundary: set[ir.Value] = set(region.handed) | set(source.inputs)
        shapes = [node.outputs[0] for node in source if node.op_type == "Shape" and node.inputs[0] is self._sample]
        if self._sample not in region.handed:
            boundary.update(shapes)  # fed as "sample.shape" instead
        ordered: list[ir.Value] = sorted(boundary, key=lambda value: self._order[value])
        graph = ir.convenience.extract(source, ordered, outputs)
        for value in [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
            graph.inputs.remove(value)
        # The extraction gathers initialisers in a set; the file's bytes must not depend on addresses.
        rank = {value.name: k for value, k in self._order.items()}
        values = sorted(graph.initializers.values(), key=lambda value: rank[value.name])
        graph.initializers.clear()
        for value in values:
            graph.initializers[str(value.name)] = value
        return graph

    def _feed_shape(self, graph: ir.Graph) -> None:
        """Replace the sample's sizes, which a hoisted graph takes as inputs, by slices of the sample's shape."""
        axes = {
            node.outputs[0].name: _range(node)
            for node in self._model.graph
            if node.op_type == "Shape" and node.inputs[0] is self._sample
        }
        taken = [value for value in graph.inputs if value.name in axes]
        if not taken:
            return
        rank = len(self._spec.sample.shape)
        whole = ir.Value(
            name=self._spec.sample.name + SHAPE_SUFFIX,
            shape=ir.Shape([rank]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.inputs.append(whole)
        first = graph[0]
        for value in taken:
            graph.inputs.remove(value)
            start, end = axes[value.name]
            bounds = [_constant(graph, f"{value.name}.{name}", [at]) for name, at in (("start", start), ("end", end))]
            piece = ir.Value(name=value.name, shape=value.shape, type=value.type)
            graph.insert_before(first, ir.node("Slice", [whole, *bounds], outputs=[piece], name=value.name))
            ir.convenience.replace_all_uses_with(value, piece)

    def _joins(self, outputs: Sequence[ir.Value]) -> list[_Join]:
        groups: dict[tuple[object, ...], list[ir.Value]] = {}
        for value in outputs:
            shape, size = shape_at(value, self._dims), nbytes(value, self._dims)
            batched = value in self._labels.batched
            axis = _join_axis(value)
            if axis is None or shape is None or size is None or not batched:
                continue
            if size / self._dims["batch"] > JOINED_BELOW:
                continue
            others = [name for k, name in enumerate(_names(value)) if k != axis]
            key = (value.dtype, len(shape), axis, tuple(others), self._labels.rate(value))
            groups.setdefault(key, []).append(value)
        joins = [values for values in groups.values() if len(values) > 1]
        return [
            _Join(f"{self._labels.rate(values[0]).value}.{k}", tuple(values), _join_axis(values[0]) or 0)
            for k, values in enumerate(joins)
        ]

    def _part(self, graph: ir.Graph, origin: Mapping[str, ir.Value]) -> Part:
        """Wrap a graph up, its inputs in the order sample, timestep, conditions, handed over."""
        declared = {tensor.name: tensor for tensor in self._spec.inputs}
        rank = {name: k for k, name in enumerate(declared)}
        ordered = sorted(graph.inputs, key=lambda value: (rank.get(str(value.name), len(rank)), str(value.name)))
        graph.inputs.clear()
        graph.inputs.extend(ordered)
        model = ir.Model(graph, ir_version=self._model.ir_version)
        graph.opset_imports.update(self._model.opset_imports)
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)
        model.metadata_props.update(self._model.metadata_props)
        graph.name = self._model.graph.name
        outputs = {tensor.name: tensor for tensor in self._spec.outputs}
        spec = GraphSpec(
            inputs=tuple(declared.get(str(v.name)) or self._describe(v, origin) for v in graph.inputs),
            outputs=tuple(outputs.get(str(v.name)) or self._describe(v, origin) for v in graph.outputs),
        )
        return Part(model=model, spec=spec)

    def _describe(self, value: ir.Value, origin: Mapping[str, ir.Value]) -> TensorSpec:
        name = str(value.name)
        if name.endswith(SHAPE_SUFFIX):
            varies = Varies.CONSTANT
        else:
            source = origin.get(name) or next(v for v in self._order if v.name == name)
            varies = _VARIES[self._labels.rate(source)]
        shape = tuple(size for size in _names(value) if size is not None)
        return TensorSpec(name=name, dtype=DType(str(_dtype(value).numpy())), shape=shape, varies=varies)


def _join_axis(value: ir.Value) -> int | None:
    """The last axis that is longer than one, if its size is fixed and not the batch."""
    names = _names(value)
    long = [axis for axis, size in enumerate(names) if size != 1]
    if not long or long[-1] == 0 or not isinstance(names[long[-1]], int):
        return None
    return long[-1]


def _constant(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    tensor = ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ExportFailed(f"tensor {value.name!r} has no element type, so it cannot be handed from graph to graph.")
    return value.dtype
