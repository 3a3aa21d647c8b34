"""The pictures of docs/emoji.md, for benchmarks/emoji.py --sheets: what is drawn first is shown, nothing is chosen."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Array = npt.NDArray[Any]
DOCS = Path(__file__).resolve().parents[1] / "docs"
COLUMNS, CELL, PICTURE, LINE, LETTERS = 8, 124, 96, 12, 23  # pixels, and letters a line
SHOWN = 40  # of the held-out prompts, evenly spread over the list


def held_out(pictures: Array, prompts: list[str]) -> None:
    """Every second or third of the held-out prompts with the picture of seed 0."""
    chosen = [k * len(prompts) // SHOWN for k in range(SHOWN)]
    _sheet("emoji-held-out", pictures[chosen], [(prompts[k], "") for k in chosen], lines=2)


def compositions(pictures: Array, prompts: list[str], nearest: list[str]) -> None:
    """Prompts of what is not in the data, and under them the emoji that the picture is most like."""
    _sheet("emoji-compositions", pictures, list(zip(prompts, nearest, strict=True)), lines=4)


def training(record: dict[str, Any]) -> None:
    """The denoiser's loss, and the share of the held-out prompts that were met, over the steps."""
    stage = record["stages"]["denoiser"]
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    steps, loss = np.array(stage["loss"]).T
    axes[0].plot(steps, loss, lw=1, color="0.3")
    axes[0].set_ylabel("loss")
    axes[0].set_ylim(min(loss) * 0.9, float(np.quantile(loss, 0.97)) * 1.1)
    if stage["held_out_percent"]:
        at, first, five = np.array(stage["held_out_percent"]).T
        axes[1].plot(at, five, "o-", ms=3, lw=1, label="among the first five")
        axes[1].plot(at, first, "o-", ms=3, lw=1, label="first")
        axes[1].legend(frameon=False)
    axes[1].set_ylim(0, 100)
    axes[1].set_ylabel("held-out prompts, %")
    for axis in axes:
        axis.set_xlabel("steps")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "emoji-training.png", dpi=100, metadata={"Software": None})
    plt.close(figure)


def _sheet(name: str, pictures: Array, texts: list[tuple[str, str]], *, lines: int) -> None:
    """Write docs/NAME.png: (N, 3, 64, 64) in [0, 1], each with a text in black and one in grey under it."""
    height = PICTURE + 6 + lines * LINE + 8
    sheet = Image.new("RGB", (COLUMNS * CELL, -(-len(pictures) // COLUMNS) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for k, (picture, (black, grey)) in enumerate(zip(pictures, texts, strict=True)):
        x, y = k % COLUMNS * CELL, k // COLUMNS * height
        drawn = Image.fromarray(np.rint(picture * 255).astype(np.uint8).transpose(1, 2, 0))
        sheet.paste(drawn.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS), (x + (CELL - PICTURE) // 2, y))
        told = [(line, "black") for line in textwrap.wrap(black, LETTERS)]
        told += [(line, "grey") for line in textwrap.wrap(grey, LETTERS)]
        for row, (line, colour) in enumerate(told[:lines]):
            width = pen.textlength(line, font=font)
            pen.text((x + (CELL - width) / 2, y + PICTURE + 4 + row * LINE), line, fill=colour, font=font)
    sheet.quantize(256, dither=Image.Dither.NONE).save(DOCS / f"{name}.png", optimize=True)
