"""Which GPU engines may be loaded here: the GPU must be one that they were built for, and the library theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lehr.runtime.host import gpu_compute_capability

LIBRARIES = ("tensorrt", "tensorrt_rtx", "onnxruntime-tensorrt")
AMPERE = 8.0  # hardware-compatible engines run from here on
JETSON = ("7.2", "8.7", "11.0")  # and on none of these


def gpu_difference(library: str, options: Mapping[str, Any]) -> str | None:
    """What speaks against the GPU of this machine for an engine built with ``options``; None if nothing does."""
    if library not in LIBRARIES:
        return None
    built: Sequence[str] = options.get("sm", ())
    wanted = f"the engine is for SM {', '.join(built)}"
    here = gpu_compute_capability()
    if here is None:
        return f"there is no NVIDIA GPU with a driver here, and {wanted}"
    if here in built:
        return None
    if options.get("compatible") == "hardware" and float(here) >= AMPERE and here not in JETSON:
        return None
    return f"the GPU here has SM {here}, and {wanted}"


def version_difference(library: str, built: str, here: str, options: Mapping[str, Any]) -> str | None:
    """What speaks against the installed release of an engine library; None if nothing does."""
    if here == built:
        return None
    if library in LIBRARIES and options.get("compatible") == "version":
        if _numbers(built)[:1] == _numbers(here)[:1] and _numbers(built) <= _numbers(here):
            return None
        return f"{library} is {here} here, and the engine loads with {built} and later releases of that major version"
    return f"{library} is {here} here and {built} where it was built"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
