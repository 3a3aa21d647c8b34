"""Predicted against measured drift of final samples, for engines of digits-dit with rounded weights.

    python benchmarks/error_gains.py     writes benchmarks/results/error_gains.json

The reference is the fp32 engine of the shipped model. The other engines are the same graph on weights rounded to fp16,
to bf16 and to 8 bits a tensor. Predictions use the single-step errors on the reference's inputs: "direct" with the
table's gains alone, "propagated" to first order through the network. Ratios are predicted over measured norms of the
final sample's change; "remainder" is the norm of their difference over the measured norm, so 0 is exact.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from environment import write
from safetensors.torch import load_file, save_file

from lehr.engines.build import build
from lehr.engines.target import target
from lehr.export import reference as shipped
from lehr.export.package import Options, export
from lehr.runtime.error_gains import direct, propagated, record, step_errors
from lehr.runtime.golden import Tier
from lehr.runtime.guidance import classifier_free
from lehr.runtime.noise import batch_normal
from lehr.runtime.pipeline import open_denoiser
from lehr.runtime.recipe import recipe
from lehr.runtime.solvers import solver_table

Array = npt.NDArray[Any]
WEIGHTS = Path(shipped.__file__).parent / "weights" / "digits-dit.safetensors"
SAMPLES, STEPS = 4, 12
SAMPLERS = ("ddim", "dpmpp_2m", "unipc", "flow_heun")


def rounded_to_8_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Symmetric, one scale a tensor."""
    scale = tensor.abs().max() / 127
    return torch.round(tensor / scale) * scale if scale > 0 else tensor


ROUNDINGS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp32": lambda tensor: tensor,
    "fp16": lambda tensor: tensor.half().float(),
    "bf16": lambda tensor: tensor.bfloat16().float(),
    "int8": rounded_to_8_bits,
}


def engine(source: str, bundle: Path, options: Options) -> Path:
    """Export and build; returns the bundle."""
    export(source, bundle, options, progress=lambda text: print(text, file=sys.stderr))
    build(bundle, target("cpu"), recipe("fp32"))
    return bundle


def measure(reference: Path, others: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One row a sampler and a rounding."""
    network = open_denoiser(reference)
    spec = network.spec
    labels = {"class_labels": np.arange(SAMPLES, dtype=np.int64) % 10}
    denoiser = classifier_free(network, labels, {}, 1.0)
    rows = []
    for sampler in SAMPLERS:
        table = solver_table(sampler, spec.path, spec.prediction, STEPS)
        x_T = batch_normal(0, range(SAMPLES), spec.sample_shape(1)[1:]) * np.float32(table.init_noise_sigma)
        loop = record(denoiser, table, x_T)
        for name, path in others.items():
            other = classifier_free(open_denoiser(path), labels, {}, 1.0)
            errors = step_errors(other, table, loop)
            measured = record(other, table, x_T).final.astype(np.float64) - loop.final
            size = float(np.linalg.norm(measured))
            row: dict[str, Any] = {
                "sampler": sampler,
                "evaluations": len(table),
                "weights": name,
                "step_relative_error": float(
                    np.mean([np.linalg.norm(e) / np.linalg.norm(f) for e, f in zip(errors, loop.outputs, strict=True)])
                ),
                "measured_rms": float(np.sqrt(np.mean(measured**2))),
            }
            for kind, predicted in (
                ("direct", direct(table, errors)),
                ("propagated", propagated(denoiser, table, loop, errors)),
            ):
                row[kind] = {
                    "ratio": float(np.linalg.norm(predicted)) / size,
                    "remainder": float(np.linalg.norm(predicted - measured)) / size,
                    "cosine": float(np.sum(predicted * measured) / (np.linalg.norm(predicted) * size)),
                }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def main() -> None:
    """Make the engines, measure, write."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        # Copies: what load_file returns follows the file, should somebody train and write it meanwhile.
        weights = {key: value.clone() for key, value in load_file(WEIGHTS).items()}
        made = {}
        for name, rounding in ROUNDINGS.items():
            file = at / f"{name}.safetensors"
            save_file({key: rounding(value).contiguous() for key, value in weights.items()}, file)
            made[name] = engine(str(file), at / f"{name}.lehr", Options(preset="digits-dit", tier=Tier.NONE))
        reference, others = made["fp32"], {name: path for name, path in made.items() if name != "fp32"}
        rows = measure(reference, others)
    write("error_gains", {"model": "digits-dit, its shipped weights", "samples": SAMPLES, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
