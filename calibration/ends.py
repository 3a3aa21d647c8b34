"""Precision schedules: which recipe computes the first or last steps of a loop, from words to a recipe.

An error of an early evaluation is followed by the network, one of a late evaluation stays in the picture, so the ends
of a loop are where a costlier recipe is worth its price (or, at the start of some models, where a cheaper one does
least harm).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lehr.calibration.recipes import renamed
from lehr.calibration.trajectories import own_table
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import GRAPH, RECORD, WEIGHTS, calibrated_folder, check_current, read_calibrated, recipe_of
from lehr.runtime.errors import InvalidInput
from lehr.runtime.precision_schedule import FIRST, LAST, Ends, steps_of
from lehr.runtime.recipe import RECIPES, Recipe, Schedule

_END = re.compile(r"(\d+):(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndAsked:
    """An end of a loop: how many steps it is, and the name of the recipe that computes them."""

    steps: int
    recipe: str


def parse_end(text: str) -> EndAsked:
    """``3:fp32`` as an end; raises InvalidInput for another form."""
    found = _END.fullmatch(text.strip())
    if found is None or int(found[1]) < 1:
        raise InvalidInput(f"{text!r} is no end of a loop; write steps and recipe, such as 3:fp32.")
    return EndAsked(steps=int(found[1]), recipe=found[2])


def own_steps(bundle: Bundle) -> tuple[float, ...]:
    """Timesteps of the model's own loop, each once, as the network is given them."""
    kind = bundle.manifest.model.timestep.dtype.numpy.type
    return steps_of(float(kind(t)) for t in own_table(bundle).timesteps)


def with_ends(bundle: Bundle, chosen: Recipe, ends: Mapping[str, EndAsked], stored_as: str | None) -> Recipe:
    """A recipe with a precision schedule.

    Args:
        bundle: calibrated for the recipes of the ends that need it.
        chosen: the recipe of all other steps, under the name that it will have if it is quantised.
        ends: by :data:`.FIRST` and :data:`.LAST`.
        stored_as: the user's name for the result; recipes that need no calibration must be given one.

    Raises:
        UnknownName: no such recipe.
        InvalidInput: too many steps; an end that the bundle is not calibrated for, or not any more, or that has a
            schedule itself; or the result would have the name of one of its parts or of a shipped recipe.
    """
    if not chosen.calibrated:
        if stored_as is None or stored_as in RECIPES:
            raise InvalidInput(
                f"recipe {chosen.name!r} is the same in every bundle; a schedule around it needs a name of its own "
                "(--name)."
            )
        chosen = renamed(chosen, stored_as)
    recipes = {name: _of_end(bundle, chosen, asked.recipe) for name, asked in ends.items()}
    schedule = Schedule(
        ends=Ends(
            first=ends[FIRST].steps if FIRST in ends else 0,
            last=ends[LAST].steps if LAST in ends else 0,
            timesteps=own_steps(bundle),
        ),
        **recipes,
    )
    stated = [part for part in (chosen, *recipes.values()) if part.psnr_db is not None and part.rel_error is not None]
    return replace(
        chosen,
        schedule=schedule,
        # What the lossiest part may lose, the whole may.
        psnr_db=min((part.psnr_db for part in stated if part.psnr_db is not None), default=None),
        rel_error=max((part.rel_error for part in stated if part.rel_error is not None), default=None),
        summary=f"{chosen.summary}; {schedule}",
    )


def _of_end(bundle: Bundle, chosen: Recipe, name: str) -> Recipe:
    if name == chosen.name and chosen.calibrated:
        raise InvalidInput(
            f"the result would take the place of {name!r}, which one of its ends needs. Give it another name (--name)."
        )
    found = recipe_of(bundle, name)
    if found.calibrated:
        check_current(bundle, read_calibrated(bundle, name))
    return found


def sources_of_ends(bundle: Bundle, chosen: Recipe) -> dict[str, str]:
    """SHA-256 of what the quantised ends of a recipe are made of, by file."""
    names = [
        f"{calibrated_folder(part.name)}/{file}"
        for part in chosen.parts.values()
        if part.calibrated
        for file in (GRAPH, WEIGHTS, RECORD)
    ]
    return {name: bundle.manifest.files[name].sha256 for name in names}
