"""Draw the small video models and the model of 3-D Gaussians through their engines, and measure them against eager.

``python benchmarks/video_and_splats.py FOLDER`` exports the shipped models into FOLDER, builds them for this processor,
verifies them and draws the pictures of ``docs/architectures.md``; each step is the ``lehr`` command that it prints.
``--weights DIR`` takes the weights from a training's folder instead of the shipped ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from environment import RESULTS, write

from lehr.export.reference import splats_solids, video, video_clips
from lehr.export.source import shipped_weights
from lehr.runtime import picture

NAME = "video_and_splats"
DOCS = Path(__file__).resolve().parents[1] / "docs"
ZOOM = 3  # of the videos' pixels
SEED = 4
RUN = ("--seed", str(SEED))
STARTS = 4  # first frames that are continued
MOTION = ((16.0, 6.0), (64.0, 6.0))  # buckets and frames a second that each is continued with


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What of a model is drawn: arguments of ``lehr run`` and the picture that they give."""

    preset: str
    arguments: Callable[[Path], tuple[str, ...]]
    show: Callable[[Path, Path], None]


def lehr(*arguments: str) -> dict[str, Any]:
    """One command line; its JSON."""
    print("lehr", *arguments, flush=True)
    command = [sys.executable, "-m", "lehr", *arguments, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --------------------------------------------------------------------------------------------------- the models


def shape_arguments(_: Path) -> tuple[str, ...]:
    """A clip of each class."""
    labels = [("--class-label", str(label)) for label in range(len(video_clips.CLASSES))]
    return (*[part for pair in labels for part in pair], *RUN)


def show_shapes(samples: Path, out: Path) -> None:
    """(N, 3, T, H, W): a row a class, and the same as a film."""
    clips = np.load(samples)["samples"].transpose(0, 2, 1, 3, 4)
    picture.save_png(out, _sheet(clips))
    film = picture.film(clips, (-1, 1)).repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
    picture.save_animation(out.with_suffix(".gif"), film, milliseconds=125)


def dart_arguments(folder: Path) -> tuple[str, ...]:
    """Some of the first frames, each continued slowly and fast."""
    buckets, rates = np.array(MOTION * STARTS).T
    firsts = np.concatenate([video.first_frame(number) for number in range(STARTS)])
    given = video.condition(firsts.repeat(len(MOTION), axis=0), buckets, rates, np.zeros(len(buckets)))
    np.savez(folder / "darts.npz", **given)  # type: ignore[arg-type]
    return ("--conditions", str(folder / "darts.npz"), *RUN)


def show_darts(samples: Path, out: Path) -> None:
    """(N, T, 3, H, W): the first frame as it was given, then the clip."""
    given = np.load(samples.with_name("darts.npz"))["sample_cond"][:, None]
    picture.save_png(out, _sheet(np.concatenate([given, np.load(samples)["samples"]], axis=1)))


def solid_arguments(folder: Path) -> tuple[str, ...]:
    """Each solid, in colours in turn."""
    pairs = list(zip(splats_solids.COLOURS, splats_solids.SOLIDS, strict=True))
    context = np.stack([splats_solids.words(*pair) for pair in pairs])
    file = folder / "solids.npz"
    np.savez(file, encoder_hidden_states=context, encoder_attention_mask=np.ones((1, context.shape[1]), np.int64))
    return ("--conditions", str(file), *RUN)


def show_solids(samples: Path, out: Path) -> None:
    """Drawn by ``lehr run`` itself, through the renderer's engine."""
    bundle = samples.with_suffix(".lehr")
    lehr("run", str(bundle), *solid_arguments(samples.parent), "-o", str(out))


DRAWINGS = (
    Drawing(preset="moving-shapes", arguments=shape_arguments, show=show_shapes),
    Drawing(preset="flying-darts", arguments=dart_arguments, show=show_darts),
    Drawing(preset="coloured-solids", arguments=solid_arguments, show=show_solids),
)


def _sheet(clips: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return picture.sheet(clips, (-1, 1)).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)


# ----------------------------------------------------------------------------------------------------- the run


def measure(drawing: Drawing, folder: Path, weights: Path | None) -> dict[str, Any]:
    """Export, build, verify and draw one model; its record, and how far the engine is from eager."""
    name = drawing.preset
    shipped = shipped_weights(name)
    record = (weights / name if weights is not None else shipped or Path(name)).with_suffix(".json")
    source = (str(weights / f"{name}.safetensors"), "--preset", name) if weights is not None else (name,)
    bundle, samples = folder / f"{name}.lehr", folder / f"{name}.npz"
    lehr("export", *source, "-o", str(bundle), "--overwrite")
    lehr("build", str(bundle), "--target", "cpu", "--library", "onnxruntime")
    verified = lehr("verify", str(bundle))
    drawn = lehr("run", str(bundle), *drawing.arguments(folder), "-o", str(samples))
    drawing.show(samples, DOCS / f"{name}.png")
    levels = verified["levels"]
    return {
        "training": json.loads(record.read_text(encoding="utf-8")),
        "sampler": drawn["sampler"],
        "evaluations": drawn["evaluations"],
        "seed": drawn["seed"],
        "engine_against_eager": {"psnr_db": levels["L2"]["psnr_db"], "max_rel_error": levels["L1"]["max_rel_error"]},
        "stages": {stage: told["levels"]["L1"] for stage, told in verified.get("stages", {}).items()},
    }


def main() -> None:
    """Draw and measure all of them, or those that are named; the other models' records are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for bundles and samples")
    parser.add_argument("--weights", type=Path, help="folder of a training; by default what is shipped")
    parser.add_argument("--only", action="append", choices=[drawing.preset for drawing in DRAWINGS])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    chosen = [drawing for drawing in DRAWINGS if given.only is None or drawing.preset in given.only]
    stored = RESULTS / f"{NAME}.json"
    known = json.loads(stored.read_text(encoding="utf-8"))["models"] if stored.is_file() else {}
    known |= {drawing.preset: measure(drawing, given.folder, given.weights) for drawing in chosen}
    write(NAME, {"models": {drawing.preset: known[drawing.preset] for drawing in DRAWINGS if drawing.preset in known}})


if __name__ == "__main__":
    main()
