"""What 8-bit products cost a latent U-Net, choice by choice and kind of layer by kind of layer.

    python benchmarks/quantised_unet.py [--bundle FOLDER.lehr] [--size 32]

Writes benchmarks/results/quantised_unet.json. The network is the U-Net of benchmarks/budgets.py, 36M parameters with
random weights, exported or taken from ``FOLDER.lehr``. Every figure is the SQNR of one evaluation at unit noise against
the float32 step graph, the worst of six timesteps, quantisers executed one by one; calibration sees 16 such inputs from
other seeds. Weights are rounded to nearest: they lose a tenth of what activations do. ``alone`` quantises the layers of
one kind only, in ``int8``. ``arithmetic`` is the share of multiplications by kind, at this size and at 64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from budgets import FACTORY, HERE
from environment import write

from lehr.calibration.calibrate import Data, gather
from lehr.calibration.configs import ALPHAS, Config, Int8, WeightOnly, ZeroPoint
from lehr.calibration.execute import OrtGraph, step_graph
from lehr.calibration.layers import Kind, Layer, Role, layers
from lehr.calibration.observers import Statistics, observe
from lehr.calibration.quantize import quantize
from lehr.calibration.recipes import plan_of
from lehr.engines.portable import portable_denoiser
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.noise import batch_normal
from lehr.runtime.parity import decibels
from lehr.runtime.timing import write_inputs

Array = npt.NDArray[Any]
NAME, BATCH = "quantised_unet", 2
HELD_OUT, CALIBRATION = (100, 6), (500, 8)  # seed, and how many timesteps


def evaluations(bundle: Bundle, size: int, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Inputs of single evaluations, evenly spaced over the timesteps."""
    spec = bundle.manifest.model
    conditions = synthetic_conditions(spec, BATCH, seed=0)
    ends = (spec.path.first_timestep, spec.path.last_timestep)
    shape = (*spec.sample_shape(BATCH)[1:2], size, size)
    for k, timestep in enumerate(np.linspace(min(ends), max(ends), count + 2)[1:-1]):
        given = {
            spec.sample.name: batch_normal(seed + k, range(BATCH), shape),
            spec.timestep.name: np.full(BATCH, timestep, spec.timestep.dtype.numpy),
        }
        yield given | conditions


class Judge:
    """Holds step graphs against the float32 one at its own inputs."""

    def __init__(self, bundle: Bundle, size: int) -> None:
        self.calls: list[tuple[dict[str, Array], Array]] = []
        reference, spec, keep = OrtGraph.of_bundle(bundle), bundle.manifest.model, self.calls

        class Keeping:
            def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
                made = reference.run(feeds)
                keep.append(({name: np.array(value) for name, value in feeds.items()}, next(iter(made.values()))))
                return made

        denoiser = portable_denoiser(bundle, Keeping)
        for feeds in evaluations(bundle, size, *HELD_OUT):
            conditions = {tensor.name: feeds[tensor.name] for tensor in spec.conditions}
            denoiser.with_variance(feeds[spec.sample.name], float(feeds[spec.timestep.name][0]), conditions)

    def sqnr_db(self, graph: Any) -> float:
        """Of the worst evaluation."""
        session = OrtGraph(graph)
        found = []
        for feeds, expected in self.calls:
            error = next(iter(session.run(feeds).values())).astype(np.float64) - expected
            found.append(decibels(float((expected.astype(np.float64) ** 2).sum()), float((error**2).sum())))
        return round(min(found), 2)


def kind_of(layer: Layer) -> str:
    """The word that a layer's figures stand under."""
    if Role.SHORTCUT in layer.roles:
        return "shortcuts"
    if Role.POINTWISE in layer.roles:
        return "other convolutions of single pixels"
    if layer.kind is Kind.CONV:
        return "convolutions of 3x3"
    return "products of matrices" if layer.kind is Kind.MATMUL else layer.kind.value


def variants(found: tuple[Layer, ...]) -> dict[str, dict[str, Config]]:
    """Name -> plan, each beside the one before."""
    plain = list(plan_of("int8", found))
    asym = list(plan_of("int8-asym", found))
    shortcuts = {layer.name for layer in found if Role.SHORTCUT in layer.roles}
    both = Int8(zero=ZeroPoint.OWN, alphas=ALPHAS)
    return {
        "weights only": dict.fromkeys(plain, WeightOnly()),
        "int8": dict.fromkeys(plain, Int8()),
        "SmoothQuant": dict.fromkeys(plain, Int8(alphas=ALPHAS)),
        "zero points": dict.fromkeys(plain, Int8(zero=ZeroPoint.OWN)),
        "zero points, SmoothQuant": dict.fromkeys(plain, both),
        "the same, shortcuts kept": {name: both for name in plain if name not in shortcuts},
        "the same, all single pixels kept": dict.fromkeys(asym, both),
    }


def shares(bundle: Bundle, size: int) -> dict[str, float]:
    """Of multiplications, by kind."""
    sizes = bundle.manifest.model.default_sizes(batch=BATCH, height=size, width=size)
    counts: dict[str, int] = {}
    for layer in layers(step_graph(bundle), sizes):
        counts[kind_of(layer)] = counts.get(kind_of(layer), 0) + layer.macs
    return {kind: round(count / sum(counts.values()), 4) for kind, count in counts.items()}


def observed(bundle: Bundle, size: int, scratch: Path) -> Statistics:
    """Statistics of the calibration inputs."""
    (scratch / "data").mkdir()
    for k, feeds in enumerate(evaluations(bundle, size, *CALIBRATION)):
        write_inputs(scratch / "data" / f"{k}.npz", feeds)
    return observe(bundle, gather(bundle, Data(path=scratch / "data", folder=scratch / "parts")))


def measure(bundle: Bundle, size: int, scratch: Path) -> dict[str, Any]:
    """All figures of one size."""
    found = layers(step_graph(bundle))
    statistics, judge = observed(bundle, size, scratch), Judge(bundle, size)
    plain = plan_of("int8", found)
    alone: dict[str, dict[str, Config]] = {}
    for layer in found:
        if layer.name in plain:
            alone.setdefault(kind_of(layer), {})[layer.name] = Int8()

    def figures(plans: Mapping[str, Mapping[str, Config]]) -> dict[str, float]:
        made = {}
        for name, plan in plans.items():
            made[name] = judge.sqnr_db(quantize(step_graph(bundle), plan, statistics))
            print(f"{name}: {made[name]} dB", file=sys.stderr, flush=True)
        return made

    return {
        "size": size,
        "sqnr_db": figures(variants(found)),
        "alone": figures(alone),
        "arithmetic": {str(at): shares(bundle, at) for at in sorted({size, 64})},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--size", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bundle = arguments.bundle
        if bundle is None:
            bundle = scratch / "unet.lehr"
            (scratch / "model.py").write_text(FACTORY.format(here=str(HERE), name="unet"))
            words = ["export", f"{scratch / 'model.py'}:make", "-o", str(bundle), "--golden", "none"]
            subprocess.run([sys.executable, "-m", "lehr", *words], check=True)
        found = measure(Bundle.open(bundle), arguments.size, scratch)
    print(json.dumps(found, indent=1))
    write(NAME, found)


if __name__ == "__main__":
    main()
