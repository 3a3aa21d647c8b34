"""The solver table that a request asks for."""

from __future__ import annotations

from collections.abc import Mapping

from lehr.runtime.errors import InvalidInput
from lehr.runtime.request import Request
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import default_sampler, solver_table
from lehr.runtime.spec import ModelSpec
from lehr.runtime.start import begun_late, start_step
from lehr.runtime.stored_tables import SCHEDULER, choose
from lehr.runtime.table_fit import check_fits


def requested_table(request: Request, spec: ModelSpec, tables: Mapping[int, SolverTable]) -> SolverTable:
    """The request's own table, one of the model's scheduler, or a native sampler's.

    Args:
        request: what is drawn.
        spec: of the denoiser.
        tables: of its own scheduler, by number of steps.

    Raises:
        InvalidInput: a table that does not fit the model, or a number of steps or a sampler that there is none for.
    """
    if request.table is not None:
        check_fits(request.table, spec)
        return request.table if request.init is None else begun_late(request.table, request.share)
    if request.sampler in (None, SCHEDULER):
        asked_for = request.sampler is not None
        stored = choose(tables, spec, request.num_inference_steps, asked_for=asked_for)
        if stored is not None:
            if request.eta is not None:
                raise InvalidInput(
                    f"{spec.name}'s {stored.sampler} has its noise fixed in the table, so eta cannot change it; "
                    "name a native sampler that takes it (--sampler, lehr list samplers)."
                )
            return stored if request.init is None else begun_late(stored, request.share)
    name = request.sampler or spec.sampling.sampler or default_sampler(spec.path)
    steps = spec.sampling.num_inference_steps if request.num_inference_steps is None else request.num_inference_steps
    begin_at = 0 if request.init is None or steps < 1 else start_step(steps, request.share)
    return solver_table(name, spec.path, spec.prediction, steps, eta=request.eta, begin_at=begin_at)
