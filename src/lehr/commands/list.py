"""``lehr list``."""

from __future__ import annotations

import json
import platform
import sys
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
    from lehr.engines.builders import buildable, fitting
    from lehr.engines.target import targets
    from lehr.runtime.backends import backends
    from lehr.runtime.recipe import RECIPES

    return [
        {
            "name": t.name,
            "sm": list(t.sm),
            "libraries": list(t.libraries),
            "recipes": [r.name for r in RECIPES.values() if fitting(t, r)],
            "builds_here": list(buildable(t, sys.platform, platform.machine())),
            "runs_with": [name for name in t.libraries if name in backends()],
            "formats": [form.value for form in t.formats],
            "native": list(t.native),
            "os": list(t.os),
            "arch": list(t.arch),
            "opset": t.opset,
            "memory_gb": t.memory_gb and list(t.memory_gb),
            "bandwidth_gb_s": t.bandwidth_gb_s and list(t.bandwidth_gb_s),
            "dla": list(t.dla),
            "versions": dict(t.versions),
            "summary": t.summary,
        }
        for t in targets().values()
    ]


def _targets_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["name"],
            " ".join(row["sm"]),
            " ".join(row["libraries"]) or "none yet",
            " ".join(row["recipes"]),
            "yes" if row["builds_here"] else "no",
            "not yet" if not row["runs_with"] else "untried on a GPU" if row["sm"] else "yes",
            row["summary"],
        )
        for row in rows
    ]
    return (
        table(("name", "SM", "libraries", "recipes", "builds here", "Lehr runs it", "summary"), cells)
        + "\n\nbuilds here: on a machine of this kind, with an installed library; TensorRT also needs the target's GPU."
    )


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


def _recipes_table(rows: list[dict[str, Any]]) -> str:
    cells = [(row["name"], row["weights"], row["arithmetic"], " ".join(row["targets"]), row["summary"]) for row in rows]
    return table(("name", "weights", "arithmetic", "targets", "summary"), cells)


_KINDS = {
    "backbones": _backbones,
    "presets": _presets,
    "samplers": _samplers,
    "targets": _targets,
    "recipes": _recipes,
}


_TABLES = {"targets": _targets_table, "recipes": _recipes_table}  # for people, where not every field is shown


def _table(rows: list[dict[str, Any]]) -> str:
    return table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> str:
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
    emit(as_json, rows, _TABLES.get(kind, _table)(rows))
