"""Facts about this machine that an engine may depend on, and the process's own memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import resource
from pathlib import Path
from typing import Any

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API
_COMPUTE_CAPABILITY = (75, 76)


def cpu_features() -> tuple[str, ...]:
    """Instruction-set extensions the kernel reports, sorted; empty where it reports none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


def cpu_name() -> str:
    """The processor's model name, or its architecture where the kernel gives no name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def host() -> dict[str, Any]:
    """What must agree between the machine that built a CPU engine and the one that runs it.

    ``isa`` is a digest of the vector extensions: graph layouts are chosen for them.
    """
    vector = [f for f in cpu_features() if f.startswith(("avx", "amx", "sse", "fma", "asimd", "sve", "neon"))]
    digest = hashlib.sha256(" ".join(vector).encode()).hexdigest()[:16]
    return {"os": platform.system().lower(), "arch": platform.machine(), "isa": digest}


def gpu_compute_capability() -> str | None:
    """Of the first NVIDIA GPU, such as "8.9", as its driver says; None without a driver or a GPU."""
    return gpu().get("sm")


def gpu() -> dict[str, Any]:
    """The first NVIDIA GPU as its driver describes it; ``missing`` alone, which says why, where there is none.

    ``name``, ``sm`` (compute capability), ``memory_mb``, ``cuda`` (the newest release that the driver knows) and
    ``driver`` (its own release, "" where the system does not say).
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"missing": "no NVIDIA driver (libcuda.so.1 is not there)"}
    device, release, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name, numbers = ctypes.create_string_buffer(256), (ctypes.c_int(), ctypes.c_int())
    attributes = zip(numbers, _COMPUTE_CAPABILITY, strict=True)
    for what, status in (
        ("the driver does not start", cuda.cuInit(0)),
        ("the driver finds no GPU", cuda.cuDeviceGet(ctypes.byref(device), 0)),
        ("the GPU has no name", cuda.cuDeviceGetName(name, len(name), device)),
        ("the GPU has no memory", cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)),
        ("the driver has no version", cuda.cuDriverGetVersion(ctypes.byref(release))),
        *(
            ("the GPU has no compute capability", cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
            for number, attribute in attributes
        ),
    ):
        if status:
            return {"missing": f"{what} (CUDA error {status})"}
    return {
        "name": name.value.decode(errors="replace"),
        "sm": f"{numbers[0].value}.{numbers[1].value}",
        "memory_mb": round(memory.value / 1e6),
        "cuda": f"{release.value // 1000}.{release.value % 1000 // 10}",
        "driver": _gpu_driver(),
    }


def _gpu_driver() -> str:
    """The release of the NVIDIA driver: of a Jetson's whole system, or of the kernel module."""
    files = [Path(path) for path in ("/etc/nv_tegra_release", "/proc/driver/nvidia/version")]
    lines = [line for path in files if path.is_file() for line in path.read_text(errors="replace").splitlines()[:1]]
    return lines[0].strip("# ") if lines else ""


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes).

    From the kernel's own mark where there is one: ``ru_maxrss`` begins with what the parent process had.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def return_freed_memory() -> None:
    """Ask glibc to give back what was freed; else it keeps most of an engine of many small buffers."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another libc
        return
