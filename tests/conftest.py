"""What every test shares: how hypothesis searches, and a clean interpreter to try imports in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

SOURCES = Path(__file__).resolve().parents[1] / "src"

# No deadline: machines are shared, and the first call of a kernel compiles or loads it. On a build server the same
# examples every time, so that a red light belongs to the change it stands beside.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("build-server", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("build-server" if os.environ.get("CI") else "here")

RunPython = Callable[..., str]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """A function that runs code in a new interpreter, with ``lehr`` importable, and returns its standard output."""

    def run(code: str, *, path: Path = SOURCES) -> str:
        environment = {**os.environ, "PYTHONPATH": str(path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Engines of tests are kept for this run of the tests, and never in the user's cache."""
    os.environ["LEHR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def dit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``digits-dit`` exported with full golden data and built for the CPU; read-only for tests."""
    from lehr.engines.build import build
    from lehr.engines.target import target
    from lehr.export.package import Options, export
    from lehr.runtime.recipe import recipe

    bundle = tmp_path_factory.mktemp("bundles") / "digits-dit.lehr"
    export("digits-dit", bundle, Options(), progress=lambda text: None)
    build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime")
    return bundle
