"""What stands beside every published number: the command, the machine and the versions."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lehr import __version__
from lehr.runtime import host

RESULTS = Path(__file__).parent / "results"
_DISTRIBUTIONS = ("torch", "diffusers", "onnx", "onnxruntime", "numpy")


def environment() -> dict[str, Any]:
    """The machine and the libraries that matter."""
    installed = {found.metadata["Name"].lower(): found.version for found in metadata.distributions()}
    versions = {name: installed[name] for name in _DISTRIBUTIONS if name in installed}
    return {
        "cpu": host.cpu_name(),
        "cores": host.cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "lehr": __version__,
        "versions": versions,
    }


def write(name: str, results: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json``, with the command line that is running."""
    script = Path(sys.argv[0]).name
    data = {"command": f"python benchmarks/{script}", "environment": environment(), **results}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path
