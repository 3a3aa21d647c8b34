"""The ONNX Runtime builder for CPUs: optimise a graph once, save it, and read back what was built.

Group norms are taken apart first: ONNX Runtime has no kernel for the operator and spells it out in more pieces than it
needs. The step of digits-adm, with 38 of them, takes .84 of the time at batch 2 on one thread of an AMD EPYC (version
1.31, interleaved medians), outputs within 2e-7. Taking attention or layer norms apart gained nothing there and on
digits-dit (.99 and 1.05). Attention over long sequences runs in blocks.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from lehr.engines.job import Job
from lehr.engines.settings import Spinning
from lehr.runtime.backends import backend
from lehr.runtime.engine import STEP, Plan
from lehr.runtime.errors import BuildFailed
from lehr.runtime.precision_schedule import graph_of
from lehr.runtime.recipe import Format
from lehr.runtime.whole_loop import LOOP

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]
Placement = Mapping[str, Mapping[str, int]]  # provider -> operator that takes floating-point inputs -> how often

# fp16 by casts to float32 around most operators; fp8 and nvfp4 by rounding float32 numbers, to measure what they cost.
FORMATS = frozenset({Format.FP32, Format.FP16, Format.INT8, Format.UINT8, Format.INT4, Format.FP8, Format.NVFP4})
LOWERED = frozenset({Format.FP16})
REFUSES = {Format.BF16: "ONNX Runtime's CPU provider has no bf16 MatMul or Conv"}
HEEDS = frozenset({"spinning"})
CACHED = False  # optimising a graph takes no longer than copying its weights
IN_PIECES = frozenset({"GroupNormalization"})
INTEGERS = frozenset({"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QLinearConv", "ConvInteger", "QGemm"})
EMBED_BELOW = 1 << 16  # bytes; sizes must be in the file, and larger weights outside, since protobuf ends at 2 GB


def version() -> str:
    """The installed library's version; raises MissingExtra."""
    return backend("onnxruntime").version()


def build(job: Job, folder: Path) -> Plan:
    """Optimise a graph for this processor into ``folder``; see :class:`lehr.engines.builders.Builder`."""
    job.settings.hold("ONNX Runtime", HEEDS)
    if job.recipe.arithmetic not in FORMATS:
        raise BuildFailed(
            f"ONNX Runtime cannot build recipe {job.recipe.name!r}: it has no {job.recipe.arithmetic.value}."
        )
    again = graph_of(job.name) in (STEP, LOOP)
    # A graph that runs once reads each weight once: rearranging them all first would only take time and memory.
    options = {
        "intra_op_threads": job.threads,
        "spinning": again and job.settings.spinning is Spinning.ON,
        "prepacking": again,
    }
    if job.recipe.arithmetic is Format.FP8:
        options["emulated"] = True
    return optimise(job, folder, options)[0]


def optimise(job: Job, folder: Path, options: dict[str, Any]) -> tuple[Plan, Placement]:
    """Optimise a graph with these options into ``folder``, and say which provider ran what; raises BuildFailed."""
    from lehr.runtime.backends.onnxruntime import (  # first: raises MissingExtra
        FAILURES,
        PROVIDER,
        open_session,
        session_options,
    )

    import onnxruntime as ort  # isort: skip

    graph, name = job.graph, job.name
    given, changed = lowered(graph, job.feeds if options.get("provider", PROVIDER) == PROVIDER else None)
    plan = folder / f"{name}.onnx"
    made = session_options(options)
    made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    made.optimized_model_filepath = str(plan)
    made.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{name}.weights")
    made.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(EMBED_BELOW))
    if options.get("emulated"):  # fusions around quantisers are made for integers and take fp8 for them
        made.add_session_config_entry("session.disable_quant_qdq", "1")
    # By default products with 4-bit weights round their activations to 8 bits, which no recipe asked for.
    made.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    made.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    try:
        # A hoisted graph runs once: its 16-bit weights stay as they are stored, not folded into copies twice the size.
        disabled = [] if graph_of(name) in (STEP, LOOP) else ["ConstantFolding"]
        if options.get("emulated"):
            disabled = [*disabled, "ReluQuantRewrite"]  # takes the zero of fp8 for the least number, and drops Relus
        open_session(given, made, options, disabled)
        operators, precision, placement = executed(plan, job.feeds, options)
    except FAILURES as e:
        raise BuildFailed(f"ONNX Runtime cannot build {graph.name}: {e}") from e
    return Plan(
        file=plan.name, options={**options, **changed}, achieved_precision=precision, operators=operators
    ), placement


def lowered(graph: Path, feeds: Mapping[str, Array] | None = None) -> tuple[Path | bytes, dict[str, Any]]:
    """The graph with operators that this provider computes faster, and what was done to it; itself where it has none.

    It stays as it is where ONNX's own tools are not installed: it computes the same.

    Args:
        graph: any portable graph.
        feeds: of the sizes that attention is to be fast at; without them it stays as it is.
    """
    text = graph.read_bytes()
    apart = sorted(name for name in IN_PIECES if name.encode() in text)
    if not (apart or (feeds and b"Attention" in text)) or importlib.util.find_spec("onnx_ir") is None:
        return graph, {"in_pieces": [], "blocked_attention": False}
    import onnx_ir as ir

    from lehr.engines.graph.lowering import Dialect, lower
    from lehr.engines.graph.passes.blocked_attention import block_attention
    from lehr.engines.graph.passes.merge_affine import merge_affine

    model = ir.load(graph)
    lower(model, model.opset_imports[""], Dialect(name="onnxruntime", pieces=frozenset(apart)))
    merge_affine(model)
    blocked = block_attention(model, _sizes(model, feeds or {})).modified
    return ir.to_proto(model).SerializeToString(), {"in_pieces": apart, "blocked_attention": blocked}


def _sizes(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, int]:
    """What the dimensions of a graph's inputs are in ``feeds``."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        example = feeds.get(str(value.name))
        if example is not None and value.shape is not None:
            sizes |= dict(zip(map(str, value.shape.dims), example.shape, strict=True))
    return sizes


def executed(
    plan: Path, feeds: Mapping[str, Array], options: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, float], Placement]:
    """Run one evaluation under ONNX Runtime's profiler and count what ran, by operator, element type and provider.

    Element types are weighed by the operators that take floating-point inputs: shape arithmetic says nothing
    about precision. Products of integers count by what they multiply.
    """
    import onnxruntime as ort

    from lehr.runtime.backends.onnxruntime import open_session, session_options

    with tempfile.TemporaryDirectory() as scratch:
        made = session_options(options)
        made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        made.enable_profiling = True
        made.profile_file_prefix = str(Path(scratch) / "profile")
        session = open_session(plan, made, options)
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    operators: Counter[str] = Counter()
    types: Counter[str] = Counter()
    placement: dict[str, Counter[str]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operators[event["args"]["op_name"]] += 1
        given = {t for entry in event["args"]["input_type_shape"] for t in entry}
        if event["args"]["op_name"] in INTEGERS:  # their floats are scales
            types.update(t for t in given if t.endswith("int8"))
        else:
            types.update(t for t in given if "float" in t or t == "double")
        if any("float" in t or t == "double" for t in given):
            placement.setdefault(event["args"].get("provider", ""), Counter())[event["args"]["op_name"]] += 1
    total = sum(types.values()) or 1
    shares = {name: round(n / total, 4) for name, n in sorted(types.items())}
    return dict(sorted(operators.items())), shares, placement
