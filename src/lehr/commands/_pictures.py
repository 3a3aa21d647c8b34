"""What ``lehr run`` does with a bundle of a whole pipeline: words or classes in, pictures out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lehr.runtime.controlnet import Steering
    from lehr.runtime.guidance import Guidance
    from lehr.runtime.lora import Applied


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options that only a pipeline has a use for."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    height: int | None
    width: int | None
    true_guidance_scale: float | None
    stage_recipes: tuple[str, ...]
    tile: int | None
    low_memory: bool
    controls: tuple[str, ...]
    control_interval: tuple[float, float] | None

    def refuse(self, bundle: Path) -> None:
        """Raise UsageError where one of them was given: ``bundle`` holds a denoiser alone."""
        given = {
            "--prompt": self.prompts,
            "--negative-prompt": self.negative_prompts,
            "--height": self.height,
            "--width": self.width,
            "--true-guidance-scale": self.true_guidance_scale,
            "--stage-recipe": self.stage_recipes,
            "--tile": self.tile is not None,
            "--low-memory": self.low_memory,
            "--control": self.controls,
            "--control-interval": self.control_interval is not None,
        }
        named = [name for name, value in given.items() if value]
        if named:
            raise click.UsageError(
                f"{named[0]} needs a bundle of a whole pipeline, and {bundle.name} holds a denoiser alone. Export the "
                "pipeline's folder: lehr export FOLDER -o NAME.lehr"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Pictures (N, C, H, W) in [0, 1], and what is told about them."""

    pictures: npt.NDArray[np.float32]
    sampler: str
    evaluations: int
    seconds: float
    warnings: tuple[str, ...]


def recipes_by_stage(given: tuple[str, ...]) -> dict[str, str]:
    """``("vae_decoder=fp32",)`` as a mapping; raises UsageError for another form."""
    pairs = [entry.partition("=") for entry in given]
    for (name, _, recipe), entry in zip(pairs, given, strict=True):
        if not name or not recipe:
            raise click.UsageError(f"--stage-recipe {entry!r} is not of the form NAME=RECIPE, as in vae_decoder=fp32.")
    return {name: recipe for name, _, recipe in pairs}


def steering(asked: Asked) -> tuple[Steering, ...]:
    """What the ControlNets are given; raises InvalidInput for a file that is no picture."""
    from lehr.runtime import picture
    from lehr.runtime.controlnet import Steering
    from lehr.runtime.lora import split_scale

    if asked.control_interval is not None and not asked.controls:
        raise click.UsageError("--control-interval says when --control acts; give a picture with --control, too.")
    start, end = asked.control_interval or (0.0, 1.0)
    pairs = [split_scale(text) for text in asked.controls]
    return tuple(
        Steering(
            picture=picture.load(Path(name), 3, (0.0, 1.0), height=asked.height, width=asked.width),
            scale=scale,
            start=start,
            end=end,
        )
        for name, scale in pairs
    )


def draw(
    bundle: Path,
    asked: Asked,
    *,
    target: str,
    recipe: str,
    init: Path | None,
    mask: Path | None,
    class_labels: tuple[str, ...],
    guidance: Guidance,
    loras: Sequence[Applied],
    options: Mapping[str, Any],
    progress: Progress,
) -> Drawn:
    """Draw with all stages of a bundle.

    Args:
        bundle: of a pipeline.
        asked: of the pipeline.
        target: class of machine.
        recipe: of the denoiser.
        init: picture to start from.
        mask: of what is redrawn.
        class_labels: numbers or names.
        guidance: beyond its scale.
        loras: in the weights of denoiser and stages.
        options: further fields of the request.
        progress: on stderr.
    """
    from lehr.runtime import picture
    from lehr.runtime.text_to_image import PictureRequest, TextToImage

    warned: list[str] = []

    def warn(text: str) -> None:
        warned.append(text)
        progress(f"warning: {text}")

    pipeline = TextToImage.open(
        bundle,
        target=target,
        recipe=recipe,
        stage_recipes=recipes_by_stage(asked.stage_recipes),
        low_memory=asked.low_memory,
        loras=loras,
        warn=warn,
    )
    high, wide, unit = asked.height, asked.width, (0.0, 1.0)
    request = PictureRequest(
        prompts=asked.prompts,
        negative_prompts=asked.negative_prompts or None,
        class_labels=class_labels,
        true_guidance_scale=1.0 if asked.true_guidance_scale is None else asked.true_guidance_scale,
        guidance=guidance,
        init=None if init is None else picture.load(init, 3, unit, height=high, width=wide),
        mask=None if mask is None else picture.load(mask, 1, unit, height=high, width=wide),
        controls=steering(asked),
        tile=asked.tile,
        height=high,
        width=wide,
        **options,
    )
    table, evaluations = pipeline.table(request), pipeline.evaluations(request)
    total = evaluations * -(-request.count // request.batch)

    def on_progress(first: int, evaluation: int) -> None:
        progress.steps(first // request.batch * evaluations + evaluation + 1, total, "step")

    started = time.monotonic()
    pictures = pipeline(request, on_progress=on_progress)
    return Drawn(
        pictures=pictures,
        sampler=table.sampler,
        evaluations=evaluations,
        seconds=time.monotonic() - started,
        warnings=tuple(warned),
    )
