"""Train the two small video models: ``python -m lehr.export.reference.video NAME --out FOLDER``.

``moving-shapes`` (a ``spacetime_dit``) draws clips of a class. ``flying-darts`` (a ``video_unet``, as Stable Video
Diffusion is conditioned) goes on from a first frame: a dart flies the way it points, as fast as the amount of motion
and the frame rate say. Both learn a handful of clips by heart, in pixels, which were made from random numbers
(:mod:`lehr.export.reference.video_clips`): minutes of training show what an architecture draws, not how well.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lehr.export.reference import fitting, video_clips
from lehr.export.reference.fitting import Draw, Schedule

FRAMES, SIZE = 8, 16
NULL_SHARE = 0.1  # clips trained without their class (Ho & Salimans 2022, arXiv:2207.12598)
CLIPS_SEED = 0
EACH = 2  # clips of a class
DARTS = 8  # first frames
BUCKETS = (16.0, 64.0)  # amounts of motion, in the buckets that Stable Video Diffusion counts it in
RATES = (6.0, 8.0)  # frames a second
NOISE = 0.1  # largest standard deviation of the noise on the first frame
EMBEDDED = 4  # cells a side of what stands for CLIP's embedding: the picture's mean colours


@cache
def remembered() -> npt.NDArray[np.float32]:
    """The clips that the models are fitted to, (classes, ``EACH``, 3, T, S, S)."""
    labels = np.arange(len(video_clips.CLASSES)).repeat(EACH)
    clips = video_clips.clips(np.random.default_rng(CLIPS_SEED), labels, frames=FRAMES, size=SIZE)
    return clips.reshape(-1, EACH, *clips.shape[1:])


def shapes(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips (B, 3, T, S, S) and their classes, one in ten of which is "no class"."""
    labels = rng.integers(len(video_clips.CLASSES), size=count)
    clips = remembered()[labels, rng.integers(EACH, size=count)]
    known = np.where(rng.uniform(size=count) < NULL_SHARE, len(video_clips.CLASSES), labels)
    return torch.from_numpy(clips), {"class_labels": torch.from_numpy(known)}


def darts(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips (B, T, 3, S, S) and the first frame, motion and frame rate that they go on from."""
    buckets, rates = (rng.choice(some, size=count) for some in (BUCKETS, RATES))
    numbers = rng.integers(DARTS, size=count)
    clips = np.concatenate([_dart(*which) for which in zip(numbers, buckets, rates, strict=True)])
    noise = rng.uniform(0, NOISE, count)
    first = clips[:, 0] + noise[:, None, None, None] * rng.standard_normal(clips[:, 0].shape)
    given = condition(first.astype(np.float32), buckets, rates, noise)
    return torch.from_numpy(clips), {name: torch.from_numpy(value) for name, value in given.items()}


def first_frame(number: int) -> npt.NDArray[np.float32]:
    """(1, 3, S, S): where the remembered dart ``number`` begins, however fast it flies."""
    return _dart(number, BUCKETS[0], RATES[0])[:, 0]


def condition(
    first: npt.NDArray[np.float32],
    buckets: npt.NDArray[np.float64],
    rates: npt.NDArray[np.float64],
    noise: npt.NDArray[np.float64],
) -> dict[str, npt.NDArray[np.float32]]:
    """Inputs of ``flying-darts`` that say what a clip goes on from.

    Args:
        first: (B, 3, S, S) in [-1, 1], the first frame with its noise on it.
        buckets: (B,) amount of motion.
        rates: (B,) frames a second; the network is told one less, as Stable Video Diffusion's is.
        noise: (B,) standard deviation of the noise.
    """
    cell = first.shape[-1] // EMBEDDED
    cells = first.reshape(len(first), 3, EMBEDDED, cell, EMBEDDED, cell).mean(axis=(3, 5))
    return {
        "encoder_hidden_states": cells.reshape(len(first), 1, -1),
        "added_time_ids": np.stack([rates - 1, buckets, noise], axis=1).astype(np.float32),
        "sample_cond": first,
    }


def _dart(number: int, bucket: float, rate: float) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng((CLIPS_SEED, number))
    return video_clips.darts(rng, np.array([bucket]), np.array([rate]), frames=FRAMES, size=SIZE)


MODELS: dict[str, tuple[Draw, Schedule]] = {
    "moving-shapes": (shapes, Schedule(steps=3_000, batch=16, learning_rate=2e-3, ratio_mean=0.5)),
    "flying-darts": (darts, Schedule(steps=2_000, batch=4, learning_rate=2e-3, ratio_mean=1.0)),
}


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(sorted(MODELS)))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoint, weights, record.")
@click.option("--threads", default=2, show_default=True)
@click.option("--checkpoint-minutes", default=2.0, show_default=True)
@click.option("--stop", type=int, help="Stop after this step; a later run goes on.  [default: the whole schedule]")
def main(name: str, out: Path, threads: int, checkpoint_minutes: float, stop: int | None) -> None:
    """Train and write weights and record."""
    draw, schedule = MODELS[name]
    fitting.fit_and_record(name, draw, schedule, out, threads=threads, minutes=checkpoint_minutes, stop=stop)


if __name__ == "__main__":
    main()
