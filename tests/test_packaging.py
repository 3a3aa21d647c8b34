"""The wheel and the source archive: what the links in src/lehr lead to must be in them, as files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import lehr

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("export", "calibration", "engines", "runtime", "ci")
METADATA = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
DATA = (
    "export/reference/emoji/*.json",
    "export/reference/weights/*.safetensors",
    "export/reference/weights/*.json",
    "export/reference/weights/*.txt",
    "export/backbones/*.json",
    "engines/targets/*.toml",
    "runtime/kernels/*",
    "ci/features/*.onnx",
    "ci/policies/*.toml",
    "ci/workflows/*/*.yml",
    "py.typed",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Both archives, and the package in the tree they were built from."""

    source: Path
    wheel: Path
    package: Path


def python(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def pip(*arguments: str, cwd: Path) -> None:
    python("-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source archive of a copy of this tree, and the wheel made from that archive alone."""
    folder = tmp_path_factory.mktemp("packaging")
    tree, out = folder / "tree", folder / "out"
    tree.mkdir()
    for name in METADATA:
        shutil.copy(ROOT / name, tree)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*STAGES, "src", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skipped)
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=tree)
    (source,) = out.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(source), cwd=folder)
    (wheel,) = out.glob("*.whl")
    return Built(source=source, wheel=wheel, package=tree / "src" / "lehr")


def expected_files(package: Path) -> dict[str, bytes]:
    """Every module and data file by its path inside the package."""
    modules = [path.relative_to(package) for path in package.glob("*.py")]
    for folder in (*STAGES, "commands"):
        modules += [path.relative_to(package) for path in (package / folder).glob("**/*.py")]
    data = [path.relative_to(package) for pattern in DATA for path in package.glob(pattern)]
    return {path.as_posix(): (package / path).read_bytes() for path in (*modules, *data)}


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(built: Built) -> None:
    expected = expected_files(built.package)
    assert {"__init__.py", "py.typed", "runtime/spec.py", "export/backbones/dit.py"} <= set(expected)
    with zipfile.ZipFile(built.wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert sorted(found) == sorted(f"lehr/{name}" for name in expected)
    assert all(found[f"lehr/{name}"] == content for name, content in expected.items())


def test_the_source_archive_holds_files_where_the_tree_has_links(built: Built) -> None:
    top = built.source.name.removesuffix(".tar.gz")
    with tarfile.open(built.source) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    files = {member.name for member in members if member.isfile()}
    assert {f"{top}/src/lehr/{name}" for name in expected_files(built.package)} <= files
    assert {f"{top}/{name}" for name in METADATA} <= files
    assert not [name for name in files if name.startswith((f"{top}/tests/", f"{top}/benchmarks/"))]


def test_the_wheel_installs_and_imports_without_the_tree(
    built: Built, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    pip("install", "--no-deps", "--no-index", "--target", str(tmp_path), str(built.wheel), cwd=tmp_path)
    code = """
import importlib.metadata
import lehr, lehr.runtime, lehr.runtime.spec
print(lehr.runtime.spec.__file__)
print(importlib.metadata.version("lehr"))
points = importlib.metadata.distribution("lehr").entry_points
print([point.value for point in points if point.group == "console_scripts"])
"""
    file, version, points = run_python(code, path=tmp_path).splitlines()
    assert Path(file) == tmp_path / "lehr" / "runtime" / "spec.py"
    assert version == lehr.__version__
    assert points == "['lehr.cli:main']"
