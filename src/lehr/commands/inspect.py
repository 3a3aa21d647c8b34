"""``lehr inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lehr.commands._output import bundle_argument, emit, json_option, table


def _engine(bundle: Any, record: Any) -> dict[str, Any]:
    size = sum(bundle.manifest.files[name].bytes for name in bundle.names(record.folder + "/"))
    return {
        "target": record.target,
        "recipe": record.recipe,
        "library": record.library,
        "library_version": record.library_version,
        "bytes": size,
        "achieved_precision": dict(record.achieved_precision),
        "operators": dict(record.operators),
        "engine": record.folder,
        "parity": bundle.manifest.parity.get(record.folder),
    }


@click.command("inspect")
@bundle_argument
@click.option("--verify-files", is_flag=True, help="Also read every file and check its SHA-256.")
@json_option
def command(bundle: Path, verify_files: bool, as_json: bool) -> None:
    """Show what a bundle holds.

    \b
    Examples:
      lehr inspect d.lehr
      lehr inspect d.lehr --verify-files --json
    """
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import engines

    opened = Bundle.open(bundle)
    if verify_files:
        opened.verify()
    manifest = opened.manifest
    graphs = {
        name: {
            "parameters": graph.parameters,
            "bytes": sum(manifest.files[file].bytes for file in (graph.file, graph.weights) if file),
            "nodes": graph.nodes,
            "opset": graph.opset,
            "weights": graph.weights is not None,
        }
        for name, graph in manifest.graphs.items()
    }
    data = {
        "model": manifest.model.to_json(),
        "source": manifest.source,
        "golden": manifest.golden_tier,
        "versions": dict(manifest.versions),
        "graphs": graphs,
        "engines": [_engine(opened, record) for record in engines(opened)],
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": len(manifest.files),
    }
    emit(as_json, data, _prose(data))


def _prose(data: dict[str, Any]) -> str:
    model = data["model"]
    graphs = [
        (name, f"{g['parameters']:,}", f"{g['bytes'] / 1e6:,.1f}", g["nodes"], g["opset"])
        for name, g in data["graphs"].items()
    ]
    inputs = [
        (t["name"], t["dtype"], " x ".join(str(size) for size in t["shape"]), t["varies"]) for t in model["inputs"]
    ]
    title = (
        f"{model['name']} ({model['family']}) from {data['source']}: {model['prediction']['kind']} on a "
        f"{model['path']['kind']} path, golden data: {data['golden']}, {data['files']} files, "
        f"{data['bytes'] / 1e6:,.1f} MB"
    )
    parts = [
        title,
        table(("graph", "parameters", "MB", "operators", "opset"), graphs),
        table(("input", "type", "shape", "varies with"), inputs),
    ]
    if data["engines"]:
        rows = [
            (
                e["target"],
                e["recipe"],
                f"{e['library']} {e['library_version']}",
                f"{e['bytes'] / 1e6:,.1f}",
                " ".join(f"{k}:{v:.0%}" for k, v in e["achieved_precision"].items()),
                {None: "not verified", True: "passed", False: "FAILED"}[e["parity"] and e["parity"]["passed"]],
            )
            for e in data["engines"]
        ]
        parts.append(table(("target", "recipe", "library", "MB", "precision", "parity"), rows))
    else:
        parts.append("no engines yet: lehr build")
    return "\n\n".join(parts)
