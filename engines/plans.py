"""What an engine consists of: a plan for each graph, and for the step graph one more for each end of a loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lehr.runtime.engine import STEP
from lehr.runtime.errors import InvalidInput
from lehr.runtime.precision_schedule import plan_of
from lehr.runtime.recipe import RECIPES, Recipe
from lehr.runtime.whole_loop import LOOP


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A plan to compile: its name, the graph that it comes from, and the recipe that it follows."""

    plan: str
    graph: str
    recipe: Recipe


def asked_for(graphs: Iterable[str], recipe: Recipe) -> list[Asked]:
    """The plans of an engine. What runs once a prompt or schedule computes in fp32, whatever the recipe.

    Raises:
        InvalidInput: a precision schedule for a whole loop that is one graph.
    """
    found = []
    for graph in graphs:
        if graph == LOOP and recipe.schedule is not None:
            raise InvalidInput(
                f"recipe {recipe.name!r} has a precision schedule ({recipe.schedule}), and this bundle holds a whole "
                "loop as one graph, whose steps share an engine. Export the model without --unroll."
            )
        found.append(
            Asked(plan=graph, graph=graph, recipe=recipe if graph in (STEP, LOOP) else RECIPES["fp32"]),
        )
        if graph == STEP:
            found += [Asked(plan=plan_of(end), graph=graph, recipe=part) for end, part in recipe.parts.items()]
    return found
