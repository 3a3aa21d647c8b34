"""The range audit of a stage: how large its tensors become on its golden inputs, and what half precision cannot hold.

A stage runs once a picture and not in a loop, so one evaluation in ONNX Runtime is looked at. What was measured decides
as it does for the denoiser (:mod:`lehr.calibration.keep_high`); the rules about where a node stands are for loops, in
which errors add up, and do not hold here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from lehr.calibration.keep_high import Short, findings, too_short
from lehr.calibration.probe import PEAK, RMS, Measured, instrument
from lehr.calibration.ranges import Ranges, weight_peaks
from lehr.engines.stage_audit import VERSION, audit_file
from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options
from lehr.runtime.edit import Edit
from lehr.runtime.errors import RunFailed
from lehr.runtime.manifest import StageEntry

Array = npt.NDArray[Any]

MARK = 1e38  # a magnitude that no trained network's numbers have


def audit_stage(edit: Edit, entry: StageEntry, feeds: Mapping[str, Array]) -> None:
    """Measure a stage on ``feeds`` and keep in the bundle what each half-precision format must leave in float32.

    Args:
        edit: of the bundle, which has the stage's graph, weights and golden data.
        entry: the stage.
        feeds: its golden inputs.

    Raises:
        RunFailed: a tensor is NaN in float32 already.
    """
    graph = edit.path(entry.graph.file)
    ranges = stage_ranges(graph, feeds)
    model = ir.load(graph)
    found = findings(model, ranges, None)
    kept = {short.value: sorted(too_short(model, found, None, short)) for short in Short}
    sources = [name for name in (entry.graph.file, entry.golden) if name is not None]
    edit.add_json(
        audit_file(entry),
        {
            "version": VERSION,
            "sources": {name: edit.entry(name).sha256 for name in sources},
            "findings": [asdict(finding) for finding in found],
            "keep_high": kept,
        },
    )


def stage_ranges(graph: Path, feeds: Mapping[str, Array], *, threads: int = 0) -> Ranges:
    """The size of every floating-point tensor of a graph in one evaluation.

    What reaches float32's largest number is a mask: a mark and no quantity, counted as zero. A short format makes minus
    infinity of it, which a softmax takes as well.

    Args:
        graph: portable, its weights beside it.
        feeds: its inputs.
        threads: of ONNX Runtime; 0 is one a core.

    Raises:
        RunFailed: a tensor is NaN.
    """
    model, probes = instrument(ir.load(graph), Measured.MOVING)
    weights = weight_peaks(model)
    outputs = _session(model, graph.parent, threads).run(feeds)
    peak, rms = outputs[PEAK], outputs[RMS]
    if (bad := np.flatnonzero(np.isnan(peak))).size:
        raise RunFailed(
            f"tensor {probes[bad[0]].tensor!r} of {graph.parent.name} is NaN in float32 on the golden inputs; the "
            "weights or the inputs are wrong."
        )
    quantity = peak < MARK
    return Ranges(
        probes=tuple(probes),
        timesteps=np.zeros((1, 2)),
        peak=np.where(quantity, peak, 0)[:, None],
        rms=np.where(quantity & np.isfinite(rms), rms, 0)[:, None],
        weights=weights,
        conditions="golden",
        sampler="none",
        evaluations=1,
        samples=len(next(iter(feeds.values()))),
    )


def _session(model: ir.Model, weights: Path, threads: int) -> OnnxRuntimeSession:
    """The graph in ONNX Runtime as it stands: nothing that is made of weights is folded into a copy of them."""
    options = session_options({"intra_op_threads": threads, "spinning": False, "prepacking": False})
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # memory of one tensor is given back before the next
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # measured as soon as it is there
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        proto = ir.to_proto(model).SerializeToString()
        return OnnxRuntimeSession(ort.InferenceSession(proto, options, providers=[PROVIDER]))
    except FAILURES as e:
        raise RunFailed(f"ONNX Runtime cannot run the graph of {weights.name} with its tensors measured: {e}") from e
