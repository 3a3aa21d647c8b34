"""``lehr run``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option

if TYPE_CHECKING:
    import numpy.typing as npt

    from lehr.runtime.guidance import Guidance, Projection

_BUNDLE = click.Path(path_type=Path)


@click.command("run")
@bundle_argument
@engine_options
@click.option(
    "--sampler",
    help="One of lehr list samplers, or scheduler: the model's own, from a table stored at export.  [default: "
    "scheduler where the bundle has tables, else what suits the model]",
)
@click.option("--steps", type=int, help="Number of sampler steps.  [default: the model's own, 20 as a rule]")
@click.option("--eta", type=float, help="Share of injected noise, where a sampler takes it.  [default: its own]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the noise.")
@click.option("--num", type=click.IntRange(1), help="How many samples.  [default: one a label, or 1]")
@click.option("--prompt", "prompts", multiple=True, help="What to draw, in words; repeat for several.")
@click.option("--negative-prompt", "negative_prompts", multiple=True, help="What guidance pushes away from.")
@click.option("--height", type=click.IntRange(1), help="Of the pictures, in pixels.  [default: the model's own]")
@click.option("--width", type=click.IntRange(1), help="Of the pictures, in pixels.  [default: the model's own]")
@click.option(
    "--class-label", "class_labels", multiple=True, help="Class to draw, by number or name; repeat for several."
)
@click.option(
    "--conditions",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="The network's further inputs, arrays by name with a row a sample; unconditional.NAME for what guidance "
    "subtracts.",
)
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 is none.  [default: the model's own]")
@click.option(
    "--true-guidance-scale",
    type=float,
    help="With --negative-prompt: guidance by two evaluations, beside a scale that the network is told (FLUX).",
)
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LO HI",
    help="Guide only where LO <= sigma / alpha <= HI (EDM's sigma); inf is pure noise.",
)
@click.option(
    "--guidance-rescale",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the guided estimate that is brought back to the conditional one's contrast.",
)
@click.option(
    "--guidance-projection",
    type=click.Choice(["apg"]),
    help="Damp the part of guidance that is parallel to the estimate (adaptive projected guidance).",
)
@click.option("--apg-parallel", type=click.FloatRange(0, 1), help="Share of the parallel part kept.  [default: 0]")
@click.option("--apg-norm", type=float, help="Largest norm of a sample's guidance.  [default: no limit]")
@click.option("--apg-momentum", type=float, help="Of guidance along the loop, in (-1, 1).  [default: 0]")
@click.option("--guide", type=_BUNDLE, metavar="G.lehr", help="A network of its own for what guidance subtracts.")
@click.option("--classifier", type=_BUNDLE, metavar="C.lehr", help="A classifier's gradient, for classifier guidance.")
@click.option("--classifier-scale", type=float, help="Of classifier guidance.  [default: 1]")
@click.option("--init", type=click.Path(path_type=Path), help="Start from this sample, IMAGE.png or .npz (img2img).")
@click.option(
    "--strength", type=float, help="With --init: share of the steps, in (0, 1].  [default: 0.8, 1 with --mask]"
)
@click.option("--mask", type=click.Path(path_type=Path), help="With --init: white (1) is redrawn, black (0) kept.")
@click.option(
    "--batch",
    type=click.IntRange(1, 512),
    help="Samples drawn at once.  [default: 16; of a pipeline 4, with --low-memory 1]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="Put a LoRA that lehr lora converted into the engine; repeat for several.  [default: scale 1]",
)
@click.option(
    "--control",
    "controls",
    multiple=True,
    metavar="IMAGE[:SCALE]",
    help="The picture that a ControlNet of the bundle steers by, one for each.  [default: scale 1]",
)
@click.option(
    "--control-interval",
    type=(float, float),
    metavar="START END",
    help="With --control: the share of the steps between which it acts.  [default: 0 1]",
)
@click.option("--stage-recipe", "stage_recipes", multiple=True, metavar="NAME=R", help="Recipe of a pipeline's stage.")
@click.option(
    "--view",
    "views",
    multiple=True,
    metavar="AZIMUTH,ELEVATION",
    help="Of 3-D samples: where the camera stands, in degrees; repeat for several.  [default: all around]",
)
@click.option(
    "--fps",
    type=click.FloatRange(0, 1000, min_open=True),
    help="Pictures a second of a .gif or .webp.  [default: 8 for frames and views, 2 for a picture a sample]",
)
@click.option("--tile", type=click.IntRange(0), help="Latent cells a tile's side when decoding; 0 decodes whole.")
@click.option("--low-memory", is_flag=True, help="One stage of a pipeline in memory at a time, decoded in tiles.")
@click.option("--whole-loop", is_flag=True, help="Draw with the graph that lehr export --unroll made, a call a batch.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="OUT.png, .gif, .webp or .npz.")
@json_option
def command(
    bundle: Path,
    target: str,
    recipe: str,
    sampler: str | None,
    steps: int | None,
    eta: float | None,
    seed: int,
    num: int | None,
    prompts: tuple[str, ...],
    negative_prompts: tuple[str, ...],
    height: int | None,
    width: int | None,
    class_labels: tuple[str, ...],
    conditions: Path | None,
    guidance_scale: float | None,
    true_guidance_scale: float | None,
    guidance_interval: tuple[float, float] | None,
    guidance_rescale: float,
    guidance_projection: str | None,
    apg_parallel: float | None,
    apg_norm: float | None,
    apg_momentum: float | None,
    guide: Path | None,
    classifier: Path | None,
    classifier_scale: float | None,
    init: Path | None,
    strength: float | None,
    mask: Path | None,
    batch: int | None,
    loras: tuple[str, ...],
    controls: tuple[str, ...],
    control_interval: tuple[float, float] | None,
    stage_recipes: tuple[str, ...],
    views: tuple[str, ...],
    fps: float | None,
    tile: int | None,
    low_memory: bool,
    whole_loop: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Draw samples with an engine.

    Several prompts or labels are used in turn; without labels, all classes in turn. The same seed draws the same
    samples at any batch size. A .png shows all samples side by side, a .gif or .webp one after the other; a .npz file
    holds the float32 array "samples", (N, C, H, W). A bundle of a whole pipeline draws pictures, in [0, 1] there.
    Videos are a row of frames each, or play side by side in a .gif or .webp; 3-D samples are seen from every --view.

    \b
    Examples:
      lehr run d.lehr --class-label 3 --num 8 --seed 0 -o out.png
      lehr run d.lehr --sampler euler --steps 50 --num 64 -o out.npz
      lehr run sd.lehr --prompt "a red fox in the snow" --num 4 --seed 7 -o foxes.png
      lehr run d.lehr --guidance-scale 4 --guidance-interval 0.3 5 --num 8 -o out.png
      lehr run d.lehr --init digit.png --strength 0.6 --class-label 8 -o out.png
      lehr run video.lehr --class-label 4 --num 2 -o ball.gif
      lehr run solids.lehr --conditions words.npz --view 30,25 --view 120,25 -o solids.png
    """
    import time

    from lehr.commands._pictures import Asked, draw
    from lehr.commands._shots import Shots, read_conditions, renderer_of, write
    from lehr.runtime import picture
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.lora import read_applied
    from lehr.runtime.pipeline import Pipeline, Request, open_denoiser
    from lehr.runtime.stored_tables import StoredTables
    from lehr.runtime.whole_loop import WholeLoop

    picture.check_output(output, (".png", ".gif", ".webp", ".npz"))
    if classifier_scale is not None and classifier is None:
        raise click.UsageError("--classifier-scale needs --classifier.")
    guidance = _guidance(
        guidance_interval, guidance_rescale, _projection(guidance_projection, apg_parallel, apg_norm, apg_momentum)
    )
    progress = Progress()
    if whole_loop and (guide is not None or classifier is not None):
        raise click.UsageError("--whole-loop draws with one graph; it goes without --guide and --classifier.")
    opened_bundle = Bundle.open(bundle)
    opened = opened_bundle.manifest
    asked = Asked(
        prompts=prompts,
        negative_prompts=negative_prompts,
        height=height,
        width=width,
        true_guidance_scale=true_guidance_scale,
        stage_recipes=stage_recipes,
        tile=tile,
        low_memory=low_memory,
        controls=controls,
        control_interval=control_interval,
    )
    applied = read_applied(loras)
    if opened.pipeline is not None:
        if whole_loop or guide is not None or classifier is not None:
            raise click.UsageError("--whole-loop, --guide and --classifier go with a denoiser alone, not a pipeline.")
        if conditions is not None or views:
            raise click.UsageError("--conditions and --view go with a denoiser alone, not a pipeline.")
        drawn = draw(
            bundle,
            asked,
            target=target,
            recipe=recipe,
            init=init,
            mask=mask,
            class_labels=class_labels,
            guidance=guidance,
            loras=applied,
            options={
                "num": num,
                "seed": seed,
                "sampler": sampler,
                "num_inference_steps": steps,
                "eta": eta,
                "guidance_scale": guidance_scale,
                "strength": strength,
                "batch": batch or (1 if low_memory else 4),
            },
            progress=progress,
        )
        write(output, drawn.pictures, drawn.pictures[:, None], (0.0, 1.0), fps=fps)
        told = _told(output, drawn.pictures, drawn.sampler, drawn.evaluations, seed, drawn.seconds)
        emit(as_json, {**told, "warnings": list(drawn.warnings)}, _prose(told))
        return
    (asked if renderer_of(opened) is None else replace(asked, stage_recipes=())).refuse(bundle)
    spec, batch = opened.model, batch or 16
    channels = spec.sample_shape(1)[1]
    given = read_conditions(conditions, spec, num)
    shots = Shots(opened_bundle, output, views=views, stage_recipes=stage_recipes, target=target, recipe=recipe)
    request = Request(
        num=given.num,
        conditions=given.conditions,
        unconditional=given.unconditional,
        seed=seed,
        sampler=sampler,
        num_inference_steps=steps,
        eta=eta,
        guidance_scale=guidance_scale,
        guidance=guidance,
        classifier_scale=1.0 if classifier_scale is None else classifier_scale,
        class_labels=_numbers(class_labels),
        batch=batch,
        init=None if init is None else picture.load(init, channels, spec.value_range),
        strength=strength,
        mask=None if mask is None else picture.load(mask, 1, (0.0, 1.0)),
    )
    if whole_loop and loras:
        raise click.UsageError("--whole-loop draws with a graph that LoRAs are not put into; merge them at export.")
    if whole_loop:
        loop = WholeLoop.open(bundle, target=target, recipe=recipe)
        name, evaluations = loop.settings.sampler, loop.settings.evaluations
        started = time.monotonic()
        samples = loop(request)
    else:
        pipeline = Pipeline(
            open_denoiser(bundle, target=target, recipe=recipe, loras=applied),
            guide=None if guide is None else open_denoiser(guide, target=target, recipe=recipe),
            classifier=None if classifier is None else open_denoiser(classifier, target=target, recipe=recipe),
            tables=StoredTables(opened_bundle),
        )
        table = pipeline.table(request)
        name, evaluations = table.sampler, len(table)
        total = evaluations * -(-request.count // batch)

        def on_progress(first: int, evaluation: int) -> None:
            progress.steps(first // batch * evaluations + evaluation + 1, total, "step")

        started = time.monotonic()
        samples = pipeline(request, on_progress=on_progress)
    seconds = time.monotonic() - started
    shots.save(samples, fps=fps)
    told = _told(output, samples, name, evaluations, seed, seconds)
    emit(as_json, told, _prose(told))


def _told(
    output: Path, samples: npt.NDArray[Any], sampler: str, evaluations: int, seed: int, seconds: float
) -> dict[str, Any]:
    return {
        "output": str(output),
        "shape": list(samples.shape),
        "sampler": sampler,
        "evaluations": evaluations,
        "seed": seed,
        "seconds": round(seconds, 3),
    }


def _prose(told: dict[str, Any]) -> str:
    drawn = f"{told['shape'][0]} samples, {told['sampler']} with {told['evaluations']} evaluations"
    return f"{told['output']}: {drawn}, {told['seconds']:.2f} s"


def _numbers(labels: tuple[str, ...]) -> tuple[int, ...]:
    """Labels of a model that knows its classes by number alone."""
    for label in labels:
        if not label.strip().lstrip("-").isdecimal():
            raise click.BadParameter(f"{label!r} is no number, and this model knows its classes by number.")
    return tuple(int(label) for label in labels)


def _guidance(interval: tuple[float, float] | None, rescale: float, projection: Projection | None) -> Guidance:
    from lehr.runtime.guidance import Guidance

    return Guidance(interval=interval, rescale=rescale, projection=projection)


def _projection(
    kind: str | None, parallel: float | None, norm: float | None, momentum: float | None
) -> Projection | None:
    from lehr.runtime.guidance import Projection

    if kind is None:
        if (parallel, norm, momentum) != (None, None, None):
            raise click.UsageError("--apg-parallel, --apg-norm and --apg-momentum need --guidance-projection apg.")
        return None
    return Projection(parallel=parallel or 0.0, norm_threshold=norm, momentum=momentum or 0.0)
