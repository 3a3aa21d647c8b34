"""What every test shares: how hypothesis searches, and a clean interpreter to try imports in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

SOURCES = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(Path(__file__).parent / "export"))  # tiny_pipelines and stage_toys, for every folder of tests

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


@pytest.fixture(scope="session")
def stage_bundle(dit_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dit_bundle`` with the stages of ``tests/export/stage_toys.py``, built for the CPU; read-only for tests."""
    import stage_toys

    from lehr.engines.stages import build_stage
    from lehr.engines.target import target
    from lehr.export.stages import export_stage
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.golden import Tier
    from lehr.runtime.recipe import recipe

    root = Path(shutil.copytree(dit_bundle, tmp_path_factory.mktemp("stages") / "p.lehr"))
    found = (stage_toys.encoder(), stage_toys.decoder(stage_toys.BEYOND_FP16))
    with Bundle.open(root).edit() as edit:
        entries = [
            export_stage(edit, stage, tier=Tier.STEPS, device="cpu", progress=lambda text: None) for stage in found
        ]
        edit.set_manifest(stages={entry.spec.name: entry for entry in entries})
    for entry in entries:
        build_stage(root, entry.spec.name, target("cpu"), recipe("fp32"), library="onnxruntime", threads=1)
    return root


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline of ``tests/export/tiny_pipelines.py`` by name, written once; read-only for tests."""
    tiny_pipelines = pytest.importorskip("tiny_pipelines", exc_type=ImportError)
    root, made = tmp_path_factory.mktemp("tiny-pipelines"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny_pipelines.make(name, root / name.replace(" ", "-"))
        return made[name]

    return folder
