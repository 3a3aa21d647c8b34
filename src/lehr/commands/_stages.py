"""Options of verbs that work on a bundle's stages: which of them, and in which recipes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import click

from lehr.runtime.errors import InvalidInput, UnknownName

F = TypeVar("F", bound=Callable[..., Any])

DENOISER = "denoiser"


def stage_option(function: F) -> F:
    """Add ``--stage``, as ``stages``."""
    return click.option(
        "--stage",
        "stages",
        multiple=True,
        metavar="NAME",
        help='Only this stage, or "denoiser"; may be repeated.  [default: all]',
    )(function)


def stage_recipe_option(function: F) -> F:
    """Add ``--stage-recipe``, as ``stage_recipe``."""
    return click.option(
        "--stage-recipe",
        multiple=True,
        metavar="NAME=RECIPE",
        help="Recipe of one stage beside the denoiser; may be repeated.",
    )(function)


def chosen_stages(known: Collection[str], asked: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the denoiser is meant, and which stages, in the bundle's order; raises UnknownName."""
    for name in asked:
        if name != DENOISER and name not in known:
            raise UnknownName("stage", name, [DENOISER, *known])
    return not asked or DENOISER in asked, [name for name in known if not asked or name in asked]


def stage_recipes(known: Collection[str], given: Sequence[str]) -> dict[str, str]:
    """Recipes by stage, from ``NAME=RECIPE``; raises InvalidInput."""
    found: dict[str, str] = {}
    for text in given:
        name, sign, recipe = text.partition("=")
        if not sign or not recipe:
            raise InvalidInput(f"--stage-recipe {text!r} cannot be read, expected such as text_encoder=bf16.")
        if name == DENOISER:
            raise InvalidInput("the denoiser's recipe is given by --recipe.")
        if name not in known:
            raise UnknownName("stage", name, known)
        if found.setdefault(name, recipe) != recipe:
            raise InvalidInput(f"--stage-recipe names {name!r} twice, as {found[name]} and {recipe}.")
    return found
