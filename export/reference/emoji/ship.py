"""Put a trained emoji model into the package: ``python -m lehr.export.reference.emoji.ship --run FOLDER``.

Takes the newest averaged weights of a training run, of one that still goes on, too, with its tokenizer, and writes a
record beside them: data and weights by hash, the loss, and how the held-out prompts were met on the way.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save as as_bytes

from lehr.export.reference.emoji import data, denoiser, text_training, vae
from lehr.runtime.errors import InvalidInput

WEIGHTS = {  # in the run -> in the package
    "weights/denoiser.safetensors": "emoji.safetensors",
    "weights/text.safetensors": "emoji-text.safetensors",
    "weights/vae.safetensors": "emoji-vae.safetensors",
    "tokenizer.json": "emoji-tokenizer.json",
}
RECORD = "emoji.json"
FEATURES = "emoji-features.safetensors"
PAUSE = 600  # seconds between two lines of a log, beyond which nothing was being trained

_LINE = re.compile(r"(\d\d):(\d\d):(\d\d) (\w+) (.*)")
_LOSS = re.compile(r"step (\d+) loss ([\d.]+) ([\d.]+) samples/s")
_HELD_OUT = re.compile(r"step (\d+) held-out prompts: the picture is first in (\d+)%, in the first five in (\d+)%")


@dataclass(slots=True, kw_only=True)
class Stage:
    """What a log says of one stage of the training.

    Attributes:
        seconds: by the clock, pauses left out.
        loss: step and mean loss since the line before, a minute each.
        held_out: step, per cent of the prompts whose picture is first, and is among the first five.
        result: what its last line says.
    """

    seconds: int = 0
    loss: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, tuple[int, int]] = field(default_factory=dict)
    result: str = ""


def read_log(text: str) -> dict[str, Stage]:
    """Every stage of ``log.txt``; a run that was resumed says some steps twice, and the later line counts."""
    stages: dict[str, Stage] = {}
    before: dict[str, int] = {}
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        hours, minutes, seconds, name, said = found.groups()
        now, stage = 3600 * int(hours) + 60 * int(minutes) + int(seconds), stages.setdefault(name, Stage())
        passed = (now - before.get(name, now)) % 86_400
        stage.seconds += passed if passed <= PAUSE else 0
        before[name] = now
        if loss := _LOSS.fullmatch(said):
            step = int(loss[1])
            stage.loss = {k: value for k, value in stage.loss.items() if k < step} | {step: float(loss[2])}
        elif held_out := _HELD_OUT.fullmatch(said):
            stage.held_out[int(held_out[1])] = (int(held_out[2]), int(held_out[3]))
        else:
            stage.result = said
    return stages


def record(run: Path, weights: Path) -> dict[str, Any]:
    """What stands beside the weights."""
    settings = denoiser.Settings()
    return {
        "schedule": {name: value for name, value in asdict(settings).items() if name not in ("denoiser", "text")},
        "text_schedule": asdict(text_training.Settings()),
        "denoiser": asdict(settings.denoiser),
        "text_encoder": asdict(settings.text),
        "autoencoder": asdict(vae.PARAMS),
        "data": {
            "packages": ["emoji-datasource-twitter@16.0.0", "emojibase-data@17.0.0"],
            "sha256": data.SHA256,
            "licences": {data.PICTURES: "CC-BY-4.0", data.NAMES: "MIT"},
        },
        "weights_sha256": {
            name: hashlib.sha256((weights / name).read_bytes()).hexdigest() for name in sorted(WEIGHTS.values())
        },
        "torch": torch.__version__,
        "stages": {
            name: {
                "seconds": stage.seconds,
                "result": stage.result,
                "loss": [[step, loss] for step, loss in sorted(stage.loss.items())],
                "held_out_percent": [[step, *shares] for step, shares in sorted(stage.held_out.items())],
            }
            for name, stage in read_log((run / "log.txt").read_text(encoding="utf-8")).items()
        },
    }


def ship(run: Path, weights: Path, features: Path | None) -> None:
    """Copy what a bundle needs, write the record, and the feature network into the folder ``features``.

    Raises:
        InvalidInput: the run has not come that far.
    """
    missing = [name for name in WEIGHTS if not (run / name).is_file()]
    if missing:
        raise InvalidInput(f"{run} has no {missing[0]} yet; the denoiser's training writes it every 10 minutes.")
    for source, name in WEIGHTS.items():
        shutil.copyfile(run / source, weights / name)
    (weights / RECORD).write_text(json.dumps(record(run, weights), indent=1) + "\n", encoding="utf-8")
    if features is not None:
        state = torch.load(run / "features.pt", weights_only=True)
        half = {key: value.half().contiguous() for key, value in state.items()}
        (features / FEATURES).write_bytes(as_bytes(half))


@click.command(help=__doc__)
@click.option("--run", type=click.Path(path_type=Path), required=True, help="Folder that training wrote into.")
@click.option("--features", type=click.Path(path_type=Path), help="Also write the feature network into this folder.")
def main(run: Path, features: Path | None) -> None:
    """Parse the command line."""
    weights = Path(str(files("lehr.export.reference").joinpath("weights")))
    ship(run, weights, features)
    click.echo(f"{weights}: {sum((weights / name).stat().st_size for name in WEIGHTS.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
