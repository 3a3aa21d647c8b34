"""From a portable graph down to what one engine library reads."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from lehr.engines.graph.check import MAX_OPSET, MIN_OPSET
from lehr.engines.graph.passes.dead_code import remove_dead_code
from lehr.engines.graph.passes.decompose_attention import decompose_attention
from lehr.engines.graph.passes.decompose_norms import SINCE, decompose_norms
from lehr.engines.graph.passes.redundant import remove_redundant
from lehr.runtime.errors import BuildFailed, InvalidInput

__all__ = ["ONNX", "TENSORRT_10_3", "Dialect", "lower", "set_opset"]

_ATTENTION = "Attention"
_CHANGED = {"GroupNormalization": 21}  # operators that mean something else below this version, by the same form
_VALUES = {  # attribute values that came without a change of form: operator, attribute, value -> since
    ("Pad", "mode", "wrap"): 19,
    ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric"): 19,
    ("Resize", "keep_aspect_ratio_policy", "not_larger"): 18,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one engine library reads ONNX, beyond the operator set's number.

    Attributes:
        name: of the library, for messages.
        pieces: operators that are taken apart although the operator set has them.
    """

    name: str
    pieces: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = sorted(self.pieces - {_ATTENTION, *SINCE})
        if unknown:
            raise InvalidInput(
                f"dialect {self.name!r}: {unknown} cannot be taken apart; {_ATTENTION}, {list(SINCE)} can."
            )


ONNX = Dialect(name="onnx")
TENSORRT_10_3 = Dialect(name="tensorrt-10.3", pieces=frozenset({_ATTENTION}))  # JetPack 6; IAttention came later


def lower(model: ir.Model, opset: int, dialect: Dialect = ONNX) -> ir.Model:
    """Bring a portable graph down to an operator set.

    Args:
        model: changed in place; its weights are not read.
        opset: the ceiling, 18 to 23. A graph that is lower already stays at its own.
        dialect: what else the library wants.

    Returns:
        ``model``.

    Raises:
        InvalidInput: an opset out of range.
        BuildFailed: a node that neither has a form at ``opset`` nor can be taken apart; with its name.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InvalidInput(f"graphs can be lowered to opset {MIN_OPSET} to {MAX_OPSET}, not {opset}.")
    opset = min(opset, model.opset_imports[""])
    if opset < MAX_OPSET or _ATTENTION in dialect.pieces:
        decompose_attention(model)
    decompose_norms(model, [name for name, since in SINCE.items() if since > opset or name in dialect.pieces])
    remove_redundant(model)
    remove_dead_code(model)
    set_opset(model, opset, dialect.name)
    return model


def set_opset(model: ir.Model, opset: int, reader: str = "ONNX") -> None:
    """Declare another operator set, up or down, if every node is valid there and means the same.

    Raises:
        BuildFailed: a node is not; the graph is as it was.
    """
    before = model.opset_imports[""]
    if before == opset:
        return
    dropped: list[tuple[ir.Node, str]] = []
    for node in model.graph.all_nodes():
        if node.domain != "":
            raise BuildFailed(f"node {node.name!r} is of the domain {node.domain!r}, which {reader} does not know.")
        problem = _problem(node, before, opset, dropped)
        if problem:
            raise BuildFailed(
                f"node {node.name!r}: {node.op_type} {problem} at opset {opset}, which {reader} reads. "
                "It has no lowering: choose a target with a newer operator set."
            )
    for node, name in dropped:
        del node.attributes[name]
    model.opset_imports[""] = opset


def _problem(node: ir.Node, before: int, opset: int, dropped: list[tuple[ir.Node, str]]) -> str | None:
    """Why the node cannot be read at ``opset``; collects attributes that say there what is the default here."""
    try:
        old, new = (onnx.defs.get_schema(node.op_type, version, "") for version in (before, opset))
    except onnx.defs.SchemaError:
        return "does not exist"
    if old.since_version == new.since_version:
        return _value_problem(node, opset)
    changed = _CHANGED.get(node.op_type)
    if changed is not None and (before >= changed) != (opset >= changed):
        return "means something else"
    if len(node.inputs) > new.max_input or len(node.outputs) > new.max_output:
        return "has fewer inputs or outputs"
    for name, attribute in node.attributes.items():
        if name in new.attributes:
            continue
        default = old.attributes[name].default_value
        if attribute.value != onnx.helper.get_attribute_value(default):
            return f"has no attribute {name!r}"
        dropped.append((node, name))
    return _value_problem(node, opset) or _type_problem(node, new)


def _value_problem(node: ir.Node, opset: int) -> str | None:
    for (operator, name, value), since in _VALUES.items():
        given = node.attributes.get(name)
        if node.op_type == operator and opset < since and given is not None and given.value == value:
            return f"has no {name} {value!r}"
    return None


def _type_problem(node: ir.Node, schema: onnx.defs.OpSchema) -> str | None:
    constraints = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for k, value in enumerate(values):
            if value is None or value.dtype is None:
                continue
            formal = formals[min(k, len(formals) - 1)]  # the last may stand for many
            if f"tensor({value.dtype.name.lower()})" not in constraints.get(formal.type_str, {formal.type_str}):
                return f"takes no {value.dtype}"
    return None
