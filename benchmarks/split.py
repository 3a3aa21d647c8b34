"""What users feel of a cut graph: peak memory and seconds a picture, prompt change included, split against unsplit.

    python benchmarks/split.py [MODEL ...]      writes benchmarks/results/split.json

Each model is exported twice with the same weights (random ones for dit-xl-2), cut by rate and whole, and built in fp32
with ONNX Runtime. A run
is a process of its own that loads the engine and draws two prompts (classes, one after the other, with guidance), so
the change of prompt is in it; the runs of the two variants take turns, and medians are reported. Peak memory is the
process's, and again less that of a process that imports the runtime and loads nothing. The step's own time is measured
apart, alternating single evaluations of both variants in one process with the conditions prepared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import RESULTS, write

from lehr.export.source import shipped_weights

MODELS = {  # preset: steps a picture, runs of each variant
    "digits-dit": (20, 7),
    "digits-adm": (20, 7),
    "dit-xl-2": (20, 2),
}

# An architecture that starts from zero would hold pages of zeros, which Linux keeps once for all.
RANDOM = """
import torch
from lehr.export.backbones import preset

def make():
    chosen = preset({preset!r})
    torch.manual_seed(0)
    module = chosen.module().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound)
    return module, chosen.spec
"""

RUN = """
import json, sys, time
started = time.perf_counter()
from lehr.runtime.pipeline import Pipeline, Request
bundle, steps, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
if prompts:
    pipeline = Pipeline.open(bundle)
    for label in prompts:
        pipeline(Request(num=1, class_labels=[label], num_inference_steps=steps, guidance_scale=2.0, sampler="euler"))
else:
    import onnxruntime
seconds = time.perf_counter() - started
# Not ru_maxrss, which begins with what the parent process had.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, peak / 1024]))
"""

STEP = """
import json, statistics, sys, time
import numpy as np
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.noise import batch_normal
from lehr.runtime.pipeline import open_denoiser
repetitions = int(sys.argv[3])
networks = [open_denoiser(path) for path in sys.argv[1:3]]
spec = networks[0].spec
x = batch_normal(0, range(2), spec.sample_shape(2)[1:])
conditions, t = synthetic_conditions(spec, 2, 0), float(np.float32(spec.path.timestep_of([1.0])[0]))
times = [[], []]
for network in networks:
    network.prepare([t], x.shape[1:], [conditions])
    network(x, t, conditions)
for _ in range(repetitions):
    for k, network in enumerate(networks):
        started = time.perf_counter()
        network(x, t, conditions)
        times[k].append(time.perf_counter() - started)
print(json.dumps([statistics.median(values) for values in times]))
"""


def lehr(*words: str) -> dict[str, Any]:
    """One command and its JSON."""
    done = subprocess.run([sys.executable, "-m", "lehr", *words, "--json"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def script(text: str, *words: str) -> list[float]:
    """What a Python process prints as JSON."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", text, *words], capture_output=True, text=True, check=True, env=environment
    )
    values: list[float] = json.loads(done.stdout)
    return values


def measure(model: str, scratch: Path) -> dict[str, Any]:
    """One model's row."""
    steps, runs = MODELS[model]
    source = model
    if shipped_weights(model) is None:
        (scratch / "model.py").write_text(RANDOM.format(preset=model))
        source = f"{scratch / 'model.py'}:make"
    bundles = {kind: scratch / f"{model}-{kind}.lehr" for kind in ("unsplit", "split")}
    for kind, bundle in bundles.items():
        lehr("export", source, "-o", str(bundle), "--golden", "none", *(["--no-split"] if kind == "unsplit" else []))
        lehr("build", str(bundle), "--target", "cpu", "--library", "onnxruntime")
    graphs = lehr("inspect", str(bundles["split"]))["graphs"]
    total = sum(graph["parameters"] for graph in graphs.values())
    base = min(script(RUN, "", "0", "[]")[1] for _ in range(3))
    seen: dict[str, list[list[float]]] = {kind: [] for kind in bundles}
    for _ in range(runs):
        for kind, bundle in bundles.items():
            seen[kind].append(script(RUN, str(bundle), str(steps), "[1, 2]"))
    seconds = {kind: statistics.median(run[0] for run in runs_) / 2 for kind, runs_ in seen.items()}
    peak = {kind: statistics.median(run[1] for run in runs_) for kind, runs_ in seen.items()}
    step = script(STEP, str(bundles["split"]), str(bundles["unsplit"]), str(3 * runs))
    row = {
        "model": model,
        "parameters": total,
        "hoisted_share": 1 - graphs["step"]["parameters"] / total,
        "steps": steps,
        "seconds_a_picture": seconds,
        "seconds_ratio": seconds["split"] / seconds["unsplit"],
        "peak_mb": peak,
        "engine_peak_mb": {kind: value - base for kind, value in peak.items()},
        "engine_peak_ratio": (peak["split"] - base) / (peak["unsplit"] - base),
        "step_ratio": step[0] / step[1],
        "step_milliseconds": {"split": 1000 * step[0], "unsplit": 1000 * step[1]},
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def main() -> None:
    """Measure what is named on the command line, all by default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    stored = RESULTS / "split.json"
    known = {row["model"]: row for row in json.loads(stored.read_text())["rows"]} if stored.is_file() else {}
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            started = time.monotonic()
            known[model] = measure(model, Path(scratch))
            print(f"{model}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    write("split", {"rows": [known[model] for model in MODELS if model in known]})


if __name__ == "__main__":
    main()
