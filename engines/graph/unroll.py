"""A whole sampling loop as one graph: noise and conditions in, samples out.

A solver table is a fixed sum of products, so for a few-step model the loop can be written out: the prompt graph once,
the schedule graph and the step graph once an evaluation, and between them the table's rows. Weights are shared by all
evaluations. An engine of it draws a picture in one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lehr.engines.graph.split import Part
from lehr.runtime.errors import ExportFailed, InvalidInput
from lehr.runtime.hoisted import PROMPT, SCHEDULE, SHAPE_SUFFIX, STEP
from lehr.runtime.recurrence import Kept, Recurrence
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import GraphSpec, ModelSpec, TensorSpec, Varies
from lehr.runtime.table_ops import Clip, LearnedVariance
from lehr.runtime.whole_loop import MAX_EVALUATIONS, NOISE, SAMPLES, WITHOUT, noise_name


def unroll(parts: Mapping[str, Part], spec: ModelSpec, table: SolverTable, *, guidance_scale: float = 1.0) -> Part:
    """Write the loop of ``table`` out.

    Args:
        parts: the denoiser's graphs, as :func:`lehr.engines.graph.split.split` returns them.
        spec: of the denoiser.
        table: of at most 16 evaluations, with a recurrence and without dynamic thresholding.
        guidance_scale: of classifier-free guidance; 1 is none. With it every condition has a second input, named
            ``NAME.without``, for what guidance subtracts.

    Returns:
        A graph with the inputs ``noise`` (unit noise of the sample's shape), ``noise.1`` … for what the sampler
        injects, and the conditions; its output is ``samples``.

    Raises:
        InvalidInput: a table that cannot be written out.
        ExportFailed: the graphs hold control flow.
    """
    return _Loop(parts, spec, table, guidance_scale).written()


class _Loop:
    def __init__(self, parts: Mapping[str, Part], spec: ModelSpec, table: SolverTable, guidance_scale: float) -> None:
        form = table.recurrence()
        if len(table) > MAX_EVALUATIONS:
            raise InvalidInput(
                f"{table.sampler} has {len(table)} evaluations, a whole-loop graph at most {MAX_EVALUATIONS}: each is "
                "a copy of the network. Run it step by step."
            )
        if form is None or form.wide:
            raise InvalidInput(
                f"{table.sampler} with {len(table)} evaluations has no recurrence in float32, so it cannot be one "
                "graph. Choose another sampler (lehr list samplers), or run it step by step."
            )
        if table.clip is not None and not isinstance(table.clip, Clip):
            raise InvalidInput(f"{table.sampler}: dynamic thresholding cannot be part of a graph; run it step by step.")
        if guidance_scale != 1.0 and not spec.conditions:
            raise InvalidInput(f"{spec.name} has no conditions, so guidance cannot act on it.")
        self._parts, self._spec, self._table, self._scale = parts, spec, table, guidance_scale
        self._form: Recurrence = form
        first = parts[STEP].model
        self._graph = ir.Graph([], [], nodes=[], opset_imports=dict(first.graph.opset_imports), name=first.graph.name)
        self._ir_version = first.ir_version
        self._metadata = dict(first.metadata_props)
        self._constants: dict[Any, ir.Value] = {}

    # ------------------------------------------------------------------------------------------------ the loop

    def written(self) -> Part:
        table, form, spec = self._table, self._form, self._spec
        inputs = self._inputs()
        x_T = self._scaled(self._input(inputs[0]), table.init_noise_sigma)
        noises = {k: self._input(tensor) for k, tensor in enumerate(inputs[1 : 1 + table.num_noises])}
        conditions = self._conditions(inputs[1 + table.num_noises :])
        shape = self._op("Shape", [x_T if self._scale == 1.0 else self._op("Concat", [x_T, x_T], axis=0)])
        known = {**conditions, spec.sample.name + SHAPE_SUFFIX: shape}
        if PROMPT in self._parts:
            known |= self._copy(PROMPT, known, "prompt/")
        batch = self._op("Slice", [shape, self._ints([0]), self._ints([1])])
        rows: dict[int, ir.Value] = {}
        banks: dict[tuple[int, int], ir.Value] = {}
        variance: ir.Value | None = None
        current = x_T
        for i, row in enumerate(form.rows):
            terms = [(row.start, x_T)]
            terms += [(c, rows[j]) for j, c in row.inputs]
            terms += [(c, banks[bank, j]) for bank, j, c in row.outputs]
            terms += [(c, self._noise(noises[j], j, variance)) for j, c in row.noises]
            current = self._sum(terms)
            if i == len(table):
                break
            rows[i] = current
            prediction, variance = self._evaluated(i, current, batch, known)
            banks[0, i] = prediction
            if form.kept is not Kept.OUTPUT:
                banks[0, i] = self._sum([(form.from_input[i], current), (form.from_output[i], prediction)])
            if isinstance(table.clip, Clip):
                pair = [(table.denoised_from_input[i], current), (table.denoised_from_output[i], prediction)]
                limits = [self._float(-table.clip.limit), self._float(table.clip.limit)]
                banks[1, i] = self._op("Clip", [self._sum(pair), *limits])
        used = bool(current.uses()) or current.producer() is None
        result = self._op("Identity", [current], name=SAMPLES) if used else current
        result.name = SAMPLES
        result.shape, result.dtype = ir.Shape(spec.sample.shape), ir.DataType.FLOAT
        self._graph.outputs.append(result)
        output = TensorSpec(name=SAMPLES, shape=spec.sample.shape, varies=Varies.SAMPLE)
        model = ir.Model(self._graph, ir_version=self._ir_version)
        model.metadata_props.update(self._metadata)
        return Part(model=model, spec=GraphSpec(inputs=inputs, outputs=(output,)))

    def _inputs(self) -> tuple[TensorSpec, ...]:
        sample, spec = self._spec.sample, self._spec
        names = [NOISE, *(noise_name(k) for k in range(self._table.num_noises))]
        noises = [TensorSpec(name=name, shape=sample.shape, varies=Varies.SAMPLE) for name in names]
        if self._scale == 1.0:
            return (*noises, *spec.conditions)
        batched = [tensor for tensor in spec.conditions if tensor.batched]
        without = [TensorSpec(name=t.name + WITHOUT, dtype=t.dtype, shape=t.shape, varies=t.varies) for t in batched]
        return (*noises, *spec.conditions, *without)

    def _conditions(self, tensors: Sequence[TensorSpec]) -> dict[str, ir.Value]:
        """Conditions by name, in front of each the half without; order and arithmetic are the loop's own."""
        made = {tensor.name: self._input(tensor) for tensor in tensors}
        if self._scale == 1.0:
            return made
        return {
            tensor.name: self._op("Concat", [made[tensor.name + WITHOUT], made[tensor.name]], axis=0)
            if tensor.batched
            else made[tensor.name]
            for tensor in self._spec.conditions
        }

    def _evaluated(
        self, i: int, current: ir.Value, batch: ir.Value, known: Mapping[str, ir.Value]
    ) -> tuple[ir.Value, ir.Value | None]:
        """The guided prediction at evaluation ``i``, and the channels of a learned variance."""
        spec, channels = self._spec, self._spec.sample.shape[1]
        doubled = current if self._scale == 1.0 else self._op("Concat", [current, current], axis=0)
        timestep = self._op("Expand", [self._float(float(self._table.timesteps[i])), batch])
        if spec.timestep.dtype.value != "float32":
            to = ir.DataType.from_numpy(spec.timestep.dtype.numpy)
            timestep = self._op("Cast", [timestep], to=int(to))
        feeds = {**known, spec.sample.name: doubled, spec.timestep.name: timestep}
        if SCHEDULE in self._parts:
            feeds |= self._copy(SCHEDULE, feeds, f"step{i}/schedule/")
        output = own = self._copy(STEP, feeds, f"step{i}/")[spec.outputs[0].name]
        if self._scale != 1.0:
            without, with_condition = self._op_many("Split", [output], 2, axis=0, num_outputs=2)
            own = with_condition  # a learned variance is not guided: it stays the condition's own
            difference = self._op("Sub", [with_condition, without])
            output = self._op("Add", [without, self._scaled(difference, self._scale)])
        if self._table.variance is None and spec.outputs[0].shape[1] == channels:
            return output, None
        ends = [self._ints([int(channels)]), self._ints([np.iinfo(np.int64).max])]  # int: channels are never dynamic
        axis = self._ints([1])
        prediction = self._op("Slice", [output, self._ints([0]), ends[0], axis])
        return prediction, self._op("Slice", [own, ends[0], ends[1], axis])

    def _noise(self, noise: ir.Value, j: int, variance: ir.Value | None) -> ir.Value:
        kind = self._table.variance
        if kind in (None, LearnedVariance.UNUSED) or variance is None:
            return noise
        if kind is LearnedVariance.DIRECT:
            return self._op("Mul", [noise, self._op("Sqrt", [variance])])
        slope = 0.0 if self._table.variance_slopes is None else float(self._table.variance_slopes[j])
        return self._op("Mul", [noise, self._op("Exp", [self._scaled(variance, slope)])])

    # ------------------------------------------------------------------------------------------------ pieces

    def _copy(self, name: str, feeds: Mapping[str, ir.Value], prefix: str) -> dict[str, ir.Value]:
        """Append a copy of one part's nodes; returns its outputs by name."""
        source = self._parts[name].model.graph
        copied: dict[ir.Value, ir.Value] = {value: feeds[str(value.name)] for value in source.inputs}
        for key, value in source.initializers.items():
            copied[value] = self._shared(key, value)
        for node in source:
            if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
                raise ExportFailed(
                    f"{node.name}: control flow cannot be part of a whole-loop graph; leave --unroll out."
                )
            outputs = [ir.Value(name=prefix + str(v.name), shape=v.shape, type=v.type) for v in node.outputs]
            inputs = [None if value is None else copied[value] for value in node.inputs]
            self._graph.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    tuple(node.attributes.values()),
                    outputs=outputs,
                    name=prefix + str(node.name or node.outputs[0].name),
                )
            )
            copied.update(zip(node.outputs, outputs, strict=True))
        return {str(value.name): copied[value] for value in source.outputs}

    def _shared(self, key: str, value: ir.Value) -> ir.Value:
        if key not in self._graph.initializers:
            self._graph.initializers[key] = ir.Value(
                name=key, shape=value.shape, type=value.type, const_value=value.const_value
            )
        return self._graph.initializers[key]

    def _input(self, tensor: TensorSpec) -> ir.Value:
        dtype = ir.DataType.from_numpy(tensor.dtype.numpy)
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def _sum(self, terms: Iterable[tuple[float, ir.Value]]) -> ir.Value:
        """Σ c x in float32, in the loop's order; a coefficient of 0 leaves its term out."""
        products = [self._scaled(value, float(c)) for c, value in terms if c != 0]
        total = products[0]
        for product in products[1:]:
            total = self._op("Add", [total, product])
        return total

    def _scaled(self, value: ir.Value, factor: float) -> ir.Value:
        return value if factor == 1 else self._op("Mul", [value, self._float(factor)])

    def _op(self, kind: str, inputs: Sequence[ir.Value], *, name: str | None = None, **attributes: Any) -> ir.Value:
        return self._op_many(kind, inputs, 1, name=name, **attributes)[0]

    def _op_many(
        self, kind: str, inputs: Sequence[ir.Value], count: int, *, name: str | None = None, **attributes: Any
    ) -> list[ir.Value]:
        label = name or f"loop/{kind}_{len(self._graph)}"
        outputs = [ir.Value(name=label if k == 0 else f"{label}.{k}") for k in range(count)]
        self._graph.append(ir.node(kind, list(inputs), attributes, outputs=outputs, name=label))
        return outputs

    def _float(self, number: float) -> ir.Value:
        return self._constant(np.array(number, np.float32))

    def _ints(self, numbers: Sequence[int]) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"loop.constant.{len(self._constants)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]
