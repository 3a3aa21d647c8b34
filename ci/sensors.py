"""Power, clocks and temperatures of this machine while something runs, from whatever tells them without extra packages.

Jetson boards have ``tegrastats`` (a line every interval) and ``nvpmodel`` (the power mode); other NVIDIA GPUs have
NVML, a C library that comes with the driver and is called through ctypes. Where there is neither, nothing is claimed.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

INTERVAL = 0.1  # seconds between two readings
_PATIENCE = 10.0  # seconds for a tool that should answer at once

_RAIL = re.compile(r"\b(V[A-Z0-9_]+|POM_[A-Z0-9_]+) (\d+)(?:mW)?/\d+(?:mW)?")
_CLOCK = re.compile(r"\b(GR3D_FREQ|EMC_FREQ) \d+%@\[?(\d+)")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_HEAT = re.compile(r"\b([A-Za-z0-9_]+)@(-?\d+(?:\.\d+)?)C")
_WHOLE = "VDD_IN"  # the input of a module that has such a rail; others are the sum of theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One moment.

    Attributes:
        watts: of the whole, as far as it is measured; None where nothing is.
        rails: watts by supply.
        clocks_mhz: by unit.
        celsius: the hottest sensor.
    """

    watts: float | None
    rails: dict[str, float] = field(default_factory=dict)
    clocks_mhz: dict[str, float] = field(default_factory=dict)
    celsius: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What was read while something ran.

    Attributes:
        source: "tegrastats", "nvml" or "none".
        seconds, samples: how long, and how many readings.
        watts, peak_watts: mean and largest; None where they are not measured.
        rails, clocks_mhz: means by name.
        celsius: the hottest of all.
        reason: why there is nothing, where there is nothing.
    """

    source: str
    seconds: float = 0.0
    samples: int = 0
    watts: float | None = None
    peak_watts: float | None = None
    rails: dict[str, float] = field(default_factory=dict)
    clocks_mhz: dict[str, float] = field(default_factory=dict)
    celsius: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Source(Protocol):
    """Where readings come from."""

    name: str

    def start(self, take: Callable[[Reading], None]) -> None: ...

    def stop(self) -> None: ...


# ------------------------------------------------------------------------------------------------------ tegrastats


def parse_tegrastats(line: str) -> Reading:
    """One line; its format differs between boards and releases, so what is not found is left out."""
    rails = {name: int(milliwatts) / 1000 for name, milliwatts in _RAIL.findall(line)}
    clocks = {name.removesuffix("_FREQ").lower(): float(mhz) for name, mhz in _CLOCK.findall(line)}
    if cores := _CPU.search(line):
        running = [float(core.partition("@")[2]) for core in cores[1].split(",") if "@" in core]
        if running:
            clocks["cpu"] = max(running)
    heat = [float(celsius) for _, celsius in _HEAT.findall(line) if float(celsius) > -100]  # -256 means switched off
    watts = rails.get(_WHOLE, sum(rails.values()) if rails else None)
    return Reading(watts=watts, rails=rails, clocks_mhz=clocks, celsius=max(heat, default=None))


class Tegrastats:
    """Readings of a Jetson board."""

    name = "tegrastats"

    def __init__(self, command: str) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def start(self, take: Callable[[Reading], None]) -> None:
        process = subprocess.Popen(
            [self._command, "--interval", str(int(1000 * INTERVAL))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

        def read() -> None:
            for line in process.stdout or ():
                take(parse_tegrastats(line))

        self._process, self._thread = process, threading.Thread(target=read, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._process is None or self._thread is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(_PATIENCE)
        if self._process.stdout is not None:
            self._process.stdout.close()


def power_mode() -> str | None:
    """The power mode of a Jetson board, such as "MAXN"; None elsewhere."""
    command = shutil.which("nvpmodel")
    if command is None:
        return None
    try:
        done = subprocess.run([command, "-q"], capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode\s*:\s*(\S+)", done.stdout)
    return found[1] if found else None


# ------------------------------------------------------------------------------------------------------------ NVML

# nvml.h: clock domains, and the sensor of the die.
_CLOCKS = {"graphics": 0, "sm": 1, "memory": 2}
_GPU_SENSOR = 0
_NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


class Nvml:
    """Readings of the first NVIDIA GPU; ``library`` is libnvidia-ml, opened."""

    name = "nvml"

    def __init__(self, library: Any) -> None:
        self._nvml, self._device = library, ctypes.c_void_p()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> bool:
        """Whether there is a GPU to ask."""
        if self._nvml.nvmlInit_v2():
            return False
        return not self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device))

    def facts(self) -> dict[str, str]:
        """The GPU's name and its driver's version."""
        found = {}
        name, driver = (ctypes.create_string_buffer(_NAME_BYTES) for _ in range(2))
        if not self._nvml.nvmlDeviceGetName(self._device, name, _NAME_BYTES):
            found["gpu"] = name.value.decode("utf-8", "replace")
        if not self._nvml.nvmlSystemGetDriverVersion(driver, _NAME_BYTES):
            found["driver"] = driver.value.decode("utf-8", "replace")
        limit = self._number("nvmlDeviceGetEnforcedPowerLimit")
        if limit is not None:
            found["power_limit_w"] = f"{limit / 1000:g}"
        return found

    def read(self) -> Reading:
        """One moment; what the GPU does not tell is left out."""
        milliwatts = self._number("nvmlDeviceGetPowerUsage")
        clocks = {name: self._number("nvmlDeviceGetClockInfo", domain) for name, domain in _CLOCKS.items()}
        return Reading(
            watts=None if milliwatts is None else milliwatts / 1000,
            clocks_mhz={name: float(mhz) for name, mhz in clocks.items() if mhz is not None},
            celsius=self._number("nvmlDeviceGetTemperature", _GPU_SENSOR),
        )

    def _number(self, function: str, *arguments: int) -> int | None:
        value = ctypes.c_uint()
        if getattr(self._nvml, function)(self._device, *arguments, ctypes.byref(value)):
            return None
        return value.value

    def start(self, take: Callable[[Reading], None]) -> None:
        def read() -> None:
            while not self._done.wait(INTERVAL):
                take(self.read())

        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)


def open_nvml() -> Nvml | None:
    """NVML with a GPU to ask; None without a driver or a GPU."""
    try:
        made = Nvml(ctypes.CDLL("libnvidia-ml.so.1"))
    except OSError:
        return None
    return made if made.open() else None


# ------------------------------------------------------------------------------------------------------- measuring


def find_source() -> Source | None:
    """What tells the power here; Jetson's own tool first, because NVML there knows little."""
    command = shutil.which("tegrastats")
    return Tegrastats(command) if command else open_nvml()


class Meter:
    """Reads while its ``with`` block runs: ``with Meter(find_source()) as meter: …; meter.power``."""

    def __init__(self, source: Source | None) -> None:
        self._source = source
        self._readings: list[Reading] = []
        self._began = self._ended = 0.0

    def __enter__(self) -> Meter:  # noqa: PYI034  # typing has no Self in Python 3.10
        self._began = time.monotonic()
        if self._source is not None:
            self._source.start(self._readings.append)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = time.monotonic()
        if self._source is not None:
            self._source.stop()

    @property
    def power(self) -> Power:
        """What was read; after the block."""
        if self._source is None:
            return Power(source="none", reason="neither tegrastats nor an NVIDIA driver is here")
        seconds = round(self._ended - self._began, 3)
        if not self._readings:
            return Power(source=self._source.name, seconds=seconds, reason="it told nothing while the engine ran")
        watts = [reading.watts for reading in self._readings if reading.watts is not None]
        heat = [reading.celsius for reading in self._readings if reading.celsius is not None]
        return Power(
            source=self._source.name,
            seconds=seconds,
            samples=len(self._readings),
            watts=_mean(watts),
            peak_watts=max(watts, default=None),
            rails=_means([reading.rails for reading in self._readings]),
            clocks_mhz=_means([reading.clocks_mhz for reading in self._readings]),
            celsius=max(heat, default=None),
        )


def machine() -> dict[str, str]:
    """What the board and its software call themselves: model, release, power mode, GPU, driver, governor."""
    found = {}
    for key, file in (
        ("board", "/proc/device-tree/model"),
        ("l4t", "/etc/nv_tegra_release"),
        ("governor", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    ):
        try:
            text = Path(file).read_bytes()[:200].decode("utf-8", "replace").strip("\0 \n#")
        except OSError:
            continue
        found[key] = text.splitlines()[0] if text else ""
    if mode := power_mode():
        found["power_mode"] = mode
    nvml = open_nvml()
    return {**found, **(nvml.facts() if nvml is not None else {})}


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: round(sum(values) / len(values), 3) for name, values in found.items()}
