"""The OpenVINO builder for CPUs: compile a graph, keep the compiled model without its weights, read back what it is.

A plan is the compiled model as OpenVINO exports it, weights included. Measured on digits-dit and digits-adm in their
parts (2 cores, 2026.4): plans of 7.8 and 6.4 MB, about the size of the weights, whose step graphs load in .1 to .3 s,
where compiling the portable graphs anew takes .4 to .8 s. OpenVINO can also leave the weights out and point into the
graph's file (``CACHE_MODE=OPTIMIZE_SIZE``), but 2026.4 then takes some small constants from there too, where they are
not: the prompt graph of digits-dit does not load, and another could load with wrong numbers. For such surprises a plan
is loaded and compared before the build ends.

OpenVINO takes a precision for a hint. What becomes of it is read from the compiled model, and another format than the
recipe's fails the build: asked for fp16 on an x86-64 processor without it, OpenVINO 2026.4 computes in bf16 and says
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from lehr.engines.job import Job
from lehr.engines.quantised import INTEGER_MARK
from lehr.runtime.backends import backend
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, BundleError, RunFailed
from lehr.runtime.parity import relative_error
from lehr.runtime.recipe import Format, Scope

if TYPE_CHECKING:
    import openvino as ov

Array = npt.NDArray[Any]

PRECISIONS = {Format.FP32: "f32", Format.BF16: "bf16"}
# By the graph; everything around them as the hint says. Weights in nvfp4 are given to it as float32 numbers.
QUANTISED = frozenset({Format.INT8, Format.UINT8, Format.INT4, Format.NVFP4})
FORMATS = frozenset(PRECISIONS) | QUANTISED
LOWERED: frozenset[Format] = frozenset()
REFUSES = {Format.FP16: "OpenVINO's CPU plugin computes in bf16 where a processor has no fp16, and says nothing"}
HEEDS = frozenset({"mode"})
CACHED = True

# OpenVINO's names of the types that say something about precision, in the words of build.json.
TYPES = {"f64": "double", "f32": "float", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8"}
INTEGERS = frozenset({"i8", "u8"})
STORED = frozenset({"i4", "u4"})  # what a product with 4-bit weights is said to compute in: it widens them first
FLOATING = frozenset({"f64", "f32", "f16", "bf16"})
ARITHMETIC = frozenset({"FullyConnected", "MatMul", "Convolution", "Deconvolution", "ScaledDotProductAttention"})
FUSED = "Subgraph"  # code generated for a few operators; attention, where a softmax is among them
# Neither computes: what goes in and out, sizes, and changes of layout or type that the plugin inserts.
SILENT = frozenset({"Input", "Output", "Const", "ShapeOf", "Reorder", "Convert"})
# Hands elements on as they are stored: rows of a 16-bit embedding table are widened after they were picked, not before.
PICKS = frozenset({"Gather"})
RELOAD_ERROR = 1e-2  # of outputs; equal ones are expected, wrong weights give errors of order 1


def version() -> str:
    """The installed library's version; raises MissingExtra."""
    return backend("openvino").version()


def build(job: Job, folder: Path) -> Plan:
    """Compile a graph for this processor into ``folder``; see :class:`lehr.engines.builders.Builder`."""
    return build_for_device(job, folder, device="CPU", precisions=PRECISIONS)


def build_for_device(job: Job, folder: Path, *, device: str, precisions: Mapping[Format, str]) -> Plan:
    """The same for a device of OpenVINO's that stands in this machine, with the formats that it has a word for."""
    from lehr.runtime.backends.openvino import BACKEND, FAILURES, OpenVinoSession, configuration

    import openvino as ov  # isort: skip

    job.settings.hold("OpenVINO", HEEDS)
    graph, recipe = job.graph, job.recipe
    matrices = recipe.scope is Scope.MATRICES  # the graph says which: OpenVINO's hint is for what it does not say
    asked = recipe.rest if recipe.calibrated or matrices else recipe.arithmetic
    known = {*QUANTISED, *(precisions if matrices else ())}
    if asked not in precisions or (recipe.arithmetic is not asked and recipe.arithmetic not in known):
        have = ", ".join(sorted(form.value for form in precisions))
        raise BuildFailed(f"OpenVINO cannot build recipe {recipe.name!r} on a {device}; it has {have}.")
    options = {
        "precision": precisions[asked],
        "threads": job.threads,
        "device": device,
        "mode": job.settings.mode.value,
    }
    plan = folder / f"{job.name}.blob"
    core = ov.Core()
    try:
        model = core.read_model(graph)
        meant = matrices and _has_products(model, precisions[recipe.arithmetic])
        compiled = core.compile_model(model, device, configuration(options))
        outputs = OpenVinoSession(compiled).run(job.feeds)  # kernels are chosen in the first run
        by_graph = frozenset({precisions[recipe.arithmetic]} if matrices else ())
        also = INTEGERS | STORED if recipe.calibrated else by_graph
        operators, precision = _inspect(compiled, str(options["precision"]), graph.name, also=also)
        if meant and not precision.get(TYPES[precisions[recipe.arithmetic]]):
            raise BuildFailed(
                f"OpenVINO computes nothing of {graph.name} in {recipe.arithmetic.value}, which its graph asks for. "
                "Choose a recipe that this processor has arithmetic for."
            )
        plan.write_bytes(compiled.export_model().getbuffer())
        reloaded = BACKEND.load(plan, options).run(job.feeds)
    except (*FAILURES, RunFailed, BundleError) as e:
        raise BuildFailed(f"OpenVINO cannot build {graph.name}: {e}") from e
    for key, output in outputs.items():
        if key not in reloaded:  # a second name, of a tensor that the compiler merged with a result
            continue
        if relative_error(output[None], reloaded[key][None]) > RELOAD_ERROR:
            raise BuildFailed(f"OpenVINO's plan of {graph.name} does not compute {key!r} as before it was saved.")
    return Plan(file=plan.name, options=options, achieved_precision=precision, operators=operators)


def _has_products(model: ov.Model, element: str) -> bool:
    """Whether a graph multiplies in an element type, by what it says of itself."""
    return any(
        op.get_output_size() and op.get_output_element_type(0).to_string() == element
        for op in model.get_ops()
        if op.get_type_name() in ARITHMETIC
    )


def _inspect(
    compiled: ov.CompiledModel, asked: str, graph: str, *, also: Collection[str] = frozenset()
) -> tuple[dict[str, int], dict[str, float]]:
    """Count what runs, by operator and by element type; raises BuildFailed where it is not what was asked for.

    Element types are weighed by the operators that compute on floating-point or quantised values. With bf16,
    OpenVINO keeps some of them in fp32 by itself, sines and ranges among them. ``also`` are the types that the graph
    itself asks for.
    """
    from lehr.runtime.backends.openvino import precision

    operators: Counter[str] = Counter()
    types: Counter[str] = Counter()
    arithmetic: Counter[str] = Counter()
    foreign: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, element = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        if kind in SILENT:
            continue
        multiplies = kind in ARITHMETIC or (kind == FUSED and "Softmax" in info["originalLayersNames"].astype(str))
        operators[kind + INTEGER_MARK if multiplies and element in INTEGERS else kind] += 1
        if multiplies:
            arithmetic[element] += 1
        if kind not in PICKS and (element in FLOATING or (multiplies and element in TYPES)):
            types[element] += 1
            if element not in {"f32", "f64", asked, *also}:
                foreign[f"{kind} in {element}"] += 1
    given = precision(compiled)
    if given != asked or (arithmetic and not set(arithmetic) & {asked, *also}):
        found = ", ".join(f"{count} in {element}" for element, count in sorted(arithmetic.items()))
        raise BuildFailed(
            f"OpenVINO was asked for {asked} and falls back to {given}: of the matrix products and convolutions in "
            f"{graph}, {found or 'none'}. Choose a recipe that this processor has arithmetic for."
        )
    if foreign:
        parts = ", ".join(f"{count} {what}" for what, count in sorted(foreign.items()))
        raise BuildFailed(
            f"OpenVINO was asked for {asked} and computes parts of {graph} in another format: {parts}. Choose another "
            "recipe or library."
        )
    total = sum(types.values()) or 1
    shares = {TYPES[element]: round(count / total, 4) for element, count in sorted(types.items())}
    return dict(sorted(operators.items())), shares
