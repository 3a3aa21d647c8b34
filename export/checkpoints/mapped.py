"""A foreign checkpoint as a source of our tensors: key maps applied while the weights are streamed.

Names and shapes are compared at once, from headers alone; a tensor is read, joined and transformed when it is asked
for and then dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lehr.engines.graph.tensor_file import TensorInfo
from lehr.engines.graph.weights import WeightSource
from lehr.export.checkpoints.rules import Origin, Rule, Transform, ignored, origin
from lehr.export.weights import numpy_dtype, to_numpy, to_torch
from lehr.runtime.errors import InvalidInput

Shape = tuple[int, ...]

_LISTED = 10  # names of one kind in an error message
_TORCH = {
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def shapes(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of what a module stores; the meta device will do."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way a family's tensors are stored: rules that find them, and keys that belong to something else."""

    name: str
    rules: Sequence[Rule]
    ignored: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a checkpoint's names and shapes are those of a backbone, in the checkpoint's own names."""

    origins: Mapping[str, Origin]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.wrong)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape or type": self.wrong}
        return "; ".join(f"{kind} ({len(names)}): {listed(names)}" for kind, names in kinds.items() if names)


def listed(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def fit(source: WeightSource, wanted: Mapping[str, Shape], layout: Layout) -> Fit:
    """Look for every wanted tensor in ``source``, reading its headers only."""
    available = dict.fromkeys(source.names())
    origins = {name: origin(layout.rules, name, available) for name in wanted}
    used = {key for found in origins.values() for key in found.keys}
    unexpected = (key for key in available if key not in used and not ignored(layout.ignored, key))
    wrong = []
    for name, found in origins.items():
        if not all(key in available for key in found.keys):
            continue
        try:
            shape = found.shape(lambda key: source.info(key).shape)
        except InvalidInput as e:
            wrong.append(str(e).rstrip("."))
            continue
        kinds = {source.info(key).dtype for key in found.keys}
        if shape != wanted[name] or not kinds <= set(_TORCH):
            got = f"{'/'.join(sorted(map(str, kinds)))} {shape}"
            wrong.append(f"{', '.join(found.keys[:4])} is {got}, expected floating point {wanted[name]}")
    return Fit(
        origins=origins,
        missing=tuple(dict.fromkeys(key for found in origins.values() for key in found.keys if key not in available)),
        unexpected=tuple(sorted(unexpected)),
        wrong=tuple(wrong),
    )


class MappedSource:
    """Tensors of ours, made out of those of another source as they are read.

    Args:
        source: what there is.
        origins: our names -> where each tensor comes from; all sources must be there.
    """

    def __init__(self, source: WeightSource, origins: Mapping[str, Origin]) -> None:
        self._source, self._origins = source, dict(origins)

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> Iterable[str]:
        return tuple(self._origins)

    def info(self, name: str) -> TensorInfo:
        found = self._origins[name]
        if len(found.keys) == 1 and found.transform is None:
            return self._source.info(found.keys[0])
        dtypes = [self._dtype(key) for key in found.keys]
        joined = dtypes[0]
        for dtype in dtypes[1:]:
            joined = torch.promote_types(joined, dtype)
        return TensorInfo(numpy_dtype(joined), found.shape(lambda key: self._source.info(key).shape))

    def read(self, name: str) -> memoryview | npt.NDArray[Any]:
        found = self._origins[name]
        if len(found.keys) == 1 and found.transform is None:
            return self._source.read(found.keys[0])
        return to_numpy(found.read(self._tensor))

    def check_copies(self) -> None:
        """Read what the checkpoint stores several times: tensors in every block, rows and columns of a grid.

        Raises:
            CopiesDiffer: they are not equal.
        """
        for found in self._origins.values():
            if any(len(part) > 1 for part in found.parts) or found.transform is Transform.GRID_ROWS:
                found.read(self._tensor)

    def _dtype(self, key: str) -> torch.dtype:
        return _TORCH[self._source.info(key).dtype]

    def _tensor(self, key: str) -> Tensor:
        contents, info = self._source.read(key), self._source.info(key)
        array = contents if isinstance(contents, np.ndarray) else np.frombuffer(contents, np.uint8)
        return to_torch(array.view(info.dtype).reshape(info.shape), _TORCH[info.dtype])


def mapped(source: WeightSource, wanted: Mapping[str, Shape], layout: Layout, *, what: str) -> MappedSource:
    """``source`` under our names.

    Raises:
        InvalidInput: names or shapes do not fit; the first ten of each kind are listed.
    """
    found = fit(source, wanted, layout)
    if found.problems:
        raise InvalidInput(
            f"{source} does not hold the weights of {what} in the {layout.name} layout. {found}. "
            "Check that weights and architecture belong together."
        )
    return MappedSource(source, found.origins)
