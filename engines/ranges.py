"""What sizes an engine is built for: the smallest, the usual and the largest of every input (optimisation profiles).

They follow from what the model declares of its dimensions. An engine reserves memory for the largest sizes that it may
meet, and models declare more than anybody uses at once, so the largest is held to a multiple of the usual one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from lehr.engines.settings import Settings
from lehr.runtime.errors import BuildFailed, InvalidInput
from lehr.runtime.hoisted import SHAPE_SUFFIX
from lehr.runtime.spec import Dim, GraphSpec, ModelSpec, TensorSpec
from lehr.runtime.stage import StageSpec

MAX_BATCH = 16
MAX_SCALE = 2  # of every other size's default


class Sized(Protocol):
    """Whose dimensions ranges follow from: a ModelSpec or a StageSpec."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def dims(self) -> tuple[Dim, ...]: ...

    def default_sizes(self, **sizes: int) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRange:
    """Of one input.

    Attributes:
        min, opt, max: its shape; or, where ``values`` is set, what stands in it.
        values: the input is the shape of another one, as a vector.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
    values: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"min": list(self.min), "opt": list(self.opt), "max": list(self.max), "values": self.values}


def limits(dim: Dim, max_batch: int = MAX_BATCH) -> tuple[int, int]:
    """The smallest and the largest size that an engine is built for."""
    most = max(dim.default, max_batch if dim.name == "batch" else MAX_SCALE * dim.default)
    return -(-dim.min // dim.multiple) * dim.multiple, min(most, dim.max) // dim.multiple * dim.multiple


def narrow_sizes(spec: ModelSpec, settings: Settings) -> tuple[dict[str, int], ...]:
    """Sizes of every dimension for each narrow profile: each batch with each size; none if neither was asked for.

    Raises:
        InvalidInput: a size that the model has not, or as many numbers as the sample has no dimensions.
    """
    if not settings.batches and not settings.sizes:
        return ()
    free = [size for size in spec.sample.shape if isinstance(size, str) and size != "batch"]
    dims, usual = {dim.name: dim for dim in spec.dims}, spec.default_sizes()

    def sized(batch: int | None, given: tuple[int, ...]) -> dict[str, int]:
        if given and len(given) != len(free):
            wanted = "x".join(free) or "no size: the sample's is fixed"
            raise InvalidInput(f"--sizes {'x'.join(map(str, given))} does not fit this model, expected {wanted}.")
        found = {**usual, **dict(zip(free, given, strict=False)), **({"batch": batch} if batch else {})}
        for name, size in found.items():
            dims[name].check(size, "a narrow profile")
        return found

    return tuple(sized(batch, given) for batch, given in product(settings.batches or (None,), settings.sizes or ((),)))


def input_ranges(signature: GraphSpec, spec: Sized, narrow: Sequence[Mapping[str, int]] = ()) -> dict[str, InputRange]:
    """The wide range of a graph's inputs, by name.

    Args:
        signature: of the graph; sizes may be expressions of the model's dimensions.
        spec: of the whole model.
        narrow: sizes of narrow profiles, which the wide range takes in, too.

    Raises:
        BuildFailed: a size that does not follow from the model's dimensions, or falls where they grow.
    """
    max_batch = (spec.max_batch if isinstance(spec, StageSpec) else None) or MAX_BATCH
    low = {dim.name: min(limits(dim)[0], *(n[dim.name] for n in narrow), dim.default) for dim in spec.dims}
    high = {dim.name: max(limits(dim, max_batch)[1], *(n[dim.name] for n in narrow), dim.default) for dim in spec.dims}
    return ranges(signature, spec, low, spec.default_sizes(), high)


def narrow_ranges(
    signature: GraphSpec, spec: Sized, narrow: Sequence[Mapping[str, int]]
) -> list[dict[str, InputRange]]:
    """A range of one size for each narrow profile; raises what :func:`input_ranges` does."""
    return [ranges(signature, spec, sizes, sizes, sizes) for sizes in narrow]


def ranges(
    signature: GraphSpec, spec: Sized, low: Mapping[str, int], usual: Mapping[str, int], high: Mapping[str, int]
) -> dict[str, InputRange]:
    """Ranges of a graph's inputs between sizes of the model's dimensions; raises what :func:`input_ranges` does."""
    shapes = {tensor.name + SHAPE_SUFFIX: tensor for tensor in spec.inputs}

    def of(tensor: TensorSpec) -> InputRange:
        measured = shapes.get(tensor.name, tensor)
        try:
            found = InputRange(
                min=measured.sizes(low),
                opt=measured.sizes(usual),
                max=measured.sizes(high),
                values=measured is not tensor,
            )
        except KeyError as e:
            raise BuildFailed(
                f"input {tensor.name!r} has a size {e} that does not follow from the model's dimensions "
                f"{sorted(usual)}, so no range can be given for it."
            ) from e
        if not all(a <= b <= c for a, b, c in zip(found.min, found.opt, found.max, strict=True)):
            raise BuildFailed(
                f"input {tensor.name!r} of shape {tensor.shape} is {found.min} at the smallest sizes, {found.opt} at "
                f"the usual ones and {found.max} at the largest: it must not shrink where they grow."
            )
        return found

    return {tensor.name: of(tensor) for tensor in signature.inputs}
