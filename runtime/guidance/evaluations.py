"""Which evaluation of a solver table a network is asked for."""

from __future__ import annotations

from lehr.runtime.errors import InvalidInput
from lehr.runtime.solver_table import SolverTable


class Evaluations:
    """Counts a loop's evaluations; after the last one it starts again, so the network can run another loop."""

    def __init__(self, table: SolverTable) -> None:
        self._table, self._next = table, 0

    def advance(self, timestep: float) -> int:
        """The number of this evaluation; raises InvalidInput where the table stands at another timestep."""
        i = self._next
        expected = float(self._table.timesteps[i])
        if timestep != expected:
            raise InvalidInput(
                f"evaluation {i} of {self._table.sampler} stands at timestep {expected:g}, but the network is asked at "
                f"{timestep:g}; a guided network runs with the table that it was made for, from its first row."
            )
        self._next = (i + 1) % len(self._table)
        return i
