"""What errors of single evaluations do to the final sample, predicted from the solver table.

The final sample is the table's last row, so an error dF_i of one output moves it by g_i dF_i at once: the *direct*
effect, with the gains g of :meth:`SolverTable.gains`. It also moves the inputs of all later evaluations, and the
network answers: dF_j = own error + J_j d input_j. Following that to first order, with the network's Jacobian J taken as
a finite difference along the error, gives the *propagated* effect; it costs one more evaluation a step.

Shape legend: N evaluations, B batch, … the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.loop import Network, Step, sample
from lehr.runtime.solver_table import SolverTable

Array = npt.NDArray[Any]

_DIFFERENCE = 1e-3  # of the input's root mean square: large against float32 rounding, small against the network's bends


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One loop: what the network saw and returned at every evaluation, each (B, …), and the final sample."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    final: Array


def record(network: Network, table: SolverTable, x_T: Array, *, injected: Sequence[Array] | None = None) -> Recorded:
    """Run a loop and keep its inputs and outputs; as :func:`lehr.runtime.loop.sample`."""
    inputs, outputs = [], []

    def keep(step: Step) -> None:
        inputs.append(step.sample.copy())
        outputs.append(step.output.copy())

    final = sample(network, table, x_T, injected=injected, on_step=keep)
    return Recorded(inputs=tuple(inputs), outputs=tuple(outputs), final=final)


def step_errors(other: Network, table: SolverTable, reference: Recorded) -> list[Array]:
    """dF_i of another network on the reference's inputs: (N) arrays of (B, …)."""
    return [
        other(x, float(t)).astype(np.float64) - output
        for x, t, output in zip(reference.inputs, table.timesteps, reference.outputs, strict=True)
    ]


def direct(table: SolverTable, errors: Sequence[Array]) -> Array:
    """The predicted error of the final sample, sum of g_i dF_i: (B, …) float64.

    Raises:
        InvalidInput: another number of errors than the table has evaluations.
    """
    _check(table, errors)
    return np.asarray(sum(gain * error for gain, error in zip(table.gains(), errors, strict=True)))


def expected_rms(table: SolverTable, rms: Sequence[float]) -> float:
    """The direct effect's size if the errors of different steps are independent: root of sum g_i² rms_i²."""
    _check(table, rms)
    return float(np.sqrt(np.sum((table.gains() * np.asarray(rms)) ** 2)))


def propagated(network: Network, table: SolverTable, reference: Recorded, errors: Sequence[Array]) -> Array:
    """The same to first order through all later evaluations: (B, …) float64.

    Args:
        network: the reference network; it is evaluated once a step, beside the recorded loop.
        table: of the loop.
        reference: the recorded loop.
        errors: dF_i of each evaluation on the reference's inputs.

    Raises:
        InvalidInput: another number of errors than the table has evaluations, or a table with learned variance.
    """
    _check(table, errors)
    if table.variance is not None:
        raise InvalidInput("errors are not followed through a learned variance; use the direct effect.")
    moved: list[Array] = []  # dF_j with all that went before
    clipped: list[Array] = []
    for i, error in enumerate(errors):
        x, output, timestep = reference.inputs[i].astype(np.float64), reference.outputs[i], float(table.timesteps[i])
        shift = _row(table, i, moved, clipped, np.zeros(x.shape))
        answer = np.zeros(x.shape)
        size = float(np.sqrt(np.mean(shift**2)))
        if size > 0:
            step = _DIFFERENCE * float(np.sqrt(np.mean(x**2))) / size
            nudged = (x + step * shift).astype(reference.inputs[i].dtype)
            answer = (network(nudged, timestep).astype(np.float64) - output) / step
        moved.append(error + answer)
        if table.clip is not None:
            on_input, on_output = float(table.denoised_from_input[i]), float(table.denoised_from_output[i])
            denoised = on_input * x + on_output * output
            change = on_input * shift + on_output * moved[-1]
            clipped.append(table.clip(denoised + change) - table.clip(denoised))
    return _row(table, len(table), moved, clipped, np.zeros(reference.final.shape))


def _row(table: SolverTable, i: int, moved: Sequence[Array], clipped: Sequence[Array], total: Array) -> Array:
    for j in range(i):
        total += table.outputs[i, j] * moved[j]
        if table.clipped is not None:
            total += table.clipped[i, j] * clipped[j]
    return total


def _check(table: SolverTable, errors: Sequence[Any]) -> None:
    if len(errors) != len(table):
        raise InvalidInput(f"{table.sampler} has {len(table)} evaluations, but {len(errors)} errors were given.")
