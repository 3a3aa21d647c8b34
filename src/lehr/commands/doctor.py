"""``lehr doctor``."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import click

from lehr.commands._output import emit, json_option, table

# What each part of the work needs: (distribution, extra that installs it).
_PARTS = {
    "run, build, verify on a CPU": (("numpy", ""), ("onnxruntime", "cpu")),
    "the same with OpenVINO": (("numpy", ""), ("openvino", "openvino")),
    "build for RTX GPUs": (("tensorrt_rtx_cu13", "trt-rtx"), ("onnx-ir", "export")),
    "run TensorRT engines on a GPU": (("numpy", ""), ("cuda-python", "trt")),
    "export": (
        ("torch", "export"),
        ("onnx", "export"),
        ("onnxscript", "export"),
        ("onnx-ir", "export"),
        ("safetensors", "export"),
    ),
    "diffusers models": (("diffusers", "diffusers"),),
}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _recipes() -> list[dict[str, Any]]:
    """Which recipes this processor runs, and the libraries that build them for it."""
    from lehr.engines.builders import fitting
    from lehr.engines.target import target
    from lehr.runtime import host
    from lehr.runtime.errors import InvalidInput
    from lehr.runtime.recipe import RECIPES

    cpu = target("cpu")
    rows = []
    for recipe in RECIPES.values():
        reason = None
        try:
            cpu.check(recipe)
            cpu.check_machine(recipe, host.cpu_features())
        except InvalidInput as e:
            reason = str(e)
        libraries = list(fitting(cpu, recipe))
        rows.append({"name": recipe.name, "native": reason is None, "libraries": libraries, "reason": reason})
    return rows


def _gpu() -> dict[str, Any]:
    """The GPU here, and the engine libraries for it, with why one of them cannot be used."""
    from lehr.runtime import host
    from lehr.runtime.backends import backend
    from lehr.runtime.errors import MissingExtra
    from lehr.runtime.gpu_engine import LIBRARIES

    def said(name: str) -> str:
        try:
            return backend(name).version()
        except MissingExtra as e:
            return f"missing: {e}"

    return {**host.gpu(), "libraries": {name: said(name) for name in LIBRARIES}}


def _gpu_prose(gpu: dict[str, Any]) -> str:
    if "missing" in gpu:
        what = f"GPU: none, {gpu['missing']}"
    else:
        what = f"GPU: {gpu['name']}, SM {gpu['sm']}, {gpu['memory_mb']} MB, CUDA {gpu['cuda']}, driver {gpu['driver']}"
    return "\n".join([what, *(f"  {name} {said}" for name, said in gpu["libraries"].items())])


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine can do, and what must be installed for the rest.

    \b
    Examples:
      lehr doctor
      lehr doctor --json
    """
    from lehr import __version__
    from lehr.runtime import host

    parts: list[dict[str, Any]] = []
    for part, needs in _PARTS.items():
        versions = {name: _version(name) for name, _ in needs}
        missing = sorted({extra for name, extra in needs if versions[name] is None and extra})
        if part == "export" and sys.version_info < (3, 11):
            missing = [*missing, "Python 3.11"]
        install = None if not missing else f"pip install 'lehr[{','.join(m for m in missing if ' ' not in m)}]'"
        parts.append({"part": part, "ready": not missing, "versions": versions, "install": install})
    recipes, gpu = _recipes(), _gpu()
    data = {
        "lehr": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": host.cpu_name(),
        "cores": host.cores(),
        "host": host.host(),
        "gpu": gpu,
        "parts": parts,
        "recipes": recipes,
    }
    rows = [
        (
            entry["part"],
            "ready" if entry["ready"] else "missing",
            ", ".join(f"{name} {version}" for name, version in entry["versions"].items() if version)
            + (f"  ->  {entry['install']}" if entry["install"] else ""),
        )
        for entry in parts
    ]
    prose = (
        f"lehr {data['lehr']}, Python {data['python']}, {data['system']}, {data['cpu']}, {data['cores']} cores\n\n"
        + table(("part", "state", "versions"), rows)
        + f"\n\n{_gpu_prose(gpu)}\n\n"
        + table(
            ("recipe", "on this processor", "libraries"),
            [(r["name"], r["reason"] or "yes", " ".join(r["libraries"])) for r in recipes],
        )
    )
    emit(as_json, data, prose)
