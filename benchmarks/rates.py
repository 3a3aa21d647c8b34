"""Parameters that stay in the step graph at the published sizes, and what is handed over to it.

    python benchmarks/rates.py [PRESET ...]     writes benchmarks/results/rates.json

Structure only, so sizes of 12 billion parameters take no memory; each export is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import RESULTS, write

PRESETS = (
    "dit-xl-2",
    "sd3-medium",
    "flux-dev",
    "sdxl-base",
    "pixart-xl-2-1024",
    "sd-1.5",
    "digits-dit",
    "digits-adm",
    "gaussian-dit-b",
    "hunyuan-dit-1.2",
    "ideogram-4",
    "latte",
    "spacetime-dit-xl-2",
    "svd-xt",
    "transfusion-7b",
)


def main() -> None:
    """Measure what is named on the command line, all by default."""
    stored = RESULTS / "rates.json"
    known = {row["preset"]: row for row in json.loads(stored.read_text())["rows"]} if stored.is_file() else {}
    for preset in sys.argv[1:] or PRESETS:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = str(Path(scratch, "m.lehr"))
            lehr = [sys.executable, "-m", "lehr"]
            command = [*lehr, "export", preset, "--structure-only", "-o", bundle, "--json"]
            exported = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            command = [*lehr, "inspect", bundle, "--json"]
            graphs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["graphs"]
        own = {tensor["name"] for tensor in graphs["step"]["inputs"] if tensor["varies"] == "sample"}
        known[preset] = {
            "preset": preset,
            "parameters": exported["parameters"],
            "peak_rss_mb": exported["peak_rss_mb"],
            "step_share": round(graphs["step"]["parameters"] / sum(g["parameters"] for g in graphs.values()), 5),
            "handed_over": len(graphs["step"]["inputs"]) - len(own),
            "graphs": {
                name: {key: graph[key] for key in ("parameters", "nodes", "flops", "cached_bytes")}
                for name, graph in graphs.items()
            },
        }
        print(json.dumps(known[preset]), file=sys.stderr)
    write("rates", {"rows": [known[preset] for preset in PRESETS if preset in known]})


if __name__ == "__main__":
    main()
