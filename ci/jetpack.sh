#!/usr/bin/env bash
# Resolves the device part (the base dependencies and the cpu extra) for JetPack 6: Python 3.10, aarch64, glibc 2.35.
#
#   bash ci/jetpack.sh               needs .venv with the dev extra; installs nothing, downloads metadata and wheels
#
# pip picks wheels for another machine but reads markers (python_version < '3.11', platform_machine…) for its own, so
# the markers' environment is replaced too. Exit code: 0 resolved, 1 not, with pip's reason on stderr.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$root/.venv/bin/python" - "$root" "$scratch" <<'PYTHON'
import json
import sys
from pathlib import Path

from pip._internal.cli.main import main
from pip._vendor.packaging import markers
from pip._vendor.packaging.specifiers import SpecifierSet

root, scratch = sys.argv[1], Path(sys.argv[2])
device = {
    "python_version": "3.10",
    "python_full_version": "3.10.12",
    "implementation_version": "3.10.12",
    "platform_machine": "aarch64",
}
own = markers.default_environment
markers.default_environment = lambda: {**own(), **device}
if not markers.Marker("python_version == '3.10' and platform_machine == 'aarch64'").evaluate():
    sys.exit("jetpack: this pip reads markers in a way that this script does not know")

tags = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(35, 16, -1)] + ["--platform=manylinux2014_aarch64"]
report = scratch / "report.json"
code = main(
    [
        "install", "--dry-run", "--quiet", "--ignore-installed", "--no-build-isolation", "--disable-pip-version-check",
        "--only-binary=:all:", "--python-version=3.10", "--implementation=cp", "--abi=cp310", "--abi=abi3", "--abi=none",
        *tags, f"--target={scratch / 'target'}", f"--report={report}", f"{root}[cpu]",
    ]
)  # fmt: skip
if code:
    sys.exit("jetpack: the device part does not resolve for Python 3.10 on aarch64")
found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
for item in found:  # pip holds a local folder's requires-python against the Python that runs pip
    if device["python_full_version"] not in SpecifierSet(item.get("requires_python", "")):
        sys.exit(f"jetpack: {item['name']} {item['version']} asks for Python {item['requires_python']}, JetPack 6 has 3.10")
versions = {item["name"].lower(): item["version"] for item in found}
absent = {"lehr", "numpy", "onnxruntime", "tomli"} - set(versions)
if absent:
    sys.exit(f"jetpack: expected {sorted(absent)} among what resolves for Python 3.10, got {versions}")
print("jetpack: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())), file=sys.stderr)
PYTHON
