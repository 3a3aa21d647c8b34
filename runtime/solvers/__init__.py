"""Samplers, one file a method: pure functions from (path, prediction, timesteps, options) to a solver table.

A new file with a ``SAMPLER`` is found by its name; files that begin with an underscore are shared by several.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import cache
from typing import Any

from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.paths import VP, Path
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.schedules import Schedule, Spacing, is_flow, timesteps
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers.sampler import Options, Sampler

__all__ = ["Options", "Sampler", "default_sampler", "sampler", "samplers", "solver_table"]

_NOT_A_SAMPLER = {"sampler"}


@cache
def samplers() -> dict[str, Sampler[Any]]:
    """Every sampler by name."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    names = [name for name in found if name not in _NOT_A_SAMPLER and not name.startswith("_")]
    return {name: importlib.import_module(f"{__name__}.{name}").SAMPLER for name in names}


def sampler(name: str) -> Sampler[Any]:
    """The sampler called ``name``; raises UnknownName with the closest match."""
    if name not in samplers():
        raise UnknownName("sampler", name, samplers())
    return samplers()[name]


def default_sampler(path: Path) -> str:
    """What ``lehr run`` uses where none is named: Euler for flows, second order elsewhere."""
    return "flow_euler" if is_flow(path) else "dpmpp_2m"


def solver_table(
    name: str,
    path: Path,
    prediction: Prediction,
    num_inference_steps: int,
    *,
    spacing: Spacing | Schedule = Spacing.AUTO,
    eta: float | None = None,
    options: Options | None = None,
    begin_at: int = 0,
) -> SolverTable:
    """The table of sampler ``name`` with ``num_inference_steps`` steps over ``path``.

    Args:
        name: one of :func:`samplers`.
        path: the model's.
        prediction: what the model's network outputs.
        num_inference_steps: intervals; some methods evaluate the network more than once in each.
        spacing: a name or a schedule of ``runtime/schedules.py``.
        eta: share of injected noise, for samplers that take it; None is the sampler's own default.
        options: of the type the sampler declares; None is its defaults.
        begin_at: the first steps that are left out (img2img); the method starts afresh at the timestep after them.

    Raises:
        InvalidInput: an unknown sampler, a number of steps out of range, a path the sampler is not defined on,
            a schedule that does not fit, options of another sampler, ``eta`` for a sampler without, or a beginning
            after the last step.
    """
    chosen = sampler(name)
    if not isinstance(path, chosen.paths):
        kinds = ", ".join(kind.__name__ for kind in chosen.paths)
        raise InvalidInput(f"sampler {name!r} is defined on {kinds} paths, not on {type(path).__name__}.")
    if spacing is Spacing.AUTO and isinstance(path, VP):
        spacing = chosen.spacing
    visited = timesteps(path, num_inference_steps, spacing)
    if not 0 <= begin_at < len(visited):
        raise InvalidInput(f"a loop of {len(visited)} steps begins at one of 0 to {len(visited) - 1}, not {begin_at}.")
    visited = visited[begin_at:]
    _check_start(path, prediction, float(visited[0]))
    return chosen.build(path, prediction, visited, _options(chosen, eta, options))


def _options(chosen: Sampler[Any], eta: float | None, options: Options | None) -> Options:
    if options is None:
        options = chosen.options
    elif type(options) is not type(chosen.options):
        expected, given = type(chosen.options).__name__, type(options).__name__
        raise InvalidInput(f"sampler {chosen.name!r} takes {expected}, got {given}; see its file in runtime/solvers.")
    if eta is None:
        return options
    if chosen.takes_eta:
        return replace(options, eta=eta)
    if eta:
        names = ", ".join(name for name, one in samplers().items() if one.takes_eta)
        raise InvalidInput(f"sampler {chosen.name!r} takes no eta; samplers that do: {names}.")
    return options


def _check_start(path: Path, prediction: Prediction, first: float) -> None:
    """Pure noise plus its own noise says nothing about x_0."""
    if prediction.kind in (PredictionKind.EPSILON, PredictionKind.SCORE) and float(path.alpha_sigma(first)[0]) == 0:
        raise InvalidInput(
            f"a network that predicts {prediction.kind.value} has no x_0 estimate at pure noise (alpha 0), where this "
            "schedule starts; start below it, for instance with spacing 'leading'."
        )
