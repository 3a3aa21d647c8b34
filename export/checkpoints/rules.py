"""Key maps as data: a :class:`Rule` says which tensors of a foreign checkpoint make one tensor of ours.

Keys are patterns. ``{i}``, ``{j}``, ``{k}`` stand for a block number, ``{leaf}`` for the last word (``weight``,
``bias``, ``scale``…) and ``{rest}`` for all that follows; a placeholder means the same on both sides of a rule:

    Rule("blocks.{i}.attn.qkv.{leaf}", ("layers.{i}.to_q.{leaf}", "layers.{i}.to_k.{leaf}", "layers.{i}.to_v.{leaf}"))

The sources are concatenated along dimension 0, then the transform, if any, is applied. ``{any}`` stands for a
block number that ours does not have: the checkpoint repeats one tensor in several blocks, and all copies must
be equal. The first rule that matches wins; a key that no rule matches keeps its name.

A table is a module-level tuple in ``lehr.export.checkpoints.maps.FAMILY``. Nothing here reads a file: the caller
passes the names a checkpoint has and a function that reads one tensor, so large checkpoints can be streamed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from lehr.runtime.errors import InvalidInput


class Transform(str, Enum):
    """What is done to the concatenated sources."""

    SWAP_HALVES = "swap_halves"  # (scale, shift) <-> (shift, scale) along dimension 0
    GRID_ROWS = "grid_rows"  # (1, N*N, D) table of a square sin-cos grid -> (N, D/2), what encodes the row
    GRID_COLUMNS = "grid_columns"  # the same table -> (N, D/2), what encodes the column
    FIRST_THIRD = "first_third"  # of dimension 0: the queries of a joint projection
    SECOND_THIRD = "second_third"
    LAST_THIRD = "last_third"
    TRANSPOSE = "transpose"  # a matrix stored for multiplication from the right
    MATRIX = "matrix"  # (O, I, 1, 1), a convolution of single pixels -> (O, I); a matrix stays one


class CopiesDiffer(InvalidInput):
    """A checkpoint holds several copies of what is one tensor in our backbone, and they are not equal."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``ours`` is made of ``theirs``, concatenated along dimension 0, then transformed."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if not self.theirs:
            raise InvalidInput(f"rule for {self.ours!r} names no source; give at least one key pattern")
        known = {*_placeholders(self.ours), "any"}
        unknown = {name for source in self.theirs for name in _placeholders(source)} - known
        if unknown:
            raise InvalidInput(f"rule for {self.ours!r}: sources use {sorted(unknown)}, which the key does not bind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where one tensor of ours comes from. Each part is a group of equal copies; parts are concatenated."""

    parts: tuple[tuple[str, ...], ...]
    transform: Transform | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Every source key, in order."""
        return tuple(key for part in self.parts for key in part)

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """Assemble the tensor, reading each source with ``read``.

        Raises:
            CopiesDiffer: copies of one tensor are not equal.
            InvalidInput: the transform does not fit the tensor.
        """
        tensors = [_one_of(part, read) for part in self.parts]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=0)
        return whole if self.transform is None else _TRANSFORMS[self.transform](whole)

    def shape(self, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that :meth:`read` would give, from the sources' shapes alone.

        Raises:
            InvalidInput: the sources cannot be put together.
        """
        shapes = [shape_of(part[0]) for part in self.parts]
        for part, first in zip(self.parts, shapes, strict=True):
            odd = next((key for key in part if shape_of(key) != first), None)
            if odd is not None:
                raise InvalidInput(f"{odd!r} has shape {shape_of(odd)}, its copy {part[0]!r} {first}.")
        whole = shapes[0]
        if len(shapes) > 1:
            if any(not shape or shape[1:] != whole[1:] for shape in shapes):
                raise InvalidInput(f"{', '.join(self.keys)} of shapes {shapes} cannot be joined.")
            whole = (sum(shape[0] for shape in shapes), *whole[1:])
        if self.transform in (Transform.GRID_ROWS, Transform.GRID_COLUMNS):
            return _grid_shape(whole)
        if self.transform in _THIRDS:
            return _third_shape(whole)
        if self.transform is Transform.TRANSPOSE:
            return whole[::-1]
        return _matrix_shape(whole) if self.transform is Transform.MATRIX else whole


# ----------------------------------------------------------------------------------------------- matching


_WORDS = {"i": r"\d+", "j": r"\d+", "k": r"\d+", "any": r"\d+", "leaf": r"[A-Za-z_]+", "rest": r".+"}


def _placeholders(pattern: str) -> list[str]:
    names = re.findall(r"\{(\w+)\}", pattern)
    if set(names) - set(_WORDS):
        raise InvalidInput(f"key pattern {pattern!r} uses {sorted(set(names) - set(_WORDS))}; known: {sorted(_WORDS)}")
    return names


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    expression, seen = "", set()
    for text, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", pattern):
        expression += re.escape(text)
        if name:
            expression += f"(?P={name})" if name in seen else f"(?P<{name}>{_WORDS[name]})"
            seen.add(name)
    return re.compile(expression)


def origin(rules: Sequence[Rule], key: str, available: Collection[str]) -> Origin:
    """Where our tensor ``key`` comes from, among the ``available`` keys of a checkpoint.

    A source that is not available is named all the same, so the caller can list what is missing.
    """
    for rule in rules:
        match = _regex(rule.ours).fullmatch(key)
        if match:
            parts = tuple(_copies(_fill(source, match.groupdict()), available) for source in rule.theirs)
            return Origin(parts=parts, transform=rule.transform)
    return Origin(parts=((key,),))


def ignored(patterns: Iterable[str], key: str) -> bool:
    """Whether a checkpoint's ``key`` is one that the backbone does not need."""
    return any(_regex(pattern).fullmatch(key) for pattern in patterns)


def _fill(pattern: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), pattern)


def _copies(source: str, available: Collection[str]) -> tuple[str, ...]:
    if "{any}" not in source:
        return (source,)
    expression = _regex(source)
    return tuple(sorted(key for key in available if expression.fullmatch(key))) or (source,)


# ---------------------------------------------------------------------------------------------- assembling


def _one_of(part: tuple[str, ...], read: Callable[[str], Tensor]) -> Tensor:
    first = read(part[0])
    for key in part[1:]:
        if not torch.equal(read(key), first):
            raise CopiesDiffer(
                f"{key!r} and {part[0]!r} differ; our backbone shares one tensor between all blocks. "
                "Export the checkpoint through the library it was written with instead."
            )
    return first


def _swap_halves(tensor: Tensor) -> Tensor:
    if tensor.shape[0] % 2:
        raise InvalidInput(f"cannot swap the halves of a tensor of shape {tuple(tensor.shape)}; its first size is odd")
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


def _grid(table: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a square sin-cos table; refuses a table that is not the outer arrangement of the two."""
    side, _ = _grid_shape(tuple(table.shape))
    columns, rows = table.reshape(side, side, -1).chunk(2, dim=-1)
    if not (torch.equal(columns, columns[:1].expand_as(columns)) and torch.equal(rows, rows[:, :1].expand_as(rows))):
        raise CopiesDiffer(
            "the position table is no sin-cos grid (first half by column, second half by row), so it cannot be "
            "stored as rows and columns. Export the checkpoint through the library it was written with instead."
        )
    return rows[:, 0].contiguous(), columns[0].contiguous()


def _grid_shape(table: tuple[int, ...]) -> tuple[int, int]:
    side = math.isqrt(table[1]) if len(table) == 3 else 0
    if side < 1 or table[0] != 1 or side * side != table[1] or table[2] % 2:
        raise InvalidInput(f"a position table must have the shape (1, N*N, D) with D even, got {table}")
    return side, table[2] // 2


def _matrix_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return kernel[:2] if len(kernel) == 4 and kernel[2:] == (1, 1) else kernel


def _third_shape(joint: tuple[int, ...]) -> tuple[int, ...]:
    if not joint or joint[0] % 3:
        raise InvalidInput(f"a tensor of shape {joint} cannot be cut into three along dimension 0")
    return (joint[0] // 3, *joint[1:])


def _third(number: int) -> Callable[[Tensor], Tensor]:
    def cut(joint: Tensor) -> Tensor:
        size = _third_shape(tuple(joint.shape))[0]
        return joint[number * size : (number + 1) * size]

    return cut


_THIRDS = (Transform.FIRST_THIRD, Transform.SECOND_THIRD, Transform.LAST_THIRD)

_TRANSFORMS: dict[Transform, Callable[[Tensor], Tensor]] = {
    Transform.SWAP_HALVES: _swap_halves,
    Transform.GRID_ROWS: lambda table: _grid(table)[0],
    Transform.GRID_COLUMNS: lambda table: _grid(table)[1],
    **{transform: _third(number) for number, transform in enumerate(_THIRDS)},
    Transform.TRANSPOSE: lambda matrix: matrix.T,
    Transform.MATRIX: lambda kernel: kernel.reshape(_matrix_shape(tuple(kernel.shape))),
}
