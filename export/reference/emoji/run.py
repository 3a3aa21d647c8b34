"""What the stages of a training run share: a state on disk that outlives a kill, and a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

LOG_EVERY = 60.0  # seconds
SAVE_EVERY = 180.0  # seconds


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a reader finds the old one or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    temporary.replace(path)


def averaged_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights for :func:`average` to go on from."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def average(averaged: Mapping[str, Tensor], module: nn.Module, step: int, longest: float) -> None:
    """Exponential moving average with a memory of a tenth of the run so far, ``longest`` at most."""
    decay = min(longest, (1 + step) / (10 + step))
    with torch.no_grad():
        for key, value in module.state_dict().items():
            averaged[key].lerp_(value, 1 - decay)


@dataclass(slots=True, kw_only=True)
class Log:
    """A line a minute in ``path`` and on stderr: mean loss and samples a second since the last line."""

    path: Path
    stage: str
    started: float = field(default_factory=time.monotonic)
    total: float = 0.0
    steps: int = 0
    samples: int = 0

    def add(self, step: int, loss: float, samples: int) -> None:
        """Count one step; write when a minute has passed."""
        self.total, self.steps, self.samples = self.total + loss, self.steps + 1, self.samples + samples
        seconds = time.monotonic() - self.started
        if seconds >= LOG_EVERY:
            self.write(f"step {step + 1} loss {self.total / self.steps:.5f} {self.samples / seconds:.1f} samples/s")
            self.started, self.total, self.steps, self.samples = time.monotonic(), 0.0, 0, 0

    def write(self, text: str) -> None:
        """One line, with the time of day."""
        line = f"{time.strftime('%H:%M:%S')} {self.stage} {text}"
        click.echo(line, err=True)
        with self.path.open("a") as file:
            file.write(line + "\n")
