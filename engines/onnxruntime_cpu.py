"""The ONNX Runtime builder for CPUs: optimise a graph once, save it, and read back what was built."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lehr.runtime.backends import backend
from lehr.runtime.engine import STEP, Plan
from lehr.runtime.errors import BuildFailed
from lehr.runtime.recipe import Format, Recipe
from lehr.runtime.whole_loop import LOOP

Array = npt.NDArray[Any]

FORMATS = frozenset({Format.FP32, Format.FP16})  # fp16 by casts to float32 around most operators
LOWERED = frozenset({Format.FP16})
REFUSES = {Format.BF16: "ONNX Runtime's CPU provider has no bf16 MatMul or Conv"}
EMBED_BELOW = 1 << 16  # bytes; sizes must be in the file, and larger weights outside, since protobuf ends at 2 GB


def version() -> str:
    """The installed library's version; raises MissingExtra."""
    return backend("onnxruntime").version()


def build(
    graph: Path,
    feeds: Mapping[str, Array],
    folder: Path,
    *,
    name: str,
    recipe: Recipe,
    threads: int,
) -> Plan:
    """Optimise ``graph`` for this processor into ``folder``; see :class:`lehr.engines.builders.Builder`."""
    from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, session_options  # first: raises MissingExtra

    import onnxruntime as ort  # isort: skip

    if recipe.arithmetic not in FORMATS:
        raise BuildFailed(f"ONNX Runtime cannot build recipe {recipe.name!r}: it computes in fp32 and fp16.")
    # A graph that runs once reads each weight once: rearranging them all first would only take time and memory.
    options = {"intra_op_threads": threads, "spinning": False, "prepacking": name in (STEP, LOOP)}
    plan = folder / f"{name}.onnx"
    made = session_options(options)
    made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    made.optimized_model_filepath = str(plan)
    made.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{name}.weights")
    made.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(EMBED_BELOW))
    try:
        # A hoisted graph runs once: its 16-bit weights stay as they are stored, not folded into copies twice the size.
        disabled = [] if name in (STEP, LOOP) else ["ConstantFolding"]
        ort.InferenceSession(graph, made, providers=[PROVIDER], disabled_optimizers=disabled)
        operators, precision = _inspect(plan, feeds, options)
    except FAILURES as e:
        raise BuildFailed(f"ONNX Runtime cannot build {graph.name}: {e}") from e
    return Plan(file=plan.name, options=options, achieved_precision=precision, operators=operators)


def _inspect(
    plan: Path, feeds: Mapping[str, Array], options: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, float]]:
    """Run one evaluation under ONNX Runtime's profiler and count what ran, by operator and by element type.

    Element types are weighed by the operators that take floating-point inputs: shape arithmetic says nothing
    about precision.
    """
    import onnxruntime as ort

    from lehr.runtime.backends.onnxruntime import PROVIDER, session_options

    with tempfile.TemporaryDirectory() as scratch:
        made = session_options(options)
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        made.enable_profiling = True
        made.profile_file_prefix = str(Path(scratch) / "profile")
        session = ort.InferenceSession(plan, made, providers=[PROVIDER])
        session.run(None, dict(feeds))
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
