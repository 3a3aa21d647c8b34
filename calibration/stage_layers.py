"""The layers of a stage beside the denoiser, and what a recipe does with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from lehr.calibration.configs import Config
from lehr.calibration.keep_high import writers_of
from lehr.calibration.layers import Layer, Role, kind_of, layers
from lehr.calibration.recipes import POLICIES, plan_of
from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.recipe import RECIPES
from lehr.runtime.stage import StageKind, StageSpec


def stage_layers(model: ir.Model, spec: StageSpec) -> tuple[Layer, ...]:
    """Every layer of a stage's graph that can be quantised, in the order of the graph.

    Two roles mean less here than in a denoiser. Where an output is a residual stream, half of all layers write it, each
    its share; none of them is the last one. And what a text encoder multiplies first are rows of a table, which no
    earlier error has reached.

    Raises:
        InvalidInput: the graph is quantised already.
    """
    alone = set[str]()
    for value in model.graph.outputs:
        names = {node.name or "" for node in writers_of([value]) if kind_of(node) is not None}
        alone |= names if len(names) == 1 else set()
    text = spec.kind is StageKind.TEXT_ENCODER
    found = []
    for layer in layers(model, sample=spec.inputs[0].name):
        dropped = {Role.FIRST} if text else set[Role]()
        if layer.name not in alone:
            dropped.add(Role.LAST)
        found.append(replace(layer, roles=layer.roles - dropped))
    return tuple(found)


def stage_plan(name: str, found: Iterable[Layer], stage: str) -> dict[str, Config]:
    """Layer -> configuration, for every layer of a stage that a shipped recipe quantises.

    Raises:
        UnknownName: no such recipe.
        InvalidInput: a recipe that needs no calibration or quantises nothing of this stage; with those that do.
    """
    known = tuple(found)
    if name not in RECIPES:
        raise UnknownName("recipe", name, POLICIES)
    able = ", ".join(other for other in POLICIES if _quantises(other, known)) or "none"
    if name not in POLICIES:
        raise InvalidInput(
            f"recipe {name!r} needs no calibration; build stage {stage!r} in it: --stage-recipe {stage}={name}. "
            f"Calibration makes of this stage: {able}."
        )
    if not _quantises(name, known):
        kinds = ", ".join(sorted({layer.kind.value for layer in known})) or "none"
        raise InvalidInput(
            f"recipe {name!r} quantises no layer of stage {stage!r} (its layers: {kinds}). It can take: {able}."
        )
    return plan_of(name, known)


def _quantises(name: str, found: Iterable[Layer]) -> bool:
    policy = POLICIES[name]
    return any(layer.kind in policy.configs and not layer.roles & policy.keep for layer in found)
