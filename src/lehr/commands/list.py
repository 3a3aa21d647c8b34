"""``lehr list``."""

from __future__ import annotations

import json
from typing import Any

import click

from lehr.commands._output import emit, json_option, table


def _presets() -> list[dict[str, Any]]:
    from importlib.resources import files

    rows: list[dict[str, Any]] = json.loads(files("lehr.export").joinpath("backbones/presets.json").read_text())
    return rows


def _backbones() -> list[dict[str, Any]]:
    counts: dict[str, list[int]] = {}
    for row in _presets():
        counts.setdefault(row["family"], []).append(row["parameters"])
    return [
        {"name": name, "presets": len(sizes), "smallest": min(sizes), "largest": max(sizes)}
        for name, sizes in sorted(counts.items())
    ]


def _samplers() -> list[dict[str, Any]]:
    from lehr.runtime.solvers import samplers

    return [
        {
            "name": s.name,
            "order": s.order,
            "stochastic": s.stochastic,
            "paths": [path.__name__ for path in s.paths],
            "summary": s.summary,
            "reference": s.reference,
        }
        for s in samplers().values()
    ]


def _targets() -> list[dict[str, Any]]:
    from lehr.engines.builders import fitting
    from lehr.engines.target import targets
    from lehr.runtime.recipe import RECIPES

    return [
        {
            "name": t.name,
            "libraries": list(t.libraries),
            "recipes": [r.name for r in RECIPES.values() if fitting(t, r)],
            "formats": [form.value for form in t.formats],
            "arch": list(t.arch),
            "summary": t.summary,
        }
        for t in targets().values()
    ]


def _recipes() -> list[dict[str, Any]]:
    from lehr.engines.builders import fitting
    from lehr.engines.target import targets
    from lehr.runtime.recipe import RECIPES

    return [
        {
            "name": r.name,
            "version": r.version,
            "weights": r.weights.value,
            "arithmetic": r.arithmetic.value,
            "targets": {t.name: list(found) for t in targets().values() if (found := fitting(t, r))},
            "summary": r.summary,
        }
        for r in RECIPES.values()
    ]


_KINDS = {
    "backbones": _backbones,
    "presets": _presets,
    "samplers": _samplers,
    "targets": _targets,
    "recipes": _recipes,
}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}:{','.join(items)}" for key, items in value.items())
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:,}" if isinstance(value, int) else str(value)


@click.command("list")
@click.argument("kind", type=click.Choice(list(_KINDS)))
@json_option
def command(kind: str, as_json: bool) -> None:
    """List backbones, presets, samplers, targets or recipes.

    \b
    Examples:
      lehr list presets
      lehr list samplers --json
    """
    rows = _KINDS[kind]()
    emit(as_json, rows, table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))
