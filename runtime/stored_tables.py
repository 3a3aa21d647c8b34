"""The solver tables of a model's own scheduler, traced at export and kept in its bundle, one a number of steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import ModelSpec
from lehr.runtime.table_fit import check_fits

SCHEDULER = "scheduler"  # what a request calls the stored tables; no native sampler has this name
MAX_STEPS = 1000

_NAME = re.compile(r"tables/scheduler-([1-9]\d{0,3})\.npz")
_MAX_BYTES = 1 << 30  # four banks of 2000 evaluations each are a quarter of it


class StoredTables(Mapping[int, SolverTable]):
    """A bundle's tables by number of steps, read when asked for.

    Raises:
        BundleError: on access, where a file is damaged or is no table for this model.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        found = [_NAME.fullmatch(name) for name in bundle.names("tables/")]
        self._steps = sorted(int(match[1]) for match in found if match is not None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, num_inference_steps: int) -> SolverTable:
        if num_inference_steps not in self._steps:
            raise KeyError(num_inference_steps)
        name = file_name(num_inference_steps)
        table = SolverTable.from_arrays(self._bundle.read_arrays(name, max_bytes=_MAX_BYTES))
        try:
            check_fits(table, self._bundle.manifest.model)
        except InvalidInput as e:
            raise BundleError(
                f"{self._bundle.root.name}: {name} is not this model's: {e} Export the model again."
            ) from e
        return table


def file_name(num_inference_steps: int) -> str:
    """Where a table lies in a bundle."""
    return f"tables/scheduler-{num_inference_steps}.npz"


def write(edit: Edit, tables: Mapping[int, SolverTable]) -> None:
    """Add tables to a bundle."""
    for num_inference_steps, table in tables.items():
        edit.add_bytes(file_name(num_inference_steps), table.to_bytes())


def choose(
    tables: Mapping[int, SolverTable], spec: ModelSpec, num_inference_steps: int | None, *, asked_for: bool
) -> SolverTable | None:
    """The stored table of a request that names no native sampler; None where the model's native one is meant.

    Args:
        tables: by number of steps.
        spec: of the model.
        num_inference_steps: as the request has it; None takes the model's own number, else the nearest one stored.
        asked_for: whether the request names :data:`SCHEDULER`.

    Raises:
        InvalidInput: no table of that number of steps, or none at all though one is asked for.
    """
    if not tables:
        if not asked_for:
            return None
        raise InvalidInput(
            f"{spec.name} holds no tables of a scheduler of its own; export a diffusers folder with its scheduler/, or "
            "name a native sampler (lehr list samplers)."
        )
    wanted = spec.sampling.num_inference_steps if num_inference_steps is None else num_inference_steps
    if num_inference_steps is None:
        return tables[min(tables, key=lambda steps: (abs(steps - wanted), steps))]
    if wanted in tables:
        return tables[wanted]
    there = ", ".join(str(steps) for steps in sorted(tables))
    raise InvalidInput(
        f"{spec.name} holds its scheduler's tables for {there} steps, not for {wanted}. Use one of these (--steps), "
        f"export again with --steps {wanted}, or name a native sampler (--sampler, lehr list samplers)."
    )


def parse_steps(text: str) -> tuple[int, ...]:
    """``"20,30,50"`` as numbers of steps, each once, in the order given.

    Raises:
        InvalidInput: something else than integers from 1 to :data:`MAX_STEPS`.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() and 1 <= int(word) <= MAX_STEPS for word in words):
        raise InvalidInput(f"--steps {text!r} must be whole numbers from 1 to {MAX_STEPS}, as in --steps 20,30,50.")
    return tuple(dict.fromkeys(int(word) for word in words))
