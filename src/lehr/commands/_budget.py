"""The half of ``lehr calibrate`` that searches for a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import Progress, emit, table

if TYPE_CHECKING:
    from lehr.calibration.budgeted import Budgeted
    from lehr.calibration.calibrate import Data

_SHOWN = 12  # points of the front in prose; --json has all


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of the command line that only a search has."""

    budget: str
    target: str | None
    costs: str
    held_out: int
    time_limit: float
    rest: str | None
    name: str | None
    steps: int | None
    features: Path | None


def by_budget(bundle: Path, asked: Asked, source: Data, as_json: bool) -> None:
    """Search, store and report; exits with 1 where no recipe keeps the budget."""
    from lehr.calibration.budget import parse_budget
    from lehr.calibration.budgeted import Wish, calibrate_to_budget, report
    from lehr.calibration.cost_model import Source
    from lehr.calibration.held_out import MAX_SEED, STEPS
    from lehr.calibration.recipes import MIXED
    from lehr.ci.distribution import Networks, network_file
    from lehr.engines.target import target
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.recipe import Format

    opened = Bundle.open(bundle)
    wish = Wish(
        budget=parse_budget(asked.budget),
        target=None if asked.target is None else target(asked.target),
        costs=Source(asked.costs),
        name=asked.name or MIXED,
        rest=Format.FP32 if asked.rest is None else Format(asked.rest),
        seed=source.seed % MAX_SEED,
        num=asked.held_out,
        steps=asked.steps or STEPS,
        time_limit=asked.time_limit,
        threads=source.threads,
        folder=None if source.folder is None else source.folder.parent,
        features=network_file(opened, Networks(features=asked.features)),
    )
    progress = Progress()
    progress(f"searching for {wish.budget} in {bundle}")
    made = calibrate_to_budget(opened, wish, data=source, progress=progress)
    emit(as_json, report(made), _prose(made, bundle, wish.name))
    if made.found.chosen is None:
        raise click.exceptions.Exit(1)


def _prose(made: Budgeted, bundle: Path, name: str) -> str:
    from lehr.calibration.budgeted import histogram, saved

    found, measure = made.found, made.found.budget.measure
    rows: list[tuple[Any, ...]] = [
        (
            "*" if point is found.chosen else "",
            point.name,
            f"{point.cost / found.full_cost:.3f}",
            f"{point.losses.mean(measure):.4g}",
            f"{point.losses.worst(measure):.4g}",
        )
        for point in found.front()
    ]
    more = f"\n({len(rows) - _SHOWN} more: --json)" if len(rows) > _SHOWN else ""
    parts = [table(("", "found as", "cost", f"{measure.value}, mean", "worst"), rows[:_SHOWN]) + more]
    if not found.finished:
        parts.append("The time limit ended the search; give it more with --time-limit.")
    if found.chosen is None or found.confirmed is None:
        best = found.best
        value = best.losses.mean(measure)
        parts.append(
            f"No recipe keeps {found.budget}. The best reachable is {best.name} with {measure.value} {value:.4g}."
        )
        return "\n\n".join(parts)
    kinds = ", ".join(f"{count} {option}" for option, count in histogram(found.chosen.plan).items())
    lines = [
        f"{found.chosen.name}: {measure.value} {found.confirmed.mean(measure):.4g} on seeds that had no part in it."
    ]
    share = saved(found)
    if share is None:
        lines.append("No uniform recipe keeps the budget.")
    elif found.best_uniform is not None:
        lines.append(
            f"It costs {share:.1%} less than the cheapest uniform recipe that does, {found.best_uniform.name}."
        )
    lines.append(f"Layers: {kinds}.")
    for library, times in made.milliseconds.items():
        one = ", ".join(f"{graph} {value:.3g}" for graph, value in times.items())
        lines.append(f"Milliseconds of one evaluation here, {library}: {one}.")
    lines.append(f"Next: lehr build {bundle} --recipe {name} && lehr verify {bundle} --recipe {name}")
    return "\n\n".join([*parts, "\n".join(lines)])
