"""How much memory a TensorRT build will take, worked out beforehand.

Measured with TensorRT-RTX 1.7.1, one process a build, chains of products and of convolutions with 2 to 537 MB of
weights in fp16 and fp32, for one target and for three: the peak is 205 MB and 3.0 times the weights within 2 % (537 MB
of weights take 1,821 MB, 118 MB of them 556 MB). TensorRT proper times kernels on the GPU and takes more by what its
own kernels occupy; nothing has been measured there, so for it a forecast is a lower bound.
"""

from __future__ import annotations

from pathlib import Path

from lehr.engines.settings import StoredWeights
from lehr.runtime.errors import BuildFailed

BASE_MB = 210.0
TIMES_WEIGHTS = 3.05
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def forecast_mb(graph: Path, stored: StoredWeights | None = None) -> float:
    """Peak memory of a build from ``graph``, whose weights are ``stored`` or in files beside it of its own."""
    if stored is not None and stored.path.parent == graph.parent:
        weights = stored.bytes
    else:
        weights = sum(f.stat().st_size for f in graph.parent.iterdir() if f.is_file() and f.suffix != ".onnx")
    return round(BASE_MB + TIMES_WEIGHTS * (weights + graph.stat().st_size) / 1e6, 1)


def memory_mb() -> tuple[float, float]:
    """Memory that a process may have here: in all, and now without swapping; infinite where nothing says so."""
    fields: dict[str, float] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith("kB"):
                fields[name] = int(value.split()[0]) * 1024 / 1e6
    except OSError:
        pass
    total = fields.get("MemTotal", float("inf"))
    for file in _CGROUP_LIMITS:
        try:
            given = file.read_text().strip()
        except OSError:
            continue
        if given.isdigit():
            total = min(total, int(given) / 1e6)
    return total, min(total, fields.get("MemAvailable", float("inf")))


def check(needed_mb: float, what: str) -> str:
    """Raise BuildFailed where the machine has not the memory at all; a warning where it is not free now, else ""."""
    total, free = memory_mb()
    if needed_mb > total:
        raise BuildFailed(
            f"{what} would take about {needed_mb:.0f} MB of memory to build and this machine has {total:.0f} MB. "
            "Build it on a larger machine, or in a recipe with narrower weights."
        )
    if needed_mb > free:
        return f"{what}: about {needed_mb:.0f} MB of memory will be needed and {free:.0f} MB are free"
    return ""
