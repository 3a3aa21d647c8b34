"""Recipes: how numbers are represented in an engine. The type is shared by every stage; values are named here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lehr.runtime.errors import UnknownName


class Format(str, Enum):
    """A number format of weights and arithmetic."""

    FP32 = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named, versioned choice of formats. ``version`` is part of an engine's identity."""

    name: str
    version: int
    weights: Format
    arithmetic: Format
    summary: str


RECIPES = {
    "fp32": Recipe(
        name="fp32",
        version=1,
        weights=Format.FP32,
        arithmetic=Format.FP32,
        summary="32-bit floating point throughout; the reference on CPUs",
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``; raises UnknownName with the closest match."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
