"""From the start of a process to the first step of the reference DiT: Lehr's runtime beside PyTorch with diffusers.

    python benchmarks/cold_start.py [--runs 9]

Writes benchmarks/results/cold_start.json. ``lehr`` is a process that opens the bundle, checks it, loads the engine and
evaluates once; ``lehr run`` is the whole command for one step and one sample, to a file. The peer imports torch and
diffusers, loads the same weights from their safetensors file into the same architecture and evaluates once. Runs take
turns; medians. Memory is the process's peak; what the engine's own weights take is the size of its files.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import write

from lehr.engines.bench import Contestant, Process, child_environment
from lehr.engines.contestants import contestants, evaluations, runnable
from lehr.runtime.bundle import Bundle
from lehr.runtime.timing import write_inputs

MODEL = "digits-dit"
PEER = """
import sys
import numpy as np
import torch
import diffusers
from diffusers import DiTTransformer2DModel  # what a pipeline imports
from pathlib import Path
from safetensors.torch import load_file
from lehr.export.backbones import preset
from lehr.export.source import shipped_weights
from lehr.runtime.timing import serve
module = preset("digits-dit").module().eval()
module.load_state_dict(load_file(shipped_weights("digits-dit")))
def evaluate(feeds):
    with torch.inference_mode():
        return module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).numpy()
serve(evaluate, Path(sys.argv[1]), base_mb=0.0)
"""


def lehr(*words: str) -> None:
    """Run a verb."""
    subprocess.run([sys.executable, "-m", "lehr", *words], check=True, capture_output=True, env=child_environment())


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "d.lehr"
        lehr("export", MODEL, "-o", str(root), "--golden", "steps")
        lehr("build", str(root), "--target", "cpu", "--library", "onnxruntime")
        bundle = Bundle.open(root)
        inputs = Path(scratch) / "inputs.npz"
        write_inputs(inputs, evaluations(bundle, 1)[0][0])
        ours = contestants(bundle, runnable(bundle, "cpu", ()))[0]
        peer = Contestant(name="torch + diffusers", command=(sys.executable, "-c", PEER))
        starts: dict[str, list[float]] = {"lehr": [], "torch + diffusers": [], "lehr run": []}
        peaks: dict[str, list[float]] = {"lehr": [], "torch + diffusers": []}
        for _ in range(given.runs):
            for name, contestant in (("lehr", ours), ("torch + diffusers", peer)):
                process = Process(contestant, inputs)
                starts[name].append(process.start_s)
                peaks[name].append(process.started["peak_mb"])
                process.close()
            begun = time.perf_counter()
            lehr("run", str(root), "--steps", "1", "--num", "1", "-o", str(Path(scratch) / "x.npz"))
            starts["lehr run"].append(time.perf_counter() - begun)
        size = (ours.size or 0) / 1e6
    seconds = {name: statistics.median(values) for name, values in starts.items()}
    memory = {name: statistics.median(values) for name, values in peaks.items()}
    results = {
        "model": MODEL,
        "runs": given.runs,
        "seconds": seconds,
        "peak_mb": memory,
        "engine_files_mb": size,
        "lehr_over_engine_mb": memory["lehr"] - size,
        "lehr_ratio": seconds["lehr"] / seconds["torch + diffusers"],
        "lehr_run_ratio": seconds["lehr run"] / seconds["torch + diffusers"],
    }
    print(write("cold_start", results).read_text())


if __name__ == "__main__":
    main()
