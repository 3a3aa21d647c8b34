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
    data = {
        "lehr": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": host.cpu_name(),
        "cores": host.cores(),
        "host": host.host(),
        "parts": parts,
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
    )
    emit(as_json, data, prose)
