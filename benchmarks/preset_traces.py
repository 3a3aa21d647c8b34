"""What it costs to trace each preset to ONNX without its weights: time, memory, and the size of the graph.

``python benchmarks/preset_traces.py`` traces every preset in a process of its own on two threads and writes the results
after each, so that a run that was cut short goes on where it stopped; ``python benchmarks/preset_traces.py NAME...``
measures those presets again. Seconds are of the trace alone, in wall time and on the processor (which depends less on
what else runs); memory is the process's peak, libraries included. ``--memory`` leaves the seconds out, for a machine
that does something else besides; a plain run fills them in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from environment import RESULTS, write

from lehr.export.backbones import presets

NAME = "preset_traces"
LIMITS = {"cpu_seconds": 120, "peak_rss_mb": 1200}
TIMES = ("seconds", "cpu_seconds")
_TRACE = """
import json, resource, sys, tempfile, time, torch
from pathlib import Path
from lehr.engines.graph.weights import node_count, parameter_count, save_graph
from lehr.export.backbones import preset
from lehr.export.trace import trace
torch.set_num_threads(2)
chosen = preset(sys.argv[1])
with torch.device("meta"):
    module = chosen.module().eval()
wall, cpu = time.perf_counter(), time.process_time()
graph = trace(module, chosen.spec)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
with tempfile.TemporaryDirectory() as folder:
    save_graph(graph, Path(folder) / "step.onnx")
    size = (Path(folder) / "step.onnx").stat().st_size
print(json.dumps({
    "seconds": round(wall, 1),
    "cpu_seconds": round(cpu, 1),
    "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    "nodes": node_count(graph),
    "parameters": sum(p.numel() for p in module.parameters()),
    "graph_bytes": size,
}))
"""


def traced(name: str) -> dict[str, Any]:
    """One preset, in a fresh process; fails if the trace does."""
    done = subprocess.run([sys.executable, "-c", _TRACE, name], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Trace what has no result yet, or what the command line names."""
    path = RESULTS / f"{NAME}.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["presets"] if path.is_file() else {}
    busy, again = "--memory" in sys.argv[1:], [name for name in sys.argv[1:] if name != "--memory"]
    done = {name for name, row in rows.items() if busy or "seconds" in row}
    for name in again or sorted(set(presets()) - done):
        row = traced(name)
        rows[name] = {key: value for key, value in row.items() if not (busy and key in TIMES)}
        print(name, rows[name], flush=True)
        worst = {key: max(row[key] for row in rows.values() if key in row) for key in LIMITS}
        write(NAME, {"limits": LIMITS, "worst": worst, "presets": dict(sorted(rows.items()))})


if __name__ == "__main__":
    main()
