"""Graphs and engines that show what lies inside: chosen intermediate tensors become outputs.

ONNX Runtime's plan is an optimised graph whose tensors keep their names, so the built engine itself is looked into,
with the weights that stand in it. OpenVINO's is opaque: the portable graph is compiled anew with the recipe's settings
and the marks as further results. Other libraries show nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lehr.engines.graph.passes.decompose_norms import decompose_norms
from lehr.engines.onnxruntime_cpu import IN_PIECES
from lehr.runtime.backends import Session
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import RunFailed

Array = npt.NDArray[Any]

FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
LIBRARIES = ("onnxruntime", "openvino")  # whose engines can be looked into


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One tensor of a portable graph.

    Attributes:
        graph: "prompt", "schedule" or "step".
        tensor: its name.
        node, operator: what computes it.
        reads: positions, in the graph's list of marks, of the tensors that it is computed from, shape arithmetic and
            what lies between left out.
    """

    graph: str
    tensor: str
    node: str
    operator: str
    reads: tuple[int, ...]

    @property
    def layer(self) -> str:
        """The module the node was traced in, or the node itself where it belongs to none."""
        return self.node.rpartition("/")[0] or self.node or self.tensor


def marks(model: ir.Model, graph: str) -> list[Mark]:
    """Every floating-point tensor that a node of ``model`` computes from the graph's inputs, in the graph's order.

    What follows from weights and constants alone is left out: engines fold it away.
    """
    found: list[Mark] = []
    above: dict[ir.Value | None, frozenset[int]] = {value: frozenset() for value in model.graph.inputs}
    for node in model.graph:
        read = [value for value in node.inputs if value in above]
        if not read:
            continue
        reads = frozenset[int]().union(*(above[value] for value in read))
        for out in node.outputs:
            if out.dtype in FLOATING and out.name:
                mark = Mark(
                    graph=graph,
                    tensor=out.name,
                    node=node.name or "",
                    operator=node.op_type,
                    reads=tuple(sorted(reads)),
                )
                found.append(mark)
                above[out] = frozenset({len(found) - 1})
            else:
                above[out] = reads
    return found


def portable_session(bundle: Bundle, graph: str, wanted: Sequence[str], *, threads: int = 0) -> Session:
    """A portable graph in ONNX Runtime at fp32, nothing fused, that also returns the tensors ``wanted``."""
    entry = bundle.manifest.graphs[graph]
    for name in (entry.file, entry.weights):
        if name:
            bundle.path(name)  # checks the hash
    return graph_session(bundle.path(entry.file), wanted, threads=threads)


def graph_session(file: Path, wanted: Sequence[str], *, threads: int = 0) -> Session:
    """An ONNX file in ONNX Runtime as it stands, which also returns those of the tensors ``wanted`` that it has.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        RunFailed: it refuses the graph.
    """
    from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options

    import onnxruntime as ort  # isort: skip

    model = ir.load(file)
    have = {value.name for value in model.graph.outputs}
    by_name = {out.name: out for node in model.graph for out in node.outputs if out.name}
    model.graph.outputs.extend([by_name[name] for name in wanted if name in by_name and name not in have])
    decompose_norms(model, IN_PIECES)  # an engine has none left; what it is held against must keep its digits, too
    options = session_options({"intra_op_threads": threads, "spinning": False})
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    try:
        proto = ir.to_proto(model).SerializeToString()
        return OnnxRuntimeSession(ort.InferenceSession(proto, options, providers=[PROVIDER]))
    except FAILURES as e:
        raise RunFailed(f"ONNX Runtime cannot run {file.name} with its tensors as outputs: {e}") from e


def engine_session(bundle: Bundle, record: EngineRecord, graph: str, wanted: Sequence[str]) -> Session:
    """One graph of an engine that also returns those of the tensors ``wanted`` that it still has.

    Raises:
        RunFailed: engines of this library cannot be looked into, or the library refuses the marks.
        MissingExtra: the library is not installed.
    """
    plan = record.plans[graph]
    for name in bundle.names(record.folder + "/"):
        bundle.path(name)  # checks the hashes
    if record.library == "onnxruntime":
        threads = int(plan.options.get("intra_op_threads", 0))
        return graph_session(bundle.path(f"{record.folder}/{plan.file}"), wanted, threads=threads)
    if record.library == "openvino":
        return _compiled(bundle, graph, plan.options, wanted)
    raise RunFailed(
        f"an engine of {record.library} shows no tensors here, so its layers cannot be compared; those of "
        f"{' and '.join(LIBRARIES)} can be."
    )


def _compiled(bundle: Bundle, graph: str, options: Mapping[str, Any], wanted: Sequence[str]) -> Session:
    from lehr.runtime.backends.openvino import DEVICE, FAILURES, OpenVinoSession, configuration

    import openvino as ov  # isort: skip

    core = ov.Core()
    try:
        model = core.read_model(bundle.path(bundle.manifest.graphs[graph].file))
        known = {name for op in model.get_ops() for port in op.outputs() for name in port.get_names()}
        have = {name for port in model.outputs for name in port.get_names()}
        extra = [name for name in wanted if name in known and name not in have]
        if extra:
            model.add_outputs(extra)
        return OpenVinoSession(core.compile_model(model, DEVICE, configuration(options)))
    except FAILURES as e:
        raise RunFailed(f"OpenVINO cannot compile {graph} with its tensors as outputs: {e}") from e


def as_float32(array: Array) -> npt.NDArray[np.float32]:
    """A tensor of any floating type as float32; bf16 arrives from ONNX Runtime as such already."""
    return np.asarray(array, dtype=np.float32)
