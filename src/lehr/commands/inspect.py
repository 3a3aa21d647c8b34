"""``lehr inspect``."""

from __future__ import annotations

import math
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
        "ends": {} if record.ends is None else _ends(record),
        "engine": record.folder,
        "parity": bundle.manifest.parity.get(record.folder),
    }


def _ends(record: Any) -> dict[str, Any]:
    """Ends of a precision schedule: steps, recipe and what they compute in."""
    return {
        end: {
            "steps": getattr(record.ends, end),
            "recipe": recipe,
            "achieved_precision": dict(record.plans[f"step.{end}"].achieved_precision),
        }
        for end, recipe in record.end_recipes.items()
    }


def _cached(graph: Any, spec: Any) -> int:
    """Bytes of a graph's results for one sample, at the model's default sizes."""
    sizes = spec.default_sizes(batch=1)
    return sum(math.prod(tensor.sizes(sizes)) * tensor.dtype.numpy.itemsize for tensor in graph.signature.outputs)


def _explain(bundle: Any, tensor: str) -> list[str]:
    from lehr.runtime.errors import MissingExtra

    try:
        from lehr.engines.graph.rates import explain_bundle
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    return explain_bundle(bundle, tensor)


def _table(steps: int, solver: Any) -> dict[str, Any]:
    return {
        "scheduler": solver.sampler,
        "steps": steps,
        "evaluations": len(solver),
        "noises": solver.num_noises,
    }


def _calibrated(bundle: Any, stage: str | None = None) -> list[dict[str, Any]]:
    """What calibration left, of the denoiser or of a stage; of a packed bundle what it still says of it."""
    from lehr.runtime.calibrated import WEIGHTS, calibrated_folder, calibrated_names, read_calibrated

    found = []
    for name in calibrated_names(bundle, stage):
        record = read_calibrated(bundle, name, stage).record
        weights = bundle.manifest.known_files.get(f"{calibrated_folder(name, stage)}/{WEIGHTS}")
        found.append(
            {
                "recipe": name,
                "layers": len(record.get("plan", {})),
                "weight_bytes": None if weights is None else weights.bytes,
                "data": record.get("data"),
            }
        )
    return found


def _stage(bundle: Any, name: str, entry: Any) -> dict[str, Any]:
    """One stage beside the denoiser."""
    from lehr.runtime.engine import engines
    from lehr.runtime.kits import kits

    graph = entry.graph
    size = bundle.manifest.known_files[graph.file].bytes + graph.weight_bytes * (graph.weights is not None)
    return {
        "kind": entry.spec.kind.value,
        "family": entry.spec.family,
        "parameters": graph.parameters,
        "bytes": size,
        "nodes": graph.nodes,
        "flops": graph.flops,
        "opset": graph.opset,
        "weights": graph.weights is not None,
        "golden": entry.golden in bundle.manifest.files,
        "inputs": [tensor.to_json() for tensor in entry.spec.inputs],
        "outputs": [tensor.to_json() for tensor in entry.spec.outputs],
        "notes": dict(entry.spec.notes),
        "calibrated": _calibrated(bundle, name),
        "engines": [_engine(bundle, record) for record in engines(bundle, name)],
        "kits": [{"target": kit.target, "recipe": kit.recipe, "library": kit.library} for kit in kits(bundle, name)],
    }


def _audit(bundle: Any) -> dict[str, Any] | None:
    """What the range audit in the bundle says in short."""
    from lehr.engines.audit import summary

    return summary(bundle)


@click.command("inspect")
@bundle_argument
@click.option("--explain", metavar="TENSOR", help="Why a tensor of the graphs is computed as often as it is.")
@click.option("--verify-files", is_flag=True, help="Also read every file and check its SHA-256.")
@json_option
def command(bundle: Path, explain: str | None, verify_files: bool, as_json: bool) -> None:
    """Show what a bundle holds.

    Cached bytes are what a graph hands to the step graph: the prompt graph's for one sample, the schedule graph's for
    one sample and step, both at the model's default sizes. The step graph's are its output.

    \b
    Examples:
      lehr inspect d.lehr
      lehr inspect d.lehr --explain schedule.0
      lehr inspect d.lehr --verify-files --json
    """
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import engines
    from lehr.runtime.kits import kits
    from lehr.runtime.stored_tables import StoredTables

    opened = Bundle.open(bundle)
    if verify_files:
        opened.verify()
    if explain is not None:
        lines = _explain(opened, explain)
        emit(as_json, {"tensor": explain, "explanation": lines}, "\n".join(lines))
        return
    manifest = opened.manifest
    graphs = {
        name: {
            "parameters": graph.parameters,
            "bytes": manifest.known_files[graph.file].bytes + graph.weight_bytes * (graph.weights is not None),
            "nodes": graph.nodes,
            "flops": graph.flops,
            "cached_bytes": _cached(graph, manifest.model),
            "opset": graph.opset,
            "weights": graph.weights is not None,
            "inputs": [tensor.to_json() for tensor in graph.signature.inputs],
        }
        for name, graph in manifest.graphs.items()
    }
    data = {
        "model": manifest.model.to_json(),
        "source": manifest.source,
        "golden": manifest.golden_tier,
        "tables": [_table(steps, solver) for steps, solver in StoredTables(opened).items()],
        "versions": dict(manifest.versions),
        "graphs": graphs,
        "engines": [_engine(opened, record) for record in engines(opened)],
        "kits": [{"target": kit.target, "recipe": kit.recipe, "library": kit.library} for kit in kits(opened)],
        "stages": {name: _stage(opened, name, entry) for name, entry in manifest.stages.items()},
        "pipeline": None if manifest.pipeline is None else manifest.pipeline.to_json(),
        "calibrated": _calibrated(opened),
        "audit": _audit(opened),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": len(manifest.files),
    }
    emit(as_json, data, _prose(data))


def _precision(engine: dict[str, Any]) -> str:
    """What an engine computes in, its ends included."""
    parts = [" ".join(f"{k}:{v:.0%}" for k, v in engine["achieved_precision"].items())]
    for name, end in engine["ends"].items():
        shares = " ".join(f"{k}:{v:.0%}" for k, v in end["achieved_precision"].items())
        parts.append(f"{name} {end['steps']} in {end['recipe']} ({shares or 'unknown'})")
    return "; ".join(parts)


def _prose(data: dict[str, Any]) -> str:
    model = data["model"]
    graphs = [
        (
            name,
            f"{g['parameters']:,}",
            f"{g['bytes'] / 1e6:,.1f}",
            f"{g['flops'] / 1e9:,.3g}",
            g["nodes"],
            f"{g['cached_bytes'] / 1e6:,.2f}",
            g["opset"],
        )
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
        table(("graph", "parameters", "MB", "GFLOPs", "operators", "MB a sample", "opset"), graphs),
        table(("input", "type", "shape", "varies with"), inputs),
    ]
    if data["tables"]:
        steps = [(t["scheduler"], t["steps"], t["evaluations"], t["noises"]) for t in data["tables"]]
        parts.append(table(("scheduler", "steps", "evaluations", "noises"), steps))
    if data["pipeline"] is not None:
        parts.append(f"pipeline: {data['pipeline']['family']} ({data['pipeline']['class_name']})")
    if data["stages"]:
        parts.append(_stages(data["stages"]))
    if data["engines"]:
        rows = [
            (
                e["target"],
                e["recipe"],
                f"{e['library']} {e['library_version']}",
                f"{e['bytes'] / 1e6:,.1f}",
                _precision(e),
                {None: "not verified", True: "passed", False: "FAILED"}[e["parity"] and e["parity"]["passed"]],
            )
            for e in data["engines"]
        ]
        parts.append(table(("target", "recipe", "library", "MB", "precision", "parity"), rows))
    else:
        parts.append("no engines yet: lehr build")
    if data["kits"]:
        waiting = ", ".join(f"{kit['target']} {kit['recipe']}" for kit in data["kits"])
        parts.append(f"build kits, for engines that the device itself must finish: {waiting}")
    if data["calibrated"]:
        parts.append(f"calibrated for: {_recipes(data['calibrated'])}")
    if data["audit"]:
        a = data["audit"]
        parts.append(
            f"range audit: {a['samples']} samples, {a['sampler']} with {a['evaluations']} evaluations, "
            f"{a['findings']} findings; calibration/ranges.png"
        )
    return "\n\n".join(parts)


def _recipes(calibrated: list[dict[str, Any]]) -> str:
    """Calibrated recipes and the size of their weights."""
    told = []
    for one in calibrated:
        size = "" if one["weight_bytes"] is None else f" ({one['weight_bytes'] / 1e6:,.1f} MB of weights)"
        told.append(f"{one['recipe']}{size}")
    return ", ".join(told)


def _stages(stages: dict[str, Any]) -> str:
    """A row a stage and one for each of its engines."""
    words = {None: "not verified", True: "passed", False: "FAILED"}
    rows = [
        (name, s["kind"], s["family"], f"{s['parameters']:,}", f"{s['bytes'] / 1e6:,.1f}", f"{s['flops'] / 1e9:,.3g}")
        for name, s in stages.items()
    ]
    built = [
        (
            name,
            e["target"],
            e["recipe"],
            f"{e['library']} {e['library_version']}",
            f"{e['bytes'] / 1e6:,.1f}",
            _precision(e),
            words[e["parity"] and e["parity"]["passed"]],
        )
        for name, s in stages.items()
        for e in s["engines"]
    ]
    told = table(("stage", "does", "family", "parameters", "MB", "GFLOPs"), rows)
    if built:
        told += "\n\n" + table(("stage", "target", "recipe", "library", "MB", "precision", "parity"), built)
    for name, s in stages.items():
        if s["calibrated"]:
            told += f"\n\nstage {name} is calibrated for: {_recipes(s['calibrated'])}"
    waiting = ", ".join(f"{name} {k['target']} {k['recipe']}" for name, s in stages.items() for k in s["kits"])
    return told + (f"\n\nbuild kits of stages: {waiting}" if waiting else "")
