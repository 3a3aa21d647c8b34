"""The ONNX Runtime builder for CPUs: optimise the graph once, save it, and read back what was built."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, session_options
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.errors import BuildFailed
from lehr.runtime.noise import batch_normal
from lehr.runtime.spec import ModelSpec

PLAN = "step.onnx"
WEIGHTS = "step.weights"
EMBED_BELOW = 1024  # bytes; larger constants go to one external file, since protobuf ends at 2 GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What the builder made and what the engine says about itself."""

    plan: str
    options: Mapping[str, Any]
    achieved_precision: Mapping[str, float]
    operators: Mapping[str, int]


def build(graph: Path, spec: ModelSpec, folder: Path, *, threads: int) -> Built:
    """Optimise ``graph`` for this processor into ``folder``.

    Args:
        graph: the portable graph; its external weights beside it.
        spec: of the whole model.
        folder: an empty directory.
        threads: worker threads of the engine; 0 is one a core.

    Raises:
        BuildFailed: ONNX Runtime refuses the graph; with its reason.
    """
    options = {"intra_op_threads": threads, "spinning": False}
    made = session_options(options)
    made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    made.optimized_model_filepath = str(folder / PLAN)
    made.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    made.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(EMBED_BELOW))
    try:
        ort.InferenceSession(graph, made, providers=[PROVIDER])
        operators, precision = _inspect(folder / PLAN, spec, options)
    except FAILURES as e:
        raise BuildFailed(f"ONNX Runtime cannot build {graph.name}: {e}") from e
    return Built(plan=PLAN, options=options, achieved_precision=precision, operators=operators)


def _inspect(plan: Path, spec: ModelSpec, options: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, float]]:
    """Run one evaluation under ONNX Runtime's profiler and count what ran, by operator and by element type.

    Element types are weighed by the operators that take floating-point inputs: shape arithmetic says nothing
    about precision.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = session_options(options)
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        made.enable_profiling = True
        made.profile_file_prefix = str(Path(scratch) / "profile")
        session = ort.InferenceSession(plan, made, providers=[PROVIDER])
        batch = 2
        sample = batch_normal(0, range(batch), spec.sample_shape(batch)[1:]).astype(spec.sample.dtype.numpy)
        middle = spec.path.timestep_of([1.0]).astype(spec.timestep.dtype.numpy)
        feeds = {spec.sample.name: sample, spec.timestep.name: middle.repeat(batch)}
        session.run(None, feeds | synthetic_conditions(spec, batch, seed=0))
        events = json.loads(Path(session.end_profiling()).read_text())
    operators: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operators[event["args"]["op_name"]] += 1
        floating = {t for entry in event["args"]["input_type_shape"] for t in entry if "float" in t or t == "double"}
        types.update(floating)
    total = sum(types.values()) or 1
    return dict(sorted(operators.items())), {name: round(n / total, 4) for name, n in sorted(types.items())}
