"""Sizes that depend on others, such as "height*width/4": what an exported graph says, worked out."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from functools import cache

MAX_ELEMENTS = 2**31  # of one input; a manifest that asks for more is refused before anything is allocated
MAX_EXPRESSION, MAX_POWER = 200, 4  # characters of a size's expression and powers in it; a manifest may be hostile

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,  # graphs write exact quotients, "height*width/4"
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_DIVISIONS = (ast.Div, ast.FloorDiv, ast.Mod)


def size_of(expression: str | None, dims: Mapping[str, int]) -> int | None:
    """The value of a size such as ``"batch"`` or ``"height*width/4"``; None for one that cannot be worked out."""
    if expression is None:
        return None
    if expression in dims:
        return dims[expression]
    parsed = _parsed(expression)
    return None if parsed is None else _evaluate(parsed, dims)


@cache
def _parsed(expression: str) -> ast.expr | None:
    try:
        return ast.parse(expression, mode="eval").body if len(expression) <= MAX_EXPRESSION else None
    except (SyntaxError, ValueError, RecursionError):
        return None


def _evaluate(node: ast.expr, dims: Mapping[str, int]) -> int | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return dims.get(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left, dims), _evaluate(node.right, dims)
        if left is None or right is None or abs(left) > MAX_ELEMENTS or not 0 <= right <= MAX_ELEMENTS:
            return None
        if (isinstance(node.op, ast.Pow) and right > MAX_POWER) or (not right and type(node.op) in _DIVISIONS):
            return None
        return int(_OPERATORS[type(node.op)](left, right))
    return None
