"""The scheduler that stands beside a denoiser in a diffusers pipeline, as solver tables for its bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lehr.export.checkpoints.config import NAME as CONFIG
from lehr.export.checkpoints.conventions import INDEX
from lehr.runtime.errors import InvalidInput, LehrError, MissingExtra
from lehr.runtime.paths import LinearFlow
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import ModelSpec
from lehr.runtime.stored_tables import MAX_STEPS
from lehr.runtime.table_fit import check_fits

_PATCH = 2  # pixels a side of an image token in SD3 and FLUX, in the latent; their schedulers shift by the tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTables:
    """What was traced.

    Attributes:
        scheduler: class name.
        tables: by number of steps.
        skipped: number of steps -> why there is no table.
    """

    scheduler: str
    tables: Mapping[int, SolverTable]
    skipped: Mapping[int, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "class": self.scheduler,
            "steps": list(self.tables),
            "skipped": {str(steps): why for steps, why in self.skipped.items()},
        }


def scheduler_file(source: str) -> Path | None:
    """The ``scheduler_config.json`` of the pipeline that ``source`` is, or is a component or a weights file of."""
    path = Path(source)
    component = path.parent if path.is_file() and path.with_name(CONFIG).is_file() else path
    if not component.is_dir():
        return None
    pipeline = component if (component / INDEX).is_file() else component.absolute().parent
    file = pipeline / "scheduler" / "scheduler_config.json"
    return file if (pipeline / INDEX).is_file() and file.is_file() else None


def check_steps(source: str, steps: Sequence[int] | None) -> None:
    """Raise InvalidInput for numbers of steps that no scheduler takes, or with a source that has no scheduler."""
    if steps is None:
        return
    wrong = [number for number in steps if not 1 <= number <= MAX_STEPS]
    if wrong or not steps:
        raise InvalidInput(f"--steps must be whole numbers from 1 to {MAX_STEPS}, got {wrong[0] if wrong else 'none'}.")
    if scheduler_file(source) is None:
        raise InvalidInput(
            f"--steps: {source} has no scheduler of its own. Expected a diffusers pipeline, a folder with {INDEX} and "
            "scheduler/scheduler_config.json, or a component in one; native samplers need none (lehr run --sampler)."
        )


def own_tables(
    source: str, spec: ModelSpec, steps: Sequence[int] | None, *, progress: Callable[[str], None]
) -> OwnTables | None:
    """Trace the scheduler beside ``source``; None where there is none.

    A scheduler that is no table does not stop an export: native samplers draw from any model.

    Args:
        source: as :func:`lehr.export.source.resolve` takes it.
        spec: of the denoiser, which the tables must fit.
        steps: numbers of steps; None is the model's own number.
        progress: told what is done.

    Raises:
        MissingExtra: numbers of steps are asked for, and diffusers is not installed.
    """
    file = scheduler_file(source)
    if file is None:
        return None
    wanted = (spec.sampling.num_inference_steps,) if steps is None else tuple(steps)
    try:
        from lehr.export.schedulers import load_scheduler

        scheduler = load_scheduler(file)
    except (LehrError, ModuleNotFoundError) as e:
        if steps is not None and isinstance(e, ModuleNotFoundError):
            raise MissingExtra(e.name or "diffusers", "diffusers") from e
        return OwnTables(scheduler="unknown", tables={}, skipped=dict.fromkeys(wanted, str(e)))
    name = type(scheduler).__name__
    progress(f"tracing {name} at {', '.join(str(number) for number in wanted)} steps")
    tables: dict[int, SolverTable] = {}
    skipped: dict[int, str] = {}
    for number in wanted:
        try:
            tables[number] = _traced(scheduler, spec, number)
        except LehrError as e:  # noqa: PERF203 - a scheduler may be broken at few steps and not at many
            skipped[number] = str(e)
    return OwnTables(scheduler=name, tables=tables, skipped=skipped)


def _traced(scheduler: Any, spec: ModelSpec, steps: int) -> SolverTable:
    """The table as the model's own pipeline would run the scheduler, told what the model calls a timestep.

    Raises:
        LehrError: the scheduler is no table, or it is one for another model than this.
    """
    from lehr.export.schedulers import dynamic_shift, trace_scheduler

    config = scheduler.config
    shift = dynamic_shift(scheduler, _image_tokens(spec)) if config.get("use_dynamic_shifting") else None
    # FluxPipeline gives the noise levels itself, unless the scheduler has flow sigmas of its own.
    own = spec.family == "flux" and not config.get("use_flow_sigmas")
    sigmas = np.linspace(1, 1 / steps, steps).tolist() if own else None
    table = trace_scheduler(scheduler, None if own else steps, sigmas=sigmas, mu=shift)
    if isinstance(spec.path, LinearFlow) and (trained := config.get("num_train_timesteps")):
        unit = spec.path.num_train_timesteps / trained  # FLUX is told s itself, its scheduler counts to 1000
        table = replace(table, timesteps=table.timesteps * unit)
    check_fits(table, spec)
    return table


def _image_tokens(spec: ModelSpec) -> int:
    shape = spec.sample_shape(1)
    return shape[1] if len(shape) == 3 else shape[-2] * shape[-1] // _PATCH**2
