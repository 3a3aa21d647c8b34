"""Layers and step graphs timed on this machine, as an engine library runs them: integer kernels, fused quantisers.

A layer is cut out of the graph with its quantisers and run by itself on the inputs that it really gets, so what it
takes to quantise them counts. Layers of one kind, shape and choice are timed once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from lehr.calibration.configs import config_to_json
from lehr.calibration.cost_model import Choices, Costs, Source
from lehr.calibration.execute import OrtGraph, Session, inlined
from lehr.calibration.layers import Layer
from lehr.engines.graph.lowering.unsigned import shift_activations
from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options
from lehr.runtime.errors import MissingExtra, RunFailed

Array = npt.NDArray[Any]
Compile = Callable[[ir.Model, int], Session]
Progress = Callable[[int, int], None]

ROUNDS, WARM_UP = 15, 3
CALL_SECONDS = 0.004  # of one session in a round, at least, as several calls: below, clocks are too coarse
ROWS = 2  # of a batch: guidance's two halves of one sample


# -------------------------------------------------------------------------------------------------- libraries


def by_onnxruntime(model: ir.Model, threads: int) -> Session:
    """A graph as ONNX Runtime fuses it, with unsigned activations; the model is changed in place."""
    shift_activations(model)
    options = session_options({"intra_op_threads": threads, "spinning": False})
    try:
        session = ort.InferenceSession(ir.to_proto(inlined(model)).SerializeToString(), options, providers=[PROVIDER])
    except FAILURES as e:
        raise RunFailed(f"ONNX Runtime cannot run the graph: {e}") from e
    return OnnxRuntimeSession(session)


def by_openvino(model: ir.Model, threads: int) -> Session:
    """A graph as OpenVINO compiles it for latency; the model's weights are read into memory."""
    from lehr.runtime.backends.openvino import DEVICE, OpenVinoSession, configuration
    from lehr.runtime.backends.openvino import FAILURES as REFUSALS

    import openvino as ov  # isort: skip

    try:
        read = ov.Core().read_model(ir.to_proto(inlined(model)).SerializeToString())
        compiled = ov.Core().compile_model(read, DEVICE, configuration({"precision": "f32", "threads": threads}))
    except REFUSALS as e:
        raise RunFailed(f"OpenVINO cannot run the graph: {e}") from e
    return OpenVinoSession(compiled)


def libraries() -> dict[str, Compile]:
    """The engine libraries that are installed here, by name."""
    found: dict[str, Compile] = {"onnxruntime": by_onnxruntime}
    try:
        from lehr.runtime.backends import openvino
    except MissingExtra:
        return found
    return {openvino.BACKEND.name: by_openvino, **found}


# ------------------------------------------------------------------------------------------------------- clocks


def interleaved(sessions: Mapping[str, Session], feeds: Mapping[str, Mapping[str, Array]]) -> dict[str, float]:
    """Median milliseconds of one call of each session on its own feeds, the sessions taking turns."""
    repeats: dict[str, int] = {}
    for name, session in sessions.items():
        for _ in range(WARM_UP):
            session.run(feeds[name])
        started = time.perf_counter()
        session.run(feeds[name])
        repeats[name] = max(1, round(CALL_SECONDS / max(1e-6, time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                session.run(feeds[name])
            times[name].append(1e3 * (time.perf_counter() - started) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def step_milliseconds(
    graphs: Mapping[str, Callable[[], ir.Model]], feeds: Mapping[str, Array], *, threads: int = 0
) -> dict[str, dict[str, float]]:
    """Library -> graph -> median milliseconds of one evaluation; libraries that refuse a graph leave it out."""
    found: dict[str, dict[str, float]] = {}
    for library, compile_ in libraries().items():
        sessions: dict[str, Session] = {}
        for name, make in graphs.items():
            session = _attempt(compile_, make(), threads)
            if session is not None:
                sessions[name] = session
        found[library] = interleaved(sessions, dict.fromkeys(sessions, feeds))
    return found


def _attempt(compile_: Compile, model: ir.Model, threads: int) -> Session | None:
    try:
        return compile_(model, threads)
    except RunFailed:
        return None


# ------------------------------------------------------------------------------------------------------- layers


def measured_costs(
    graphs: Mapping[str, Callable[[], ir.Model]],
    found: Iterable[Layer],
    choices: Choices,
    feeds: Mapping[str, Array],
    *,
    reference: str,
    threads: int = 0,
    deadline: float | None = None,
    on_layer: Progress | None = None,
) -> Costs | None:
    """Time each different layer in each option, on OpenVINO where it is installed, else on ONNX Runtime.

    Args:
        graphs: option -> makes the step graph with that option wherever it is possible.
        found: the layers.
        choices: what each layer can be made.
        feeds: of the step graph, to run the layers with real inputs.
        reference: the option under which nothing is quantised.
        threads: 0 is one a core.
        deadline: of ``time.monotonic``.
        on_layer: told how many of all different layers are timed.

    Returns:
        The costs, in milliseconds, of the options that the library takes: OpenVINO refuses 4-bit blocks that do not
        fill a layer's channels. None if the deadline passed first.

    Raises:
        RunFailed: the library refuses a layer as it is.
    """
    library, compile_ = next(iter(libraries().items()))
    made = {option: make() for option, make in graphs.items()}
    chosen = [layer for layer in found if layer.name in choices]
    inputs = _layer_inputs(graphs[reference](), chosen, feeds, threads)
    classes: dict[str, list[Layer]] = {}
    for layer in chosen:
        shapes = [(inputs[name].shape, str(inputs[name].dtype)) for name in layer.inputs]
        options = {option: config_to_json(config) for option, config in choices[layer.name].items()}
        classes.setdefault(repr((layer.kind, layer.weight_shape, shapes, options)), []).append(layer)
    values: dict[str, dict[str, float]] = {}
    for done, alike in enumerate(classes.values()):
        if deadline is not None and time.monotonic() > deadline:
            return None
        first = alike[0]
        sessions = {reference: compile_(_cut(made[reference], first), threads)}
        for option in choices[first.name]:
            session = None if option == reference else _attempt(compile_, _cut(made[option], first), threads)
            if session is not None:
                sessions[option] = session
        given = {name: inputs[name] for name in first.inputs}
        times = interleaved(sessions, dict.fromkeys(sessions, given))
        values |= {layer.name: dict(times) for layer in alike}
        if on_layer is not None:
            on_layer(done + 1, len(classes))
    return Costs(source=Source.MEASURED, unit="ms", where=library, values=values)


def few_rows(feeds: Mapping[str, Array], batch: int, rows: int = ROWS) -> dict[str, Array]:
    """Feeds of a batch cut down to some rows; what is not batched stays."""
    return {name: value[:rows] if len(value) == batch else value for name, value in feeds.items()}


def _layer_inputs(
    model: ir.Model, chosen: Sequence[Layer], feeds: Mapping[str, Array], threads: int
) -> dict[str, Array]:
    """What the layers are given in one evaluation; the model gets more outputs."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    wanted = dict.fromkeys(name for layer in chosen for name in layer.inputs)
    known = {name: np.asarray(feeds[name]) for name in wanted if name in feeds}
    for name in wanted:
        if name not in known and values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
    outputs = OrtGraph(model, threads=threads).run(feeds)
    return known | {name: outputs[name] for name in wanted if name not in known}


def _cut(model: ir.Model, layer: Layer) -> ir.Model:
    """One layer of a graph by itself, with the quantisers that belong to it."""
    part = ir.convenience.extract(model.graph, list(dict.fromkeys(layer.inputs)), [layer.output])
    return ir.Model(part, ir_version=model.ir_version)
