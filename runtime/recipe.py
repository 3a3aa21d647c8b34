"""Recipes: how numbers are represented in an engine. The type is shared by every stage; values are named here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.precision_schedule import FIRST, LAST, Ends


class Format(str, Enum):
    """A number format of weights and arithmetic."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"  # symmetric, -128 to 127
    UINT8 = "uint8"  # 8 bits with a zero point; of activations only, whose products with int8 weights are int8 products
    INT4 = "int4"  # symmetric, -8 to 7, a scale for each block of weights
    FP8 = "fp8"  # E4M3: 4 bits of exponent, 3 of mantissa, up to 448
    NVFP4 = "nvfp4"  # E2M1 in blocks of 16 whose scales are fp8


class Scope(str, Enum):
    """What of a step graph computes in a recipe's arithmetic, where nothing is quantised."""

    GRAPH = "graph"  # everything that an engine library and the range audit let
    MATRICES = "matrices"  # matrix products between the first and the last layer; the rest as ``rest`` says


MIXED = "mixed"  # the name under which lehr calibrate --budget keeps what it found
# These need scales, which calibration finds.
QUANTISED = frozenset({Format.INT8, Format.UINT8, Format.INT4, Format.FP8, Format.NVFP4})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named, versioned choice of formats. ``version`` is part of an engine's identity.

    Attributes:
        weights: how they are stored.
        arithmetic: of the step graph's products; the graphs that run once a loop compute in fp32 whatever the recipe.
        rest: where products are quantised, or only some of them are meant, the arithmetic of everything else.
        scope: what computes in ``arithmetic`` where nothing is quantised.
        others: further formats of single layers, of a recipe that mixes them.
        psnr_db, rel_error: the loss that a quantised recipe is allowed, of the worst final sample of a recorded loop
            and of the score of one evaluation; None where eager PyTorch's own error in the format decides. The worst
            of ten samples lies 10 to 20 dB below the mean, since one of them may become another picture; the figures
            leave 5 to 10 dB beside the worse of the two reference models.
        schedule: other recipes for the first or last steps of a loop; None where one recipe computes all of it.
    """

    name: str
    version: int
    weights: Format
    arithmetic: Format
    summary: str
    rest: Format = Format.FP32
    scope: Scope = Scope.GRAPH
    others: tuple[Format, ...] = ()
    psnr_db: float | None = None
    rel_error: float | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.rest in QUANTISED:
            raise InvalidInput(
                f"recipe {self.name!r}: the rest cannot be {self.rest.value}; choose fp32, fp16 or bf16."
            )
        if self.calibrated and (self.psnr_db is None or self.rel_error is None):
            raise InvalidInput(f"recipe {self.name!r} is quantised and must state the loss that it is allowed.")

    @property
    def calibrated(self) -> bool:
        """Whether it needs the scales that ``lehr calibrate`` finds."""
        return bool({self.weights, self.arithmetic, *self.others} & QUANTISED)

    @property
    def computes(self) -> frozenset[Format]:
        """What the step graph computes in: its products, and the rest; at every step of a loop."""
        two = self.calibrated or self.scope is Scope.MATRICES
        own = frozenset({self.arithmetic, self.rest} if two else {self.arithmetic})
        return own.union(*(part.computes for part in self.parts.values()))

    @property
    def formats(self) -> frozenset[Format]:
        """Every format that an engine library must know; weights that are stored in fp32 need none."""
        own = self.computes | {self.weights, *self.others} - {Format.FP32}
        return own.union(*(part.formats for part in self.parts.values()))

    @property
    def parts(self) -> dict[str, Recipe]:
        """Recipes of the ends of a loop, by :data:`.FIRST` and :data:`.LAST`."""
        return {} if self.schedule is None else {**self.schedule.recipes}

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "schedule"}
        plain = {key: value.value if isinstance(value, Enum) else value for key, value in plain.items()}
        plain["others"] = [form.value for form in self.others]
        return plain if self.schedule is None else {**plain, "schedule": self.schedule.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Read what :meth:`to_json` wrote; raises KeyError, TypeError, ValueError or InvalidInput for anything else."""
        given = dict(data)
        given |= {key: Format(given[key]) for key in ("weights", "arithmetic", "rest")}
        given["scope"] = Scope(given.get("scope", Scope.GRAPH))
        given["others"] = tuple(Format(form) for form in given["others"])
        if given.get("schedule") is not None:
            given["schedule"] = Schedule.from_json(given["schedule"])
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Other recipes for the ends of a loop: its precision schedule.

    Attributes:
        ends: how many steps they are, and which evaluations belong to them.
        first, last: their recipes; None for an end that does not stand apart.
    """

    ends: Ends
    first: Recipe | None = None
    last: Recipe | None = None

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        """Of the ends that there are, by :data:`.FIRST` and :data:`.LAST`."""
        both = {FIRST: self.first, LAST: self.last}
        return {name: recipe for name, recipe in both.items() if recipe is not None}

    def __post_init__(self) -> None:
        if set(self.recipes) != set(self.ends.names):
            raise InvalidInput(
                f"a precision schedule has recipes for {sorted(self.recipes)} and steps for {sorted(self.ends.names)}."
            )
        for name, recipe in self.recipes.items():
            if recipe.schedule is not None:
                raise InvalidInput(
                    f"the {name} steps cannot take recipe {recipe.name!r}: it has a precision schedule of its own. "
                    "Name one without."
                )

    def to_json(self) -> dict[str, Any]:
        return {"ends": self.ends.to_json(), "recipes": {name: r.to_json() for name, r in self.recipes.items()}}

    @classmethod
    def from_json(cls, data: Any) -> Schedule:
        """Read what :meth:`to_json` wrote; raises as :meth:`Recipe.from_json` does."""
        recipes = {str(name): Recipe.from_json(one) for name, one in dict(data["recipes"]).items()}
        return cls(ends=Ends.from_json(data["ends"]), **recipes)

    def __str__(self) -> str:
        steps = {FIRST: self.ends.first, LAST: self.ends.last}
        return ", ".join(f"{name} {steps[name]} steps in {recipe.name}" for name, recipe in self.recipes.items())


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
    "bf16-matmul": Recipe(
        name="bf16-matmul",
        version=1,
        weights=Format.FP32,
        arithmetic=Format.BF16,
        scope=Scope.MATRICES,
        summary="matrix products on bfloat16 but in the first and last layer; convolutions and all else in fp32",
    ),
    "int8": Recipe(
        name="int8",
        version=1,
        weights=Format.INT8,
        arithmetic=Format.INT8,
        psnr_db=22.0,
        rel_error=0.15,
        summary="8-bit products: weights a scale each output channel, activations one a tensor",
    ),
    "int8-sq": Recipe(
        name="int8-sq",
        version=1,
        weights=Format.INT8,
        arithmetic=Format.INT8,
        psnr_db=26.0,
        rel_error=0.12,
        summary="int8 after SmoothQuant, which moves outliers from activations into weights",
    ),
    "int8-asym": Recipe(
        name="int8-asym",
        version=1,
        weights=Format.INT8,
        arithmetic=Format.INT8,
        others=(Format.UINT8,),
        psnr_db=26.0,
        rel_error=0.12,
        summary="int8-sq with a zero point for each activation, which CPUs take and TensorRT does not",
    ),
    "int8-asym-attention": Recipe(
        name="int8-asym-attention",
        version=1,
        weights=Format.INT8,
        arithmetic=Format.INT8,
        others=(Format.UINT8,),
        psnr_db=26.0,
        rel_error=0.12,
        summary="int8-asym with both products of attention in 8 bits too, which OpenVINO fuses with the softmax",
    ),
    "int8-attention": Recipe(
        name="int8-attention",
        version=1,
        weights=Format.FP32,
        arithmetic=Format.INT8,
        others=(Format.UINT8,),
        psnr_db=30.0,
        rel_error=0.1,
        summary="only the products of attention in 8 bits, for models that spend most of their time there",
    ),
    "int8-weight": Recipe(
        name="int8-weight",
        version=1,
        weights=Format.INT8,
        arithmetic=Format.FP32,
        psnr_db=38.0,
        rel_error=0.03,
        summary="weights in 8 bits, arithmetic as before; a quarter of the memory of fp32",
    ),
    "int4-weight": Recipe(
        name="int4-weight",
        version=1,
        weights=Format.INT4,
        arithmetic=Format.FP32,
        psnr_db=14.0,
        rel_error=0.25,
        summary="weights in 4 bits by blocks, scaled by what the activations make of them (AWQ)",
    ),
    "fp8": Recipe(
        name="fp8",
        version=2,
        weights=Format.FP8,
        arithmetic=Format.FP8,
        psnr_db=14.0,
        rel_error=0.15,
        summary="E4M3 products, attention included, shortcuts kept; CPUs emulate it, to measure what it costs",
    ),
    "nvfp4": Recipe(
        name="nvfp4",
        version=1,
        weights=Format.NVFP4,
        arithmetic=Format.FP32,
        psnr_db=14.0,
        rel_error=0.3,
        summary="weights in 4-bit floating point by blocks of 16; CPUs emulate it",
    ),
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``; raises UnknownName with the closest match."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
