"""From the exporter's graph to a portable one: small, named after the module, the same bytes every time.

Parameters have no data here and never get any, so nothing below can fold a weight; what is folded depends on the
module's constants and on no checkpoint.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common
from onnxscript.rewriter import RewritePass, RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

IR_VERSION = 10  # holds every type we use; onnxruntime 1.23 (Python 3.10) executes opset 23 from it
FOLD_INPUTS, FOLD_OUTPUTS = 1 << 13, 1 << 16  # elements, of one folded node: small tables are folded, large are not

# onnxscript's default rules by the operator that a match ends in, less ``slice_split_rule``, which lists the whole
# graph anew for every node, and those of Min and Max, which fail when operands are tried in both orders.
_RULES: dict[str, tuple[RewriteRule, ...]] = {
    "Mul": (rules.mul_by_1_rule,),
    "Add": (rules.add_0_rule,),
    "Sub": (rules.sub_0_rule,),
    "Div": (rules.div_by_1_rule,),
    "Dropout": (rules.dropout_zero_rule, rules.dropout_inference_rule),
    "Reshape": (
        rules.two_reshapes_matmul_reshape_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.materialize_reshape_shape_rule,
        rules.reshape_reshape_rule,
        rules.squeeze_reshape_1d_rule,
    ),
    "Cast": (
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
    ),
    "Slice": (rules.collapse_slice_rule, rules.collapse_slice2_rule),
    "Clip": (rules.successive_clip_relu_rule, rules.successive_clip_rule),
    "Relu": (rules.successive_relu_clip_rule, rules.successive_relu_rule),
    "Expand": (rules.no_op_expand_rule,),
    "Flatten": (rules.flatten_to_reshape_rule,),
    "Transpose": (rules.no_op_transpose_rule, rules.transpose_transpose_rule),
    "Unsqueeze": (rules.unsqueeze_unsqueeze_rule,),
    "ScatterND": (rules.no_op_dynamic_scatter_nd_rule, rules.no_op_static_scatter_nd_rule),
    "Conv": (
        rules.normalize_pad_format_conv_rule,
        rules.fuse_pad_into_conv_rule,
        rules.remove_optional_bias_from_conv_rule,
    ),
    "BatchNormalization": (
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
    ),
    "ConvTranspose": (rules.remove_optional_bias_from_conv_transpose_rule,),
    "Gemm": (rules.remove_optional_bias_from_gemm_rule,),
}
_ROUNDS = 2  # folding makes room for rewriting, and the reverse; a third round has not changed a graph

_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


def tidy(model: ir.Model, rename_size: Callable[[str], str | int | None]) -> None:
    """Simplify and rename ``model`` in place.

    Args:
        model: inputs, outputs and initialisers already bear their final names.
        rename_size: a symbolic size as PyTorch wrote it -> its name, its value, or None for unknown.
    """
    named = {*model.graph.initializers}
    _simplify(model)
    _fix_reshapes(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _rename_sizes(model.graph, rename_size)
    _rename_nodes(model.graph, named)
    _strip(model)
    model.ir_version = IR_VERSION


def _simplify(model: ir.Model) -> None:
    """``onnxscript.optimizer.optimize_ir`` with only those rules that can match here: it tries each on every node."""
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = onnxscript.optimizer.fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=FOLD_INPUTS, output_size_limit=FOLD_OUTPUTS
        )
        present = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)}
        chosen = [rule for operator, some in _RULES.items() if operator in present for rule in some]
        rewritten = bool(chosen) and RewritePass(RewriteRuleSet(chosen, commute=True))(model).modified
        removed = common.RemoveUnusedNodesPass()(model).modified
        if not (folded.modified or rewritten or removed):
            break
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _fix_reshapes(graph: ir.Graph) -> None:
    """Give reshapes constant targets where 0 (keep) and -1 (infer) can say what the graph computes.

    Each block of a transformer otherwise assembles its shapes from the input's, with a dozen nodes that engine
    libraries must run, and that would tie constants to the sample when the graph is cut by rate.
    """
    made: dict[tuple[int, ...], ir.Value] = {}
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        target = _static_target(node)
        if target is None:
            continue
        if target not in made:
            tensor = ir.tensor(list(target), dtype=ir.DataType.INT64, name=f"shape.{len(made)}")
            made[target] = ir.Value(
                name=tensor.name, shape=ir.Shape([len(target)]), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(made[target])
        node.replace_input_with(1, made[target])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _static_target(node: ir.Node) -> tuple[int, ...] | None:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    target: list[int] = []
    for axis, size in enumerate(result.shape):
        kept = axis < len(source.shape) and source.shape[axis] == size
        if isinstance(size, int):
            target.append(size)
        elif size.value is not None and kept:
            target.append(0)
        else:
            target.append(-1)
    return tuple(target) if target.count(-1) <= 1 else None


def _rename_sizes(graph: ir.Graph, rename_size: Callable[[str], str | int | None]) -> None:
    known: dict[str, str | int | None] = {}
    values = [
        *graph.inputs,
        *(output for node in ir.traversal.RecursiveGraphIterator(graph) for output in node.outputs),
    ]
    for value in values:
        if value.shape is None or value.shape.is_static():
            continue
        sizes: list[str | int | None] = []
        for size in value.shape:
            if isinstance(size, int) or size.value is None:
                sizes.append(size if isinstance(size, int) else None)
                continue
            if size.value not in known:
                known[size.value] = rename_size(size.value)
            sizes.append(known[size.value])
        value.shape = ir.Shape(sizes)


def _rename_nodes(graph: ir.Graph, named: set[str]) -> None:
    """Call nodes ``MODULE/OPERATOR`` and their results likewise; number constants that are no one's."""
    scopes: dict[ir.Node, str] = {}
    taken = {value.name for value in graph.inputs} | {value.name for value in graph.outputs} | named
    final = {*graph.inputs, *graph.outputs}
    counts: Counter[str] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        scope = scopes[node] = _scope(node, scopes)
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        while True:
            node.name = base if not counts[base] else f"{base}_{counts[base]}"
            counts[base] += 1
            if node.name not in taken:
                break
        for k, output in enumerate(node.outputs):
            if output not in final:
                output.name = node.name if k == 0 else f"{node.name}.{k}"
    constants = [value for name, value in graph.initializers.items() if name not in named]
    for k, value in enumerate(constants):
        del graph.initializers[value.name or ""]
        value.name = f"constant.{k}"
    for value in constants:
        graph.register_initializer(value)


def _scope(node: ir.Node, scopes: dict[ir.Node, str]) -> str:
    """The module a node was traced in; a node that a rewrite made takes its first producer's."""
    text = node.metadata_props.get(_SCOPES)
    if text is None:
        producers = (value.producer() for value in node.inputs if value is not None)
        return next((scopes[producer] for producer in producers if producer in scopes), "")
    modules = [scope for scope in ast.literal_eval(text)[:-1] if scope != _NO_MODULE]
    return modules[-1] if modules else ""


def _strip(model: ir.Model) -> None:
    """Drop what the exporter notes for its own debugging: file paths, line numbers, signatures."""
    model.doc_string = model.graph.doc_string = None
    for props in (model.metadata_props, model.graph.metadata_props):
        props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            output.doc_string = None
