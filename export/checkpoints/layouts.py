"""Single files: which family and preset a checkpoint is, told from its keys and shapes alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lehr.engines.graph.weights import WeightSource
from lehr.export.backbones import families, preset, presets
from lehr.export.backbones.preset import Preset
from lehr.export.checkpoints.mapped import Fit, Layout, MappedSource, Shape, fit, shapes
from lehr.export.checkpoints.rules import Origin, origin
from lehr.runtime.errors import InvalidInput
from lehr.runtime.spec import ModelSpec

ORIGINAL, DIFFUSERS, OWN = "original", "diffusers", "lehr"
WHOLE_PIPELINE = "model.diffusion_model."  # what files with several parts of a pipeline put before a denoiser's names


def layouts(family: str, params: Any) -> tuple[Layout, ...]:
    """Every layout in which the tensors of a family are found, the authors' first."""
    try:
        tables = importlib.import_module(f"lehr.export.checkpoints.maps.{family}")
    except ModuleNotFoundError:  # a family that nobody else stores
        return (Layout(OWN, ()),)
    found = [Layout(ORIGINAL, tables.ORIGINAL, tables.ORIGINAL_IGNORED)]
    if tables.ORIGINAL:
        found.append(Layout(OWN, ()))
    if hasattr(tables, "DIFFUSERS"):
        numbered = getattr(tables, "diffusers_rules", None)  # where the rules depend on the blocks of a level
        rules = tables.DIFFUSERS if numbered is None else numbered(params.num_res_blocks)
        found.append(Layout(DIFFUSERS, rules, tables.DIFFUSERS_IGNORED))
    if hasattr(tables, "DIFFUSERS_OLD"):
        found.append(Layout(DIFFUSERS, tables.DIFFUSERS_OLD, tables.DIFFUSERS_IGNORED))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """A checkpoint and the preset it is. ``others`` fit as well and differ in their usual sizes at most."""

    preset: Preset
    layout: Layout
    source: MappedSource
    others: tuple[str, ...] = ()


def recognise(source: WeightSource, name: str | None) -> Recognised:
    """Find the preset that a single file holds.

    Args:
        source: the file.
        name: the preset, where the user named it.

    Raises:
        InvalidInput: names or shapes are no preset's (the closest is shown), or they are those of several presets
            that compute different things.
        UnknownName: ``name`` is no preset.
    """
    views = _views(source)
    if name is not None:
        chosen = preset(name)
        closest = min(
            ((view, *pair) for view in views for pair in _fits(view, name, chosen)), key=lambda entry: entry[2].problems
        )
        view, layout, found = closest
        if found.problems:
            raise InvalidInput(
                f"{source} does not hold the weights of preset {name!r} in the {layout.name} layout. {found}. "
                "Check that weights and architecture belong together."
            )
        return Recognised(preset=chosen, layout=layout, source=MappedSource(view, found.origins))
    tried = [
        (candidate, view, *pair)
        for candidate, chosen in presets().items()
        for view in views
        if _marked(view, chosen.spec.family, chosen.params)
        for pair in _fits(view, candidate, chosen)
    ]
    fitting = [entry for entry in tried if not entry[3].problems]
    if not fitting:
        raise InvalidInput(_unrecognised(source, [(candidate, layout, found) for candidate, _, layout, found in tried]))
    first, view, layout, found = fitting[0]
    names = tuple(dict.fromkeys(entry[0] for entry in fitting))
    if any(meaning(presets()[other].spec) != meaning(presets()[first].spec) for other in names):
        raise InvalidInput(
            f"{source} fits several presets, whose tensors have the same names and shapes: {', '.join(names)}. "
            "They compute different things; say which it is with --preset."
        )
    return Recognised(
        preset=presets()[first], layout=layout, source=MappedSource(view, found.origins), others=names[1:]
    )


def _views(source: WeightSource) -> tuple[WeightSource, ...]:
    """The file as it is and, where it holds a whole pipeline, its denoiser alone."""
    inside = {
        name.removeprefix(WHOLE_PIPELINE): Origin(parts=((name,),))
        for name in source.names()
        if name.startswith(WHOLE_PIPELINE)
    }
    return (source, MappedSource(source, inside)) if inside else (source,)


def meaning(spec: ModelSpec) -> tuple[object, ...]:
    """What must be known to use a model's output; names, usual sizes and sampling defaults are not of it."""
    return spec.path, spec.prediction, spec.value_range


def _marked(source: WeightSource, family: str, params: Any) -> bool:
    """A glance at a few keys, before any backbone is built."""
    if family not in families():
        return True
    try:
        marker = importlib.import_module(f"lehr.export.checkpoints.maps.{family}").MARKER
    except ModuleNotFoundError:
        return True
    available = set(source.names())
    return any(
        all(key in available for ours in marker for key in origin(layout.rules, ours, available).keys)
        for layout in layouts(family, params)
    )


def _fits(source: WeightSource, name: str, chosen: Preset) -> Iterator[tuple[Layout, Fit]]:
    wanted = _shapes(name, chosen)
    for layout in layouts(chosen.spec.family, chosen.params):
        yield layout, fit(source, wanted, layout)


@cache
def _cached_shapes(name: str) -> dict[str, Shape]:
    return meta_shapes(presets()[name])


def _shapes(name: str, chosen: Preset) -> dict[str, Shape]:
    return _cached_shapes(name) if presets().get(name) is chosen else meta_shapes(chosen)


def meta_shapes(chosen: Preset) -> dict[str, Shape]:
    """Names and shapes of a preset's tensors."""
    with torch.device("meta"):
        return shapes(chosen.module())


def _unrecognised(source: WeightSource, tried: list[tuple[str, Layout, Fit]]) -> str:
    if not tried:
        names = list(source.names())
        shown = ", ".join(repr(name) for name in names[:3])
        return (
            f"{source} is of no layout that is known: its {len(names)} tensors begin with {shown or 'nothing'}. "
            "Expected a denoiser of one of the presets; say which with --preset to see what differs, or write a "
            "FILE.py:FACTORY that loads it."
        )
    name, layout, closest = min(tried, key=lambda entry: entry[2].problems)
    return (
        f"{source} is no preset. The closest is {name!r} in the {layout.name} layout: {closest}. "
        "Expected all names and shapes to agree; a diffusers folder says its architecture itself, and a "
        "FILE.py:FACTORY can load anything."
    )
