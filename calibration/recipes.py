"""The recipes that need calibration: which layers they quantise, and how.

What a layer is decides, never its name. The first and the last layer and whatever does not depend on the sample stay
as they are in all but the weight-only recipes: they hold a per cent of the arithmetic and most of the error. fp8 also
keeps shortcuts, which carry a residual stream past other layers. Norms,
softmax and sums are never quantised: they are no layers; the softmax's result is rounded where its product is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lehr.calibration.configs import (
    ALPHAS,
    INT4_BLOCK,
    Config,
    Float4,
    Float8,
    Int8,
    Keep,
    Rounding,
    WeightOnly,
    ZeroPoint,
    formats_of,
    rounds_together,
)
from lehr.calibration.layers import Kind, Layer, Role
from lehr.runtime.errors import InvalidInput
from lehr.runtime.names import name_problem
from lehr.runtime.recipe import MIXED, RECIPES, Format, Recipe

__all__ = ["MIXED", "POLICIES", "Policy", "mixed_recipe", "needs_grams", "plan_of", "renamed", "resting_in"]


_ENDS = frozenset({Role.FIRST, Role.LAST, Role.CONDITIONING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a recipe does with the layers of a graph.

    Attributes:
        configs: of each kind; kinds that are missing stay as they are.
        keep: roles that stay as they are.
    """

    configs: Mapping[Kind, Config]
    keep: frozenset[Role] = _ENDS

    def takes(self, layer: Layer) -> bool:
        """Whether the recipe quantises a layer."""
        return layer.kind in self.configs and not layer.roles & self.keep


_INT8 = Int8()
_SMOOTH = Int8(alphas=ALPHAS, rounding=Rounding.GPTQ)
_ASYM = Int8(zero=ZeroPoint.OWN, alphas=ALPHAS, rounding=Rounding.GPTQ)
_PROBABILITIES = Int8(zero=ZeroPoint.OWN)
_W8 = WeightOnly(format=Format.INT8, rounding=Rounding.GPTQ)
_F8 = Float8(rounding=Rounding.GPTQ)
_W4 = WeightOnly(format=Format.INT4, block=INT4_BLOCK, alphas=ALPHAS, rounding=Rounding.GPTQ)

POLICIES: Mapping[str, Policy] = {
    "int8": Policy(configs={Kind.MATMUL: _INT8, Kind.CONV: _INT8}),
    "int8-sq": Policy(configs={Kind.MATMUL: _SMOOTH, Kind.CONV: _SMOOTH}),
    # Convolutions of single pixels are 5 % of the arithmetic of a latent U-Net and cost its output 2 dB: 28.0 dB with
    # them, 28.5 without shortcuts, 30.0 without any (36M parameters, 32x32, weights rounded to nearest).
    "int8-asym": Policy(configs={Kind.MATMUL: _ASYM, Kind.CONV: _ASYM}, keep=_ENDS | {Role.SHORTCUT, Role.POINTWISE}),
    "int8-asym-attention": Policy(
        configs={Kind.MATMUL: _ASYM, Kind.CONV: _ASYM, Kind.ATTENTION: _PROBABILITIES},
        keep=_ENDS | {Role.SHORTCUT, Role.POINTWISE},
    ),
    "int8-attention": Policy(configs={Kind.ATTENTION: _PROBABILITIES}),
    "int8-weight": Policy(configs={Kind.MATMUL: _W8, Kind.CONV: _W8}, keep=frozenset({Role.LAST})),
    "int4-weight": Policy(configs={Kind.MATMUL: _W4, Kind.CONV: _W4}),
    # Three bits of mantissa for a whole residual stream are too few: on digits-adm its seven shortcuts, 3 % of the
    # arithmetic, made the output 4.5 dB worse.
    "fp8": Policy(configs={Kind.MATMUL: _F8, Kind.CONV: _F8, Kind.ATTENTION: _F8}, keep=_ENDS | {Role.SHORTCUT}),
    "nvfp4": Policy(configs={Kind.MATMUL: Float4()}),
}


def plan_of(name: str, layers: Iterable[Layer]) -> dict[str, Config]:
    """Layer -> configuration, for every layer that a shipped recipe quantises.

    Raises:
        InvalidInput: a recipe that needs no calibration, or one that quantises no layer of this graph.
    """
    if name not in POLICIES:
        raise InvalidInput(
            f"recipe {name!r} needs no calibration; those that do: {', '.join(POLICIES)}. "
            f"Build it: lehr build NAME.lehr --recipe {name}"
        )
    policy = POLICIES[name]
    found = list(layers)
    plan = {layer.name: policy.configs[layer.kind] for layer in found if policy.takes(layer)}
    if not plan:
        kinds = ", ".join(sorted({layer.kind.value for layer in found})) or "none"
        raise InvalidInput(
            f"recipe {name!r} quantises no layer of this model (its layers: {kinds}). Choose another recipe."
        )
    return plan


def needs_grams(plan: Mapping[str, Config]) -> tuple[str, ...]:
    """Layers of a plan that are rounded with the products of their inputs."""
    return tuple(name for name, config in plan.items() if rounds_together(config))


def mixed_recipe(
    name: str, plan: Mapping[str, Config], *, psnr_db: float, rel_error: float, rest: Format = Format.FP32
) -> Recipe:
    """The recipe of a plan whose layers differ; its arithmetic is the one that asks most of the hardware.

    Args:
        name: in the bundle.
        plan: of the layers.
        psnr_db: of the final sample that it is allowed.
        rel_error: of the score of one evaluation that it is allowed.
        rest: arithmetic of what is not quantised.

    Raises:
        InvalidInput: the plan quantises nothing.
    """
    pairs = [formats_of(config) for config in plan.values() if not isinstance(config, Keep)]
    stored = [form for form, _ in pairs if form is not None]
    if not stored:
        raise InvalidInput(f"recipe {name!r} quantises no layer, so it is {rest.value}: build --recipe {rest.value}.")
    products = [form for _, form in pairs if form is not None]
    arithmetic = Format.FP8 if Format.FP8 in products else Format.INT8 if Format.INT8 in products else rest
    weights = max(sorted(set(stored), key=lambda form: form.value), key=stored.count)
    own = {Format.UINT8 for config in plan.values() if isinstance(config, Int8) and config.zero is ZeroPoint.OWN}
    others = tuple(sorted({*stored, *products, *own} - {weights, arithmetic}, key=lambda form: form.value))
    return Recipe(
        name=name,
        version=1,
        weights=weights,
        arithmetic=arithmetic,
        rest=rest,
        others=others,
        psnr_db=psnr_db,
        rel_error=rel_error,
        summary=f"{len(stored)} layers quantised, each in a format of its own",
    )


def renamed(chosen: Recipe, name: str) -> Recipe:
    """The recipe under another name.

    Raises:
        InvalidInput: a shipped recipe's name, or one that is no folder's.
    """
    if name in RECIPES and name != chosen.name:
        raise InvalidInput(f"{name!r} is a shipped recipe. Choose a name of your own.")
    problem = name_problem(f"calibration/{name}") or ("it holds a slash" if "/" in name or "--" in name else None)
    if problem:
        raise InvalidInput(f"{name!r} cannot name a recipe: {problem}. Use letters, digits and single hyphens.")
    return replace(chosen, name=name)


def resting_in(recipe: Recipe, rest: Format) -> Recipe:
    """The recipe with another arithmetic for what is not quantised."""
    own = recipe.arithmetic is recipe.rest
    return replace(recipe, rest=rest, arithmetic=rest if own else recipe.arithmetic)
