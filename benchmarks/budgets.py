"""The fastest engine within a fidelity budget, Lehr's and everybody else's, on one CPU in one run.

    python benchmarks/budgets.py [MODEL ...] [--nncf-python PYTHON] [--recipes fp32,bf16,...]
                                 [--keep FOLDER [--prepare]]

Writes benchmarks/results/budgets.json and docs/budgets.png. A budget is the least SQNR that one evaluation may have
against eager PyTorch in fp32, the worst of six timesteps, at batch 2. Trained models are evaluated at six places of a
loop of 20 steps, those with random weights on unit noise: their own loops end nowhere. Engines take turns, each in a
process of its own (``lehr.engines.bench``); every Lehr engine is what ``lehr build --library auto`` keeps for a recipe,
after ``lehr calibrate`` where the recipe asks for it ("int8-sq+bf16": what is not int8 computes in bf16; "sqnr>=41":
the cheapest mixture that keeps a loss along the model's own loops). Lehr and the peers calibrate on the same inputs, of
other seeds. Peers start from plain ``torch.onnx.export``; NNCF needs a Python that has it. Models are those of
benchmarks/hoisted_precision.py. What a peer cannot do is recorded with its reason.
``--keep`` holds what was exported, calibrated and quantised for a later run; ``--prepare`` ends there, so that only
builds and measurements need a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from environment import RESULTS, write
from hoisted_precision import BATCH, MODELS, feeds_of, made

from lehr.engines.bench import Contestant, child_environment, compare
from lehr.engines.contestants import contestants, peers, runnable
from lehr.export.eager import eager
from lehr.export.source import shipped_weights
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import calibrated_names
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.noise import batch_normal
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.timing import write_inputs

NAME = "budgets"
PICTURE = Path(__file__).parents[1] / "docs" / "budgets.png"
BUDGETS = (30.0, 36.0, 40.0)
TIMESTEPS, CALIBRATION = 6, 8
STEPS = 20  # of the loops that trained models are evaluated in
LOOPS = 5  # that a trained model is calibrated along, in eight evaluations each
HERE = Path(__file__).parent
FACTORY = """
import sys
sys.path.insert(0, {here!r})
from budgets import model_of

def make():
    return model_of({name!r})
"""


def model_of(name: str) -> tuple[Any, Any]:
    """A module and its spec, at the sizes it is measured at."""
    module, spec, sizes = made(name)
    dims = tuple(replace(dim, default=sizes.get(dim.name, dim.default)) for dim in spec.dims)
    return module, replace(spec, dims=dims)


def evaluations(name: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Inputs of single evaluations, evenly spaced over the timesteps: the middle one first."""
    module, spec, sizes = made(name)
    order = sorted(range(count), key=lambda k: abs(k - count // 2))
    if shipped_weights(name) is not None:
        along = loop_inputs(eager(module, spec), seed)
        places = np.linspace(0, len(along), count + 2)[1:-1].astype(int)
        return [along[place] for place in places[order]]
    feeds = feeds_of(spec, sizes)
    low, high = sorted((spec.path.first_timestep, spec.path.last_timestep))
    timesteps = np.linspace(low, high, count + 2)[1:-1]
    shape, kind = feeds[spec.sample.name].shape, spec.timestep.dtype.numpy
    return [
        {
            **feeds,
            spec.sample.name: batch_normal(seed + k, range(BATCH), shape[1:]),
            spec.timestep.name: np.full(BATCH, timesteps[k], kind),
        }
        for k in order
    ]


def loop_inputs(denoiser: Denoiser, seed: int) -> list[dict[str, Any]]:
    """What a model is fed along a loop of its sampler, for :data:`BATCH` samples without guidance."""
    taken: list[dict[str, Any]] = []

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        taken.append({key: np.array(value) for key, value in feeds.items()})
        spec = denoiser.spec
        conditions = {tensor.name: feeds[tensor.name] for tensor in spec.conditions}
        output = denoiser.with_variance(feeds[spec.sample.name], float(feeds[spec.timestep.name][0]), conditions)
        return {spec.outputs[0].name: output}

    request = Request(num=BATCH, batch=BATCH, num_inference_steps=STEPS, guidance_scale=1.0, seed=seed)
    Pipeline(Denoiser(denoiser.spec, run))(request)
    return taken


def lehr(*words: str) -> str | None:
    """Run a verb; None if it did what it was asked, else what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "lehr", *words], capture_output=True, text=True, check=False, env=child_environment()
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def calibrated(name: str, recipes: list[str], data: Path, scratch: Path) -> dict[str, str]:
    """Export a model to ``scratch/model.lehr`` and calibrate what is not calibrated there; why some recipes are not."""
    source, bundle = source_of(name, scratch), scratch / "model.lehr"
    problem = None if bundle.is_dir() else lehr("export", source, "-o", str(bundle), "--golden", "none")
    if problem:
        raise RuntimeError(f"export of {name} failed: {problem}")
    failed: dict[str, str] = {}
    for recipe in recipes:
        base, _, rest = recipe.partition("+")
        if base in ("fp32", "bf16", "bf16-matmul") or stored(recipe) in calibrated_names(Bundle.open(bundle)):
            continue
        started = time.monotonic()
        asked = ["--budget", base] if ">=" in base else ["--recipe", base]
        words = [*asked, "--name", stored(recipe), "--data", str(data), *(["--rest", rest] if rest else [])]
        problem = lehr("calibrate", str(bundle), *words)
        if problem:
            failed[recipe] = problem
        print(f"{name} {recipe}: {problem or 'calibrated'} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    return failed


def stored(recipe: str) -> str:
    """What a recipe is called in a bundle."""
    return recipe.replace("+", "-").replace(">=", "-")


def source_of(name: str, scratch: Path) -> str:
    """What ``lehr export`` takes for a model; a factory is written to ``scratch`` where it has no shipped weights."""
    if shipped_weights(name) is not None:
        return name
    factory = scratch / "model.py"
    factory.write_text(FACTORY.format(here=str(HERE), name=name))
    return f"{factory}:make"


def our_engines(name: str, recipes: list[str], scratch: Path) -> tuple[list[Contestant], dict[str, str]]:
    """Lehr's engines of a model, and why some recipes have none."""
    bundle, failed = scratch / "model.lehr", {}
    for recipe in recipes:
        started = time.monotonic()
        words = ["--target", "cpu", "--recipe", stored(recipe), "--library", "auto"]
        problem = lehr("build", str(bundle), *words)
        if problem:
            failed[recipe] = problem
        print(f"{name} {recipe}: {problem or 'built'} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    opened = Bundle.open(bundle)
    return contestants(opened, runnable(opened, "cpu", ())), failed


def quantised(
    graph: Path, calibration: list[Path], scratch: Path, nncf: str | None
) -> tuple[list[Contestant], dict[str, str]]:
    """Peers' quantised engines, and why some tools made none."""
    tools = {
        "onnxruntime dynamic int8": ("ort-dynamic", sys.executable, "onnxruntime", "dynamic.onnx"),
        "onnxruntime static int8": ("ort-static", sys.executable, "onnxruntime", "static.onnx"),
        "onnxruntime weight-only int8": ("ort-weight-only", sys.executable, "onnxruntime", "weights.onnx"),
        "openvino + NNCF int8, rest f32": ("nncf", nncf, "openvino-f32", "nncf.xml"),
        "openvino + NNCF int8, rest bf16": ("nncf", nncf, "openvino", "nncf.xml"),
    }
    ready, failed = [], {}
    for title, (tool, python, library, file) in tools.items():
        if python is None:
            failed[title] = "NNCF was not given (--nncf-python)"
            continue
        output = scratch / file
        if not output.is_file():
            words = [python, str(HERE / "quantised_peers.py"), tool, str(graph), str(output), *map(str, calibration)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                failed[title] = (done.stderr.strip().splitlines() or ["no message"])[-1]
                continue
        command = (sys.executable, "-m", "lehr.engines.peers", library, str(output))
        ready.append(Contestant(name=title, command=command))
    return ready, failed


def measure(
    name: str, recipes: list[str], nncf: str | None, seconds: float, scratch: Path, *, prepare: bool
) -> dict[str, Any] | None:
    """One model's engines and what each budget buys; None if it is only to be prepared."""
    files = []
    loops = LOOPS if shipped_weights(name) is not None else 1
    for kind, seeds, count in (("held-out", [100], TIMESTEPS), ("calibration", range(500, 500 + loops), CALIBRATION)):
        (scratch / kind).mkdir(exist_ok=True)
        for k, feeds in enumerate(each for seed in seeds for each in evaluations(name, seed, count)):
            files.append(scratch / kind / f"{k}.npz")
            write_inputs(files[-1], feeds)
    inputs, calibration = files[:TIMESTEPS], files[TIMESTEPS:]
    failed = calibrated(name, recipes, scratch / "calibration", scratch)
    others = peers(source_of(name, scratch), inputs[0], scratch)
    made_by_tools, theirs = quantised(scratch / "peer.onnx", calibration, scratch, nncf)
    if prepare:
        return None
    ours, unbuilt = our_engines(name, [recipe for recipe in recipes if recipe not in failed], scratch)
    rows = compare(
        [*others, *made_by_tools, *ours],
        inputs,
        seconds=seconds,
        progress=lambda text: print(f"{name}: {text}", file=sys.stderr),
    )
    reasons = theirs | {f"lehr {recipe}": why for recipe, why in (failed | unbuilt).items()}
    table = [row.to_json() for row in rows] + [{"name": key, "reason": why} for key, why in reasons.items()]
    return {"model": name, "rows": table, "budgets": [bought(table, budget) for budget in BUDGETS]}


def bought(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """The fastest engine of each side within a budget, by the median of its paired ratios to eager PyTorch."""
    within = [row for row in rows if row.get("step_ms") and row["sqnr_db"] >= budget]
    best = {
        side: min(
            (row for row in within if row["name"].startswith("lehr ") is mine), key=lambda r: r["ratio"], default=None
        )
        for side, mine in (("lehr", True), ("peer", False))
    }
    ours, theirs = best["lehr"], best["peer"]
    return {
        "budget_db": budget,
        "lehr": None if ours is None else ours["name"],
        "peer": None if theirs is None else theirs["name"],
        "lehr_ratio": None if ours is None else ours["ratio"],
        "peer_ratio": None if theirs is None else theirs["ratio"],
        "times_faster": None if ours is None or theirs is None else round(theirs["ratio"] / ours["ratio"], 3),
    }


def draw(models: list[dict[str, Any]]) -> None:
    """Time against fidelity, a panel a model; of each side those bear a name that no other of it beats in both."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = math.ceil(len(models) ** 0.5)
    rows_ = -(-len(models) // columns)
    size = (max(7.0, 4.4 * columns), 3.9 * rows_)
    figure, axes = plt.subplots(rows_, columns, figsize=size, squeeze=False, constrained_layout=True)
    for ax, model in zip(axes.flat, models, strict=False):
        for mine, colour, mark in ((False, "#888888", "o"), (True, "#c0392b", "D")):
            rows = [
                row
                for row in model["rows"]
                if row.get("step_ms") and row["name"].startswith("lehr ") is mine and row["name"] != "eager fp32"
            ]
            ax.scatter([min(r["sqnr_db"], 60) for r in rows], [r["ratio"] for r in rows], c=colour, marker=mark, s=28)
            for row in rows:
                if any(r["ratio"] < row["ratio"] and r["sqnr_db"] > row["sqnr_db"] for r in rows):
                    continue
                short = row["name"].removeprefix("lehr ").replace("onnxruntime", "ORT").replace("openvino", "OV")
                ax.annotate(
                    short.replace("torch.compile", "compile").replace(" (its default)", ""),
                    (min(row["sqnr_db"], 60), row["ratio"]),
                    fontsize=6,
                    color=colour,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
        for budget in BUDGETS:
            ax.axvline(budget, color="#dddddd", zorder=0)
        ax.set(title=model["model"], yscale="log", xlabel="SQNR, dB (60 and more at 60)", ylabel="time / eager fp32")
        for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g}")
    for spare in axes.flat[len(models) :]:
        spare.set_axis_off()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measure what is named on the command line, all by default; other models' rows are kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--nncf-python")
    parser.add_argument("--recipes", default="fp32,bf16,bf16-matmul,int8+bf16,int8-sq+bf16,int8-sq")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--prepare", action="store_true")
    given = parser.parse_args()
    if given.prepare and given.keep is None:
        parser.error("--prepare needs --keep FOLDER: what it makes would be gone")
    stored = RESULTS / f"{NAME}.json"
    known = {row["model"]: row for row in json.loads(stored.read_text())["models"]} if stored.is_file() else {}
    for name in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if given.keep is None else given.keep / name
            folder.mkdir(parents=True, exist_ok=True)
            recipes = given.recipes.split(",")
            measured = measure(name, recipes, given.nncf_python, given.seconds, folder, prepare=given.prepare)
        if measured is None:
            continue
        known[name] = measured
        models = [known[model] for model in MODELS if model in known]
        write(NAME, {"models": models})
        draw(models)
        print(json.dumps(known[name]["budgets"], indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
