"""From a PyTorch module to a portable ONNX graph without weights.

The module is traced on fake tensors: parameters have a shape and nothing else, so FLUX's 12 billion trace in the
memory of a small model, and the graph depends on the architecture alone. Weights are bound later, by name
(:mod:`lehr.engines.graph.weights`).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import json
import linecache
import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from lehr.engines.graph.check import MAX_OPSET, MIN_OPSET
from lehr.engines.graph.weights import TIED, UNUSED
from lehr.export import dims
from lehr.export.decompose import decompose_locally
from lehr.export.dims import Traceable
from lehr.export.tidy import tidy
from lehr.runtime.errors import ExportFailed, InvalidInput

# Attention, Gelu, LayerNormalization and GroupNormalization stay whole (20: all but Attention and GroupNormalization
# in pieces). Against opset 20, ONNX Runtime on one thread: DiT-S/2 .98 × the time with 596 nodes for 752, a small ADM
# 1.13 × with 416 nodes for 773, because its CPU GroupNormalization is made of pieces itself; a lowering can do better.
DEFAULT_OPSET = 23

_HALVES = (torch.float16, torch.bfloat16, torch.float64)
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_CHATTY = ("torch.onnx", "torch.fx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


def trace(module: nn.Module, spec: Traceable, *, opset: int = DEFAULT_OPSET) -> ir.Model:
    """Turn ``module`` into an ONNX graph that computes in float32.

    Args:
        module: on any device, the meta device included; neither changed nor copied. It is traced as in evaluation
            mode, its half and double precision tensors as float32. ``forward`` is called with the spec's inputs by
            name and returns the spec's outputs, as a tensor or a tuple.
        spec: names, shapes and dimensions; each dimension with a range stays dynamic.
        opset: ONNX operator set, 18 to 23.

    Returns:
        A graph with the spec's signature. Parameters and buffers of the state dict are initialisers of the same name
        without data; other buffers and constants are embedded. Tracing twice gives the same bytes.

    Raises:
        InvalidInput: an operator set that is not supported.
        ExportFailed: a forward signature or outputs other than the spec's, a dimension that cannot stay dynamic,
            decisions on tensor values, state or randomness in forward, or an operator that ONNX has not.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InvalidInput(f"opset must be {MIN_OPSET} to {MAX_OPSET}, got {opset}.")
    order = _argument_order(module, spec)
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    skeleton = _skeleton(module, spec, fake)
    with _quiet(), _collector_paused():
        program = _export(skeleton, spec, order, fake)
        _check_structure(program, spec)
        values = dict(zip(order, _values(program, program.graph_signature.user_inputs), strict=True))
        env = values[order[0]].fake_mode.shape_env  # the exporter makes its own
        symbols = dims.size_symbols(spec, {name: value.shape for name, value in values.items()}, env)
        dims.check_guards(spec, symbols, env)
        for index, value in enumerate(_values(program, program.graph_signature.user_outputs)):
            dims.check_output(spec, index, value.shape, symbols)
        model = _convert(program, spec, opset)
        _name_signature(model, spec, order)
        _unbind(model)
        try:
            tidy(model, lambda text: dims.rewrite(text, symbols))
        except RuntimeError as e:  # onnxscript's folding, when an operator was written in a form it cannot compute
            raise ExportFailed(
                f"{spec.name}: the graph cannot be simplified: {str(e).rstrip('.')}. Slice with sizes of the spec's "
                "dimensions instead of cutting one into a number of parts, or report the operator to onnxscript."
            ) from e
    _check_operators(model, spec)
    _describe(model, module, spec)
    return model


# ------------------------------------------------------------------------------------------- before the trace


def _argument_order(module: nn.Module, spec: Traceable) -> list[str]:
    """The spec's input names in the order of forward's parameters."""
    names = [tensor.name for tensor in spec.inputs]
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(**dict.fromkeys(names))
    except TypeError as e:
        raise ExportFailed(
            f"{spec.name}: forward{signature} cannot be called with the spec's inputs {names}: {e}. "
            "Name the parameters as the spec names its inputs."
        ) from e
    if set(bound.arguments) != set(names):
        raise ExportFailed(
            f"{spec.name}: forward{signature} takes inputs through **{next(iter(set(bound.arguments) - set(names)))}. "
            "Name each of the spec's inputs as a parameter."
        )
    return list(bound.arguments)


def _skeleton(module: nn.Module, spec: Traceable, fake: FakeTensorMode) -> nn.Module:
    """A copy of the module whose stored tensors are fake; what the state dict does not hold keeps its values."""
    stored = set(module.state_dict(keep_vars=True))
    stand_ins: dict[int, Any] = {}
    for name, tensor in _tensors(module).items():
        if torch.nn.parameter.is_lazy(tensor):
            raise ExportFailed(f"{spec.name}: parameter {name!r} has no shape yet. Run the module once before export.")
        dtype = torch.float32 if tensor.dtype in _HALVES else tensor.dtype
        if name in stored or tensor.is_meta or isinstance(tensor, FakeTensor):
            with fake:
                made = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        else:
            made = tensor.detach().to("cpu", dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        stand_ins.setdefault(id(tensor), nn.Parameter(made, requires_grad=False) if is_parameter else made)
    try:
        return copy.deepcopy(module, stand_ins).eval()
    except (TypeError, RuntimeError, NotImplementedError) as e:
        raise ExportFailed(
            f"{spec.name}: the module cannot be copied: {_reason(e)}. "
            "Keep what cannot be copied (locks, streams, results of earlier calls) out of its attributes."
        ) from e


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter prints graphs and warns of its own affairs; what matters is raised."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused operator that ONNX has not
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A trace makes millions of objects that live to its end; Python would go through them again and again."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


# -------------------------------------------------------------------------------------------------- the trace


def _export(skeleton: nn.Module, spec: Traceable, order: list[str], fake: FakeTensorMode) -> ExportedProgram:
    sizes, inputs = dims.trace_sizes(spec), {tensor.name: tensor for tensor in spec.inputs}
    asked = dims.dynamic_shapes(spec)
    try:
        with fake, torch.no_grad():
            feeds = {
                name: torch.zeros(inputs[name].sizes(sizes), dtype=getattr(torch, inputs[name].dtype.value))
                for name in order
            }
            shapes = {name: asked[name] for name in order}
            return torch.export.export(skeleton, (), feeds, dynamic_shapes=shapes, strict=False)
    except GuardOnDataDependentSymNode as e:
        raise ExportFailed(
            f"{spec.name}: forward decides on the values of a tensor{_place(e)}, and a graph has no values yet "
            f"({_reason(e)}). Use torch.where, or decide when the module is built."
        ) from e
    except Exception as e:  # whatever the user's forward raises, and much that PyTorch does, passes here
        sentence = dims.violation(spec, str(e))
        if sentence is None:
            sentence = (
                f"{spec.name}: forward cannot be traced{_place(e)}: {_reason(e)}. Check that it runs on inputs of the "
                f"spec's shapes and dtypes ({', '.join(f'{name} {tuple(feeds[name].shape)}' for name in order)}) and "
                "uses PyTorch operations only."
            )
        raise ExportFailed(sentence) from e


def _convert(program: ExportedProgram, spec: Traceable, opset: int) -> ir.Model:
    whole = program.run_decompositions

    def decompose(table: dict[Any, Any]) -> ExportedProgram:
        return program if decompose_locally(program, table) else whole(table)

    program.run_decompositions = decompose  # asked for by the exporter below
    try:
        converted: Any = torch.onnx.export(
            program, dynamo=True, opset_version=opset, optimize=False, verbose=False, external_data=False
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError, AssertionError) as e:
        raise ExportFailed(
            f"{spec.name}: the traced module cannot be written as ONNX: {_reason(e)}. "
            "Express it with operations that ONNX has, or report the operator to PyTorch."
        ) from e
    outputs = converted.exported_program.graph_signature.output_specs
    changed = [output.target for output in outputs if output.kind is OutputKind.BUFFER_MUTATION]
    if changed:
        raise ExportFailed(
            f"{spec.name}: forward changes its buffer {changed[0]!r}; an engine keeps no state between calls. "
            "Compute a new tensor instead."
        )
    model: ir.Model = converted.model
    return model


def _values(program: ExportedProgram, names: Iterable[Any]) -> list[Any]:
    """The fake tensors that stand for the graph's inputs or outputs."""
    nodes = {node.name: node for node in program.graph.nodes}
    return [nodes[name].meta["val"] for name in names]


def _check_structure(program: ExportedProgram, spec: Traceable) -> None:
    """Raise ExportFailed unless forward returned a tensor or a flat tuple of tensors, of the spec's number and kind."""
    tree = program.call_spec.out_spec
    names = [tensor.name for tensor in spec.outputs]
    flat = tree is not None and (
        tree.is_leaf() or (tree.type in (tuple, list) and tree.num_leaves == tree.num_children)
    )
    if not flat or tree.num_leaves != len(names):
        found = "nothing" if tree is None else getattr(tree.type, "__name__", "a tensor")
        count = 0 if tree is None else tree.num_leaves
        raise ExportFailed(
            f"{spec.name}: forward returns {found} of {count} values; expected a tensor or a tuple for the outputs "
            f"{names}. Wrap the module so that it returns those and nothing else."
        )
    nodes = {node.name: node for node in program.graph.nodes}
    for tensor, name in zip(spec.outputs, program.graph_signature.user_outputs, strict=True):
        value = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        if not isinstance(value, Tensor):
            raise ExportFailed(f"{spec.name}: output {tensor.name!r} is no tensor. Return tensors only.")
        if value.dtype != getattr(torch, tensor.dtype.value):
            raise ExportFailed(
                f"{spec.name}: output {tensor.name!r} is {value.dtype}, the spec says {tensor.dtype.value}. "
                "Convert it at the end of forward, or correct the spec."
            )


# ------------------------------------------------------------------------------------------- after the trace


def _name_signature(model: ir.Model, spec: Traceable, order: list[str]) -> None:
    """Give inputs and outputs the spec's names, sizes and order."""
    graph = model.graph
    clashing = {tensor.name for tensor in (*spec.inputs, *spec.outputs)} & set(graph.initializers)
    if clashing:
        raise ExportFailed(f"{spec.name}: {sorted(clashing)} name both a tensor of the spec and a weight. Rename one.")
    by_name = dict(zip(order, graph.inputs, strict=True))
    graph.inputs.clear()
    for tensor in spec.inputs:
        by_name[tensor.name].name = tensor.name
        graph.inputs.append(by_name[tensor.name])
    for tensor, value in zip(spec.outputs, graph.outputs, strict=True):
        value.name = tensor.name


def _unbind(model: ir.Model) -> None:
    """Drop the stand-ins of weights; turn real constants into plain arrays."""
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, FakeTensor):
            value.const_value = None
        elif isinstance(raw, Tensor):
            value.const_value = ir.tensor(raw.detach().contiguous().numpy(), name=name)


def _check_operators(model: ir.Model, spec: Traceable) -> None:
    random = sorted({node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)} & _RANDOM)
    if random:
        raise ExportFailed(
            f"{spec.name}: forward draws random numbers ({', '.join(random)}); an engine is a function of its inputs. "
            "Make the noise an input."
        )


def _describe(model: ir.Model, module: nn.Module, spec: Traceable) -> None:
    """Fix what a file says about its making, and note which stored tensors it does without."""
    model.graph.name = spec.name
    model.producer_name, model.producer_version = "lehr", f"torch {torch.__version__.partition('+')[0]}"
    for tensor, value in zip((*spec.inputs, *spec.outputs), (*model.graph.inputs, *model.graph.outputs), strict=True):
        value.shape = ir.Shape(tensor.shape)
    used = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    tensors, stored = _tensors(module), set(module.state_dict(keep_vars=True))
    owner = {id(tensors[name]): name for name in used}
    idle = [name for name in tensors if name in stored and name not in used]
    tied = {name: owner[id(tensors[name])] for name in idle if id(tensors[name]) in owner}
    unused = [name for name in idle if name not in tied]
    if tied:
        model.metadata_props[TIED] = json.dumps(tied)
    if unused:
        model.metadata_props[UNUSED] = json.dumps(unused)


# -------------------------------------------------------------------------------------------------- wording


def _reason(error: BaseException) -> str:
    """The first line that says something, of the error at the root."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].partition(" (unhinted")[0][:300].rstrip(".") if lines else "no message"
    return text if isinstance(error, RuntimeError) else f"{type(error).__name__}: {text}"


def _place(error: BaseException) -> str:
    """Where in the module's own code the error arose: `` at FILE line N (`CODE`)``, or nothing."""
    libraries = {Path(made.__file__).parent for made in (torch, ir) if made.__file__}
    ours = Path(__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and path != ours and not any(library in path.parents for library in libraries):
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f" at {path.name} line {frame.lineno} (`{code[:120]}`)"
    return ""
