"""Peak memory and start-up of an engine, measured in a process that does nothing else.

Run as ``python -m lehr.ci.footprint BUNDLE ENGINE-FOLDER``: loads the engine, evaluates the first recorded inputs and
prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord, engines
from lehr.runtime.errors import RunFailed
from lehr.runtime.golden import read
from lehr.runtime.hoisted import load_denoiser

MAX_SECONDS = 600.0  # for one process; an engine that takes longer to start has another problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Of one process: largest resident memory in MB (10^6 bytes), and seconds from the bundle to the first output."""

    peak_mb: float
    start_seconds: float


def footprint(bundle: Bundle, record: EngineRecord) -> Footprint:
    """Measure in a new process.

    Raises:
        RunFailed: the process failed, or the system reports no peak memory.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "lehr.ci.footprint", str(bundle.root), record.folder]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=MAX_SECONDS)
    except subprocess.CalledProcessError as e:
        last = (e.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"measuring the memory of {record.folder} failed: {last}") from e
    except subprocess.TimeoutExpired as e:
        raise RunFailed(f"{record.folder} did not start within {MAX_SECONDS:g} s.") from e
    return Footprint(**json.loads(done.stdout))


def _peak_mb() -> float:
    """The kernel's high-water mark of this address space; ``getrusage`` would keep the parent's over exec."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6
    except (OSError, StopIteration) as e:
        raise RunFailed("this system reports no peak memory of a process (VmHWM in /proc/self/status).") from e


def main(root: str, folder: str) -> None:
    """Load, evaluate once, print."""
    started = time.perf_counter()
    bundle = Bundle.open(root)
    record = next(record for record in engines(bundle) if record.folder == folder)
    steps = read(bundle).steps
    denoiser = load_denoiser(bundle, record)
    denoiser(steps.inputs[0], float(steps.timesteps[0]), steps.conditions)
    seconds = time.perf_counter() - started
    sys.stdout.write(json.dumps({"peak_mb": _peak_mb(), "start_seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
