"""The layers, held two ways: what modules import, read by import-linter, and what importing them costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("export", "calibration", "engines", "runtime", "runtime/backends", "ci", "commands")

MAX_CPU_SECONDS = 0.25  # of importing the runtime, over bare numpy
MAX_MEGABYTES = 60

HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt", "diffusers", "transformers"}

# Defines `modules`: every module of the runtime but the backends, each of which needs its engine library.
LIST_MODULES = """
import importlib, json, pkgutil, sys
import lehr.runtime
modules = sorted(
    module.name
    for module in pkgutil.walk_packages(lehr.runtime.__path__, "lehr.runtime.")
    if not module.name.startswith("lehr.runtime.backends.")
)
"""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Hold the package ``lehr`` in ``folder`` against the contracts of pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"]
    options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    return subprocess.run(
        [*command, *options],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def name_plate(folder: Path, offender: str, line: str) -> None:
    """Write an empty package of Lehr's shape in which only module ``offender`` imports something."""
    package = folder / "lehr"
    for stage in ("", *STAGES):
        (package / stage).mkdir(parents=True, exist_ok=True)
        (package / stage / "__init__.py").touch()
    for module in ("cli", "__main__"):
        (package / f"{module}.py").touch()
    path = package / f"{offender}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{line}\n")


# ------------------------------------------------------------------------------------------ what modules import


def test_every_layer_imports_only_what_stands_to_its_right() -> None:
    done = lint(ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("offender", "line"),
    [
        ("runtime/loop", "import numpy"),
        ("runtime/backends/onnxruntime", "import onnxruntime"),
        ("engines/build", "import onnx_ir, lehr.runtime.loop"),
        ("export/trace", "import torch, onnx, lehr.calibration, lehr.engines, lehr.runtime"),
        ("ci/gate", "import lehr.engines, lehr.runtime"),
        ("commands/export", "import lehr.export, lehr.ci, lehr.cli"),
    ],
)
def test_an_import_to_the_right_is_allowed(tmp_path: Path, offender: str, line: str) -> None:
    name_plate(tmp_path, offender, line)
    done = lint(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("offender", "line", "broken"),
    [
        ("runtime/loop", "import lehr.engines", "command line > export > calibration > engines > runtime"),
        ("engines/build", "import lehr.calibration", "command line > export > calibration > engines > runtime"),
        ("calibration/search", "import lehr.export", "command line > export > calibration > engines > runtime"),
        ("export/trace", "import lehr.commands", "command line > export > calibration > engines > runtime"),
        ("novelty/__init__", "", "command line > export > calibration > engines > runtime"),
        ("engines/build", "import lehr.ci", "command line > ci > engines > runtime"),
        ("ci/gate", "import lehr.cli", "command line > ci > engines > runtime"),
        ("ci/gate", "import lehr.calibration", "the gate does not know export and calibration"),
        ("export/golden", "import lehr.ci", "export and calibration do not know the gate"),
        ("calibration/search", "import torch", "torch, diffusers and transformers live in export"),
        ("runtime/loop", "def f():\n    import diffusers", "torch, diffusers and transformers live in export"),
        ("commands/run", "import torch", "the command line imports no framework itself"),
        ("runtime/bundle", "import onnx", "the runtime is numpy and an engine library"),
        ("runtime/pipeline", "import PIL.Image", "the runtime is numpy and an engine library"),
        ("runtime/pipeline", "import onnxruntime", "engine libraries are imported by their backend"),
        ("ci/gate", "import onnx_ir", "the gate reads bundles and engines, not graphs"),
    ],
)
def test_an_import_to_the_left_breaks_its_contract(tmp_path: Path, offender: str, line: str, broken: str) -> None:
    name_plate(tmp_path, offender, line)
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{broken} BROKEN" in done.stdout


# ------------------------------------------------------------------------------------------ what importing costs


def test_importing_the_runtime_stays_within_its_budget(run_python: Callable[..., str]) -> None:
    code = f"""
import importlib, json, pkgutil, resource, sys
import numpy

def cost():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(open("/proc/self/statm").read().split()[1])
    return usage.ru_utime + usage.ru_stime, pages * resource.getpagesize() / 1e6

seconds, megabytes = cost()
{LIST_MODULES}
for module in modules:
    importlib.import_module(module)
after = cost()
print(json.dumps([after[0] - seconds, after[1] - megabytes, len(modules)]))
"""
    # CPU time and the best of five: the budget is the product's, the load on this machine is not.
    runs = [json.loads(run_python(code)) for _ in range(5)]
    assert min(run[2] for run in runs) > 1, "the runtime's modules were not found"
    assert min(run[0] for run in runs) <= MAX_CPU_SECONDS, f"CPU seconds, megabytes, modules of each run: {runs}"
    assert min(run[1] for run in runs) <= MAX_MEGABYTES, f"CPU seconds, megabytes, modules of each run: {runs}"


def test_importing_the_runtime_loads_no_framework(run_python: Callable[..., str]) -> None:
    loaded = run_python(LIST_MODULES + "print(json.dumps([name.split('.')[0] for name in sys.modules]))")
    assert not set(json.loads(loaded)) & (HEAVY | {"PIL", "scipy", "click", "rich"})


def test_help_loads_no_framework(run_python: Callable[..., str]) -> None:
    code = """
import json, runpy, sys
sys.argv = ["lehr", "--help"]
try:
    runpy.run_module("lehr", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps([name.split('.')[0] for name in sys.modules]))
"""
    *text, loaded = run_python(code).splitlines()
    assert any("Usage" in line for line in text)
    assert not set(json.loads(loaded)) & (HEAVY | {"PIL", "scipy"})


def test_the_runtime_imports_where_no_engine_library_is_installed(run_python: Callable[..., str]) -> None:
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(HEAVY | {"tensorrt_rtx", "PIL", "safetensors"})}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{LIST_MODULES}
for module in modules:
    importlib.import_module(module)
print(len(modules))
"""
    assert int(run_python(code)) > 1
