"""What a search may make of each layer: as it is, or as one of the shipped recipes would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lehr.calibration.configs import Config, Keep, Rounding, to_nearest
from lehr.calibration.cost_model import Choices
from lehr.calibration.layers import Layer
from lehr.calibration.observed import Statistics
from lehr.calibration.problem import KEEP
from lehr.calibration.recipes import POLICIES, needs_grams
from lehr.engines.target import Target
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import RECIPES, Format


def recipes_for(target: Target | None, rest: Format, found: tuple[Layer, ...]) -> tuple[str, ...]:
    """Shipped recipes whose formats a target has, and that quantise a layer of the graph.

    Without a target, those that a CPU has integer kernels for.

    Raises:
        InvalidInput: there is none.
    """
    allowed = {*Format} if target is None else set(target.formats)
    if target is None or not target.sm:  # CPUs emulate the others, which is slow and saves nothing
        allowed &= {Format.INT8, Format.UINT8, Format.INT4, Format.FP32, Format.BF16}
    able = [name for name in POLICIES if _needs(name, rest) <= allowed]
    able = [name for name in able if any(POLICIES[name].takes(layer) for layer in found)]
    if not able:
        where = "this machine" if target is None else f"target {target.where!r}"
        raise InvalidInput(
            f"{where} has no quantised format for this model's layers, so there is nothing to search. "
            "lehr list targets shows the formats."
        )
    return tuple(able)


def _needs(name: str, rest: Format) -> set[Format]:
    shipped = RECIPES[name]
    arithmetic = rest if shipped.arithmetic is shipped.rest else shipped.arithmetic
    return {shipped.weights, arithmetic, rest, *shipped.others}


def options_of(found: tuple[Layer, ...], recipes: tuple[str, ...]) -> dict[str, dict[str, Config]]:
    """What each layer can be made: as it is, or as one of some recipes would, whatever its role.

    Where two recipes would make the same of a layer, the option bears the first one's name.
    """
    choices: dict[str, dict[str, Config]] = {}
    for layer in found:
        options: dict[str, Config] = {KEEP: Keep()}
        for name in recipes:
            config = POLICIES[name].configs.get(layer.kind)
            if config is not None and config not in options.values():
                options[name] = config
        if len(options) > 1:
            choices[layer.name] = options
    return choices


def as_options(plan: Mapping[str, Config], choices: Choices) -> dict[str, str]:
    """Layer -> name of its option, for what a uniform recipe does; layers without that option stay as they are."""
    return {
        layer: name
        for layer, config in plan.items()
        for name, option in choices.get(layer, {}).items()
        if to_nearest(option) == to_nearest(config)
    }


def roundable(choices: Choices, statistics: Statistics) -> dict[str, dict[str, Config]]:
    """The same without rounding that needs products of inputs, in layers whose products were not gathered."""
    return {
        layer: {
            option: replace(config, rounding=Rounding.NEAREST)
            if needs_grams({layer: config}) and layer not in statistics.grams and not isinstance(config, Keep)
            else config
            for option, config in options.items()
        }
        for layer, options in choices.items()
    }
