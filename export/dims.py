"""Dynamic dimensions through ``torch.export``: what is asked of it, and whether the graph really serves it.

PyTorch traces at one set of sizes and records *guards*, relations under which the trace holds. For a dimension
declared as a multiple (``4 * unit``) it records guards that contradict the declaration and exports all the same
(2.13: a module that halves twice exports with ``multiple=2``). So every guard is evaluated here, at the ends of each
dimension's range, beside its default, and at each constant that a guard compares with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import sympy  # type: ignore[import-untyped]  # torch brings it
import torch

from lehr.runtime.errors import ExportFailed
from lehr.runtime.spec import Dim, TensorSpec

Sizes = dict[str, int]
Symbols = dict[sympy.Symbol, sympy.Expr]  # torch's size symbols, in terms of the spec's dimensions


class Traceable(Protocol):
    """What a trace needs to know of a graph: a ModelSpec or a StageSpec."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def dims(self) -> tuple[Dim, ...]: ...

    def dim(self, name: str) -> Dim: ...


def dim_symbol(name: str) -> sympy.Symbol:
    """The spec's dimension ``name`` in size expressions."""
    return sympy.Symbol(name, integer=True, positive=True)


# --------------------------------------------------------------------------------------------------- asking


def _units(dim: Dim) -> tuple[int, int]:
    return -(-dim.min // dim.multiple), dim.max // dim.multiple


def is_dynamic(dim: Dim) -> bool:
    """Whether a dimension has sizes to choose from; torch cannot tell a size of 1 unit from a broadcast."""
    low, high = _units(dim)
    return high > low


def trace_sizes(spec: Traceable) -> Sizes:
    """The sizes to trace at: the defaults, but two units where the default is one, which torch would fix."""
    return {dim.name: max(dim.default, 2 * dim.multiple) if is_dynamic(dim) else dim.default for dim in spec.dims}


def dynamic_shapes(spec: Traceable) -> dict[str, dict[int, Any]]:
    """For each input, torch's dimension by axis."""
    dims: dict[str, Any] = {}
    for dim in filter(is_dynamic, spec.dims):
        low, high = _units(dim)
        if dim.multiple == 1:
            dims[dim.name] = torch.export.Dim(dim.name, min=low, max=high)
        else:
            dims[dim.name] = dim.multiple * torch.export.Dim(f"_{dim.name}", min=low, max=high)
    return {
        tensor.name: {axis: _asked(spec, size, dims) for axis, size in enumerate(tensor.shape) if _varies(spec, size)}
        for tensor in spec.inputs
    }


def _varies(spec: Traceable, size: int | str) -> bool:
    """Whether a size of an input's shape is dynamic: a dimension with a range, or a share of one."""
    return isinstance(size, str) and any(is_dynamic(spec.dim(name)) for name in _named(spec, size))


def _named(spec: Traceable, size: str) -> list[str]:
    return [dim.name for dim in spec.dims if re.search(rf"\b{dim.name}\b", size)]


def _asked(spec: Traceable, size: int | str, dims: Mapping[str, Any]) -> Any:
    """torch's dimension for a size: of "height/2", where height is 8 units, 4 units."""
    if size in dims:
        return dims[str(size)]
    names = _named(spec, str(size))
    symbol = dim_symbol(names[0])
    factor = sympy.sympify(size, locals={names[0]: symbol}) / symbol
    units = factor * spec.dim(names[0]).multiple
    if len(names) > 1 or not units.is_Integer or units < 1:
        raise ExportFailed(
            f"{spec.name}: an input has the size {size!r}, expected a whole number of units of one dimension, as half "
            "of one that is declared a multiple of 2. Declare the multiple, or give the size a dimension of its own."
        )
    low, high = _units(spec.dim(names[0]))
    multiple = spec.dim(names[0]).multiple
    root = torch.export.Dim(names[0] if multiple == 1 else f"_{names[0]}", min=low, max=high)
    return root if units == 1 else int(units) * root


# ------------------------------------------------------------------------------------------------ answering


def size_symbols(spec: Traceable, shapes: Mapping[str, Sequence[Any]], env: Any) -> Symbols:
    """Read off what torch calls each dimension.

    Args:
        spec: what was asked.
        shapes: of the traced inputs by name, sizes being integers or torch's symbolic ones.
        env: the ``ShapeEnv`` of the trace.

    Raises:
        ExportFailed: torch has turned a dynamic dimension into a number.
    """
    symbols: Symbols = {}
    declared = {dim.name for dim in spec.dims}
    for tensor in spec.inputs:
        for axis, size in enumerate(tensor.shape):
            if not isinstance(size, str) or size not in declared or not is_dynamic(spec.dim(size)):
                continue  # what is a share of a dimension torch has learnt to be one
            traced = shapes[tensor.name][axis]
            expression = sympy.sympify(traced if isinstance(traced, int) else traced.node.expr)
            free = expression.free_symbols
            if len(free) != 1:
                raise ExportFailed(
                    f"{_where(spec, size)} cannot stay dynamic: tracing fixed it to {expression}. "
                    "Make the module compute with the input's own size, or put the number into the spec's shape."
                )
            symbol = free.pop()
            meaning = dim_symbol(size) * symbol / expression
            if symbols.setdefault(symbol, meaning) != meaning:
                raise ExportFailed(
                    f"{_where(spec, size)} cannot be chosen freely: the module needs {size} = {expression} where "
                    f"{symbol} = {symbols[symbol]}. Fix both in the spec's shapes, or free the module of the relation."
                )
    for symbol, expression in env.replacements.items():
        if symbol not in symbols:
            symbols[symbol] = sympy.sympify(env.replace(expression)).xreplace(symbols)
    return symbols


def check_guards(spec: Traceable, symbols: Symbols, env: Any) -> None:
    """Raise ExportFailed if the trace does not hold at sizes that the spec allows."""
    guards = list(dict.fromkeys(guard.expr for guard in env.guards))
    constants = {int(c) for guard in guards for c in guard.atoms(sympy.Integer) if c > 1}
    ones = [expression for guard in guards for expression in _compared_with_one(guard)]
    base = trace_sizes(spec)
    for sizes in probes(spec, constants):
        point = _point(symbols, sizes)
        for guard in guards:
            if guard.xreplace(point) != sympy.false or any(one.xreplace(point) == 1 for one in ones):
                continue  # a map of one pixel: torch keeps apart what broadcasts, ONNX decides when it runs
            changed = next((name for name in sizes if sizes[name] != base[name]), next(iter(sizes)))
            raise ExportFailed(
                f"{_where(spec, changed)} cannot be {sizes[changed]}, which the spec allows: traced at "
                f"{base[changed]}, the module relies on {_readable(guard, symbols)}. Narrow the dimension in the "
                "spec (min, max, multiple), or do not let the module depend on it in this way."
            )


def probes(spec: Traceable, constants: set[int]) -> Iterator[Sizes]:
    """Sizes to test: each dimension alone, and all together at their ends. None has a dimension of one unit."""
    base = trace_sizes(spec)
    yield base
    ends: tuple[Sizes, Sizes] = ({}, {})
    for dim in filter(is_dynamic, spec.dims):
        low, high = (units * dim.multiple for units in _units(dim))
        low = max(low, min(high, 2 * dim.multiple))
        near = {low, low + dim.multiple, base[dim.name] - dim.multiple, base[dim.name] + dim.multiple, high}
        near |= {k * dim.multiple for c in constants for k in (c // dim.multiple, c // dim.multiple + 1, c)}
        for size in sorted(size for size in near if low <= size <= high):
            yield base | {dim.name: size}
        ends[0][dim.name], ends[1][dim.name] = low, high
    yield base | ends[0]
    yield base | ends[1]


def _point(symbols: Symbols, sizes: Sizes) -> dict[sympy.Symbol, sympy.Expr]:
    """The value of each of torch's symbols where the spec's dimensions have ``sizes``."""
    values = {dim_symbol(name): sympy.Integer(size) for name, size in sizes.items()}
    return {symbol: expression.xreplace(values) for symbol, expression in symbols.items()}


def _compared_with_one(guard: Any) -> Iterator[Any]:
    """Expressions that torch assumes not to be 1, in any of the forms it writes that."""
    if not isinstance(guard, sympy.core.relational.Relational):
        return
    left, right = guard.args
    if isinstance(guard, sympy.Ne):
        yield from (a for a, b in ((left, right), (right, left)) if b == 1)
    elif (type(guard), right) in ((sympy.GreaterThan, 2), (sympy.StrictGreaterThan, 1)):
        yield left


def check_output(spec: Traceable, index: int, shape: Sequence[Any], symbols: Symbols) -> None:
    """Raise ExportFailed unless the traced shape of output ``index`` is the spec's at every probed size."""
    tensor = spec.outputs[index]
    found = tuple(sympy.sympify(size if isinstance(size, int) else size.node.expr) for size in shape)
    for sizes in probes(spec, set()):
        point = _point(symbols, sizes)
        if tuple(size.xreplace(point) for size in found) != tensor.sizes(sizes):
            traced = ", ".join(_readable(size, symbols) for size in found)
            raise ExportFailed(
                f"{spec.name}: output {tensor.name!r} has shape ({traced}), the spec says {tensor.shape}. "
                "A number where a dimension is expected was fixed by tracing: a table or a reshape of the module "
                "depends on the size it was made for."
            )


def rewrite(text: str, symbols: Symbols) -> str | int | None:
    """A size that torch wrote as text, in the spec's dimensions: ``4*s56`` -> ``height``; None if unreadable."""
    try:
        expression = sympy.sympify(text, locals={str(symbol): symbol for symbol in symbols}).xreplace(symbols)
    except (sympy.SympifyError, TypeError, AttributeError):
        return None
    if expression.is_Integer:
        return int(expression)
    known = {dim_symbol(str(symbol)) for symbol in expression.free_symbols} == expression.free_symbols
    return str(expression) if known else None


# -------------------------------------------------------------------------------------------------- wording


def violation(spec: Traceable, message: str) -> str | None:
    """A sentence for torch's report of violated constraints; None if ``message`` is none."""
    start = re.search(r"Constraints violated \(([^)]*)\)", message)
    if start is None:
        return None
    mentioned = re.findall(r"[^\W\d]\w*", start.group(1))  # a multiple stands there as 4*_height
    reasons = [_in_names(spec, line.strip()[2:]) for line in message.splitlines() if line.strip().startswith("- ")]
    name = next((dim.name for dim in spec.dims if {dim.name, f"_{dim.name}"} & {*mentioned}), spec.dims[0].name)
    reason = next((reason for reason in reasons if name in reason), reasons[0] if reasons else "no reason given")
    fixes = [line.strip() for line in message.partition("Suggested fixes:")[2].splitlines() if "=" in line]
    fix = f" PyTorch would accept {'; '.join(fixes)}." if fixes else ""
    return (
        f"{_where(spec, name)} cannot stay dynamic: {reason.partition(' If you')[0].rstrip('.')}.{fix} "
        "Narrow the dimension in the spec (min, max, multiple), or make the module compute with the input's own size."
    )


def _where(spec: Traceable, name: str) -> str:
    tensor = next((tensor for tensor in spec.inputs if name in tensor.shape), spec.inputs[0])
    return f"{spec.name}: dimension {name!r} of input {tensor.name!r}"


def _in_names(spec: Traceable, text: str) -> str:
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs}

    def named(match: re.Match[str]) -> str:
        shape, axis = shapes.get(match.group(1), ()), int(match.group(2))
        return str(shape[axis]) if axis < len(shape) else match.group(0)

    text = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", named, text)
    return re.sub(r"\b(\w+) = \1\b", r"\1", text)


def _readable(expression: Any, symbols: Symbols) -> str:
    text = str(expression)
    for symbol, meaning in symbols.items():
        text = re.sub(rf"\b{symbol}\b", str(meaning) if meaning.is_Symbol else f"({meaning})", text)
    return re.sub(r"\(\(([^()]*)\)\)", r"(\1)", text)
