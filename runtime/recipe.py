"""Recipes: how numbers are represented in an engine. The type is shared by every stage; values are named here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lehr.runtime.errors import UnknownName


class Format(str, Enum):
    """A number format of weights and arithmetic."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named, versioned choice of formats. ``version`` is part of an engine's identity.

    Attributes:
        weights: how they are stored.
        arithmetic: of the step graph; the graphs that run once a loop compute in fp32 whatever the recipe.
    """

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
    ),
    "fp16": Recipe(
        name="fp16",
        version=1,
        weights=Format.FP16,
        arithmetic=Format.FP16,
        summary="half precision but for what lehr audit keeps in fp32; CPUs emulate it, to measure what it costs",
    ),
    "bf16": Recipe(
        name="bf16",
        version=1,
        weights=Format.FP32,
        arithmetic=Format.BF16,
        summary="matrix products and convolutions on bfloat16, whose weights are rounded when the engine is loaded",
    ),
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``; raises UnknownName with the closest match."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
