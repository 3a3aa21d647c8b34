"""Evidence: what an engine does on the hardware it is for, in one file that travels.

The gate judges it there, a benchmark times it with the power beside it, and where PyTorch is installed eager's own
noise is measured on the same device. The file is bound by hashes to the bundle and the engine, and
``lehr gate --merge`` takes it as it takes the gate's own reports.
"""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from lehr.ci import sensors
from lehr.ci.checks import REPORT_SCHEMA, Report
from lehr.ci.gate import gate
from lehr.ci.policy import Policy
from lehr.engines.bench import compare
from lehr.engines.contestants import contestants, evaluations
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import RunFailed
from lehr.runtime.timing import write_inputs

KIND = "evidence"
_FLOORS = "lehr.export.device_floors"
_FLOOR_SECONDS = 1800.0  # fp16 convolutions are emulated on CPUs

Progress = Callable[[str], None]


class EagerFloors(str, Enum):
    """Whether eager's own noise is measured on the device, too."""

    AUTO = "auto"  # where PyTorch is installed
    NO = "no"


def evidence(
    bundle: Bundle,
    record: EngineRecord,
    policy: Policy,
    *,
    today: dt.date,
    batch: int = 2,
    seconds: float = 5.0,
    floors: EagerFloors = EagerFloors.AUTO,
    progress: Progress = lambda text: None,
) -> tuple[Report, dict[str, Any]]:
    """Judge, time and measure one engine on this machine.

    Args:
        bundle: with golden data.
        record: its engine for this machine.
        policy: what the gate asks.
        today: the day that the evidence bears.
        batch: samples of the evaluations that are timed.
        seconds: of evaluations that are timed.
        floors: whether to measure eager, too.
        progress: takes a line of text now and then.

    Returns:
        The gate's report, and the whole as JSON.

    Raises:
        BundleError: no golden data, damaged files, or an engine of another machine.
        RunFailed: the engine could not be timed.
    """
    progress("judging")
    report = gate(bundle, record, policy)
    measured: dict[str, Any] = {"bench": _bench(bundle, record, batch, seconds, progress), "machine": sensors.machine()}
    measured["eager"] = _eager(bundle, floors, progress)
    return report, {
        "schema": REPORT_SCHEMA,
        "kind": KIND,
        "date": today.isoformat(),
        "gate": report.to_json(),
        "measured": measured,
    }


def _bench(bundle: Bundle, record: EngineRecord, batch: int, seconds: float, progress: Progress) -> dict[str, Any]:
    """One engine's row of ``lehr bench``, and the power while it was measured."""
    steps = bundle.manifest.model.sampling.num_inference_steps
    feeds, recorded = evaluations(bundle, batch)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"inputs-{k}.npz" for k in range(len(feeds))]
        for file, given in zip(files, feeds, strict=True):
            write_inputs(file, given)
        source = sensors.find_source()
        with sensors.Meter(source) as meter:
            (row,) = compare(
                contestants(bundle, [record]),
                files,
                references=recorded,
                loop_steps=steps,
                seconds=seconds,
                progress=progress,
            )
    if row.step_ms is None:
        raise RunFailed(f"{record.folder} could not be timed: {row.reason}")
    power = meter.power
    joules = None if power.watts is None else round(power.watts * row.step_ms / 1000, 6)
    return {
        **{name: value for name, value in row.to_json().items() if name not in ("name", "ratio", "reason")},
        "batch": batch,
        "loop_steps": steps,
        "power": power.to_json(),
        "joules_a_step": joules,
    }


def _eager(bundle: Bundle, floors: EagerFloors, progress: Progress) -> dict[str, Any]:
    """Eager's own noise on this device, by a process that may import PyTorch; or why there is none."""
    if floors is EagerFloors.NO:
        return {"unavailable": "not asked for"}
    if importlib.util.find_spec("torch") is None:
        return {"unavailable": "PyTorch is not installed here"}
    progress("measuring eager's own noise")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", _FLOORS, str(bundle.root)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_FLOOR_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"unavailable": f"eager took longer than {_FLOOR_SECONDS:g} s"}
    if done.returncode:
        return {"unavailable": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
