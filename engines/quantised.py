"""From a calibrated recipe in a bundle to a graph that one engine library reads, and what became of it.

The quantised step graph is portable; each library gets a copy with what it needs: unsigned activations, weights of
formats that it does not know as float32, the rest of the graph in half precision where the recipe says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from lehr.engines.audit import AUDIT, audited
from lehr.engines.stage_audit import audit_file, audited_stage
from lehr.engines.target import Target
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import GRAPH, RECORD, WEIGHTS, calibrated_folder, check_current, read_calibrated
from lehr.runtime.engine import STEP
from lehr.runtime.errors import BuildFailed, InvalidInput, MissingExtra
from lehr.runtime.recipe import Format, Recipe, Scope

# Operators of ONNX Runtime that multiply integers; OpenVINO's are marked where they are counted.
_INTEGER = frozenset({"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QLinearConv", "ConvInteger", "QGemm"})
INTEGER_MARK = " int8"  # behind the name of an operator that multiplies integers, in a plan's list of operators
# Libraries whose int8 kernels want unsigned activations, and which operands of two activations' products stay signed.
_UNSIGNED = {"onnxruntime": (1,), "openvino": (0, 1)}


def calibrated_files(bundle: Bundle, recipe: Recipe, lowered: Collection[Format], stage: str | None = None) -> set[str]:
    """Files that an engine of the recipe is made from, beside the portable graphs.

    Raises:
        InvalidInput: the bundle is not calibrated for the recipe, or for other weights; with the command that does.
    """
    files = set[str]().union(*(calibrated_files(bundle, part, lowered, stage) for part in recipe.parts.values()))
    if recipe.calibrated or recipe.schedule:
        check_current(bundle, read_calibrated(bundle, recipe.name, stage))
        kept = (GRAPH, WEIGHTS, RECORD) if recipe.calibrated else (RECORD,)
        files |= {f"{calibrated_folder(recipe.name, stage)}/{name}" for name in kept}
    halved = recipe.rest if recipe.calibrated else recipe.arithmetic
    if halved not in lowered or recipe.scope is not Scope.GRAPH:
        return files
    if stage is None:
        return files | {AUDIT}
    audit = audit_file(bundle.manifest.stage(stage))
    return files | ({audit} & set(bundle.manifest.files))  # a stage without one can be built in bf16


def lower_calibrated(
    bundle: Bundle,
    target: Target,
    library: str,
    recipe: Recipe,
    name: str,
    lowered: Collection[Format],
    scratch: Path,
    *,
    stage: str | None = None,
) -> Path:
    """The quantised graph as an engine library reads it, with weights of its own in ``scratch``.

    Args:
        bundle: calibrated for the recipe.
        target: says whether it has products in fp32.
        library: that will read the graph.
        recipe: quantised.
        name: of the graph; a whole loop written out is not quantised.
        lowered: formats that the library takes from the graph alone.
        scratch: an empty folder.
        stage: whose graph it is; None for the denoiser's.

    Raises:
        InvalidInput: not calibrated, calibrated for another graph, or a whole loop; or an audit that is missing.
        MissingExtra: onnx-ir is not installed.
    """
    if name != STEP:
        raise InvalidInput(
            f"{bundle.root.name} holds a whole loop as one graph, which is not quantised. Export the model without "
            f"--unroll, or build recipe fp16 or fp32."
        )
    calibrated_files(bundle, recipe, lowered, stage)
    try:
        import onnx_ir as ir

        from lehr.engines.graph.lowering.restored import restore_weights
        from lehr.engines.graph.lowering.save import write_graph
        from lehr.engines.graph.lowering.unsigned import shift_activations
        from lehr.engines.graph.passes.half import convert_to_half
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    folder = calibrated_folder(recipe.name, stage)
    graph = bundle.path(f"{folder}/{GRAPH}")
    bundle.path(f"{folder}/{WEIGHTS}")
    model = ir.load(graph)
    if library in _UNSIGNED:
        shift_activations(model, signed=_UNSIGNED[library])
        restore_weights(model, [ir.DataType.FLOAT4E2M1])
    rest = recipe.rest
    if Format.FP32 not in target.formats:
        rest = Format.FP16  # SM 7.5 multiplies matrices in fp16 only
    if rest in lowered:
        dtype = ir.DataType.BFLOAT16 if rest is Format.BF16 else ir.DataType.FLOAT16
        kept = audited(bundle, rest.value) if stage is None else audited_stage(bundle, stage, rest)
        names = [f"{node.name}" for node in model.graph]
        # What was taken apart since the audit bears the old name in front of its own.
        high = {n for n in names if n in kept or any(n.startswith(f"{k}.") for k in kept)}
        if Format.FP32 not in target.formats:
            from lehr.engines.graph.lowering.products import PRODUCTS

            products = {f"{node.name}" for node in model.graph if node.op_type in PRODUCTS}
            high -= products
        convert_to_half(model, keep_high=high, dtype=dtype)
    return write_graph(model, scratch, f"{STEP}.onnx")


def check_achieved(
    bundle: Bundle, recipe: Recipe, library: str, operators: Mapping[str, int], stage: str | None = None
) -> None:
    """Hold an engine's operators against the plan: every int8 layer multiplies integers.

    Args:
        bundle: calibrated for the recipe.
        recipe: of the engine.
        library: that built it.
        operators: of the step graph; empty where only the machine that it is for could read them.
        stage: that the engine computes; None for the denoiser.

    Raises:
        BuildFailed: the library computes some of them in floating point, slower than fp32 and for nothing.
    """
    if not recipe.calibrated or not operators:
        return
    plan = read_calibrated(bundle, recipe.name, stage).record.get("plan", {})
    asked = sum(1 for config in plan.values() if config.get("type") == "Int8")
    made = sum(n for op, n in operators.items() if op in _INTEGER or op.endswith(INTEGER_MARK))
    if made < asked:
        raise BuildFailed(
            f"{library} computes {asked - made} of {asked} int8 layers in floating point: it has no integer kernel for "
            "them (ONNX Runtime multiplies convolutions in integers only where their results are rounded, too). "
            "Build with --library openvino, or another recipe."
        )
