"""Train the small model of 3-D Gaussians: ``python -m lehr.export.reference.splats --out FOLDER``.

``coloured-solids`` (a ``gaussian_dit``) is given two words, such as "red torus", and draws the Gaussians of that solid
(:mod:`lehr.export.reference.splats_solids`).
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from lehr.export.reference import fitting, splats_solids
from lehr.export.reference.fitting import Schedule

NAME = "coloured-solids"
GAUSSIANS = 256
SCHEDULE = Schedule(steps=2_400, batch=8, learning_rate=2e-3, ratio_mean=-0.5)


def solids(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Solids (B, N, 14) and the two words that name each."""
    named = [
        (str(rng.choice(list(splats_solids.COLOURS))), str(rng.choice(list(splats_solids.SOLIDS))))
        for _ in range(count)
    ]
    drawn = [splats_solids.splats(rng, colour, solid, count=GAUSSIANS) for colour, solid in named]
    given = {
        "encoder_hidden_states": torch.from_numpy(np.stack([splats_solids.words(*pair) for pair in named])),
        "encoder_attention_mask": torch.ones(count, 2, dtype=torch.int64),
    }
    return torch.from_numpy(np.stack(drawn)), given


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoint, weights, record.")
@click.option("--threads", default=2, show_default=True)
@click.option("--checkpoint-minutes", default=2.0, show_default=True)
@click.option("--stop", type=int, help="Stop after this step; a later run goes on.  [default: the whole schedule]")
def main(out: Path, threads: int, checkpoint_minutes: float, stop: int | None) -> None:
    """Train and write weights and record."""
    fitting.fit_and_record(NAME, solids, SCHEDULE, out, threads=threads, minutes=checkpoint_minutes, stop=stop)


if __name__ == "__main__":
    main()
