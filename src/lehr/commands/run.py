"""``lehr run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option

if TYPE_CHECKING:
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
@click.option("--class-label", "class_labels", type=int, multiple=True, help="Class to draw; repeat for several.")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 is none.  [default: the model's own]")
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
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1, 512), help="Samples drawn at once.")
@click.option("--whole-loop", is_flag=True, help="Draw with the graph that lehr export --unroll made, a call a batch.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="OUT.png or OUT.npz.")
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
    class_labels: tuple[int, ...],
    guidance_scale: float | None,
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
    batch: int,
    whole_loop: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Draw samples with an engine.

    Several labels are used in turn; without any, all classes in turn. The same seed draws the same samples at
    any batch size. A .npz file holds the float32 array "samples", (N, C, H, W).

    \b
    Examples:
      lehr run d.lehr --class-label 3 --num 8 --seed 0 -o out.png
      lehr run d.lehr --sampler euler --steps 50 --num 64 -o out.npz
      lehr run d.lehr --guidance-scale 4 --guidance-interval 0.3 5 --num 8 -o out.png
      lehr run d.lehr --init digit.png --strength 0.6 --class-label 8 -o out.png
    """
    import time

    from lehr.runtime import picture
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.pipeline import Pipeline, Request, open_denoiser
    from lehr.runtime.stored_tables import StoredTables
    from lehr.runtime.whole_loop import WholeLoop

    picture.check_output(output, (".png", ".npz"))
    if classifier_scale is not None and classifier is None:
        raise click.UsageError("--classifier-scale needs --classifier.")
    guidance = _guidance(
        guidance_interval, guidance_rescale, _projection(guidance_projection, apg_parallel, apg_norm, apg_momentum)
    )
    progress = Progress()
    if whole_loop and (guide is not None or classifier is not None):
        raise click.UsageError("--whole-loop draws with one graph; it goes without --guide and --classifier.")
    spec = Bundle.open(bundle).manifest.model
    channels = spec.sample_shape(1)[1]
    request = Request(
        num=num,
        seed=seed,
        sampler=sampler,
        num_inference_steps=steps,
        eta=eta,
        guidance_scale=guidance_scale,
        guidance=guidance,
        classifier_scale=1.0 if classifier_scale is None else classifier_scale,
        class_labels=class_labels,
        batch=batch,
        init=None if init is None else picture.load(init, channels, spec.value_range),
        strength=strength,
        mask=None if mask is None else picture.load(mask, 1, (0.0, 1.0)),
    )
    if output.suffix.lower() == ".png":
        picture.check_channels(spec.sample_shape(1))
    if whole_loop:
        loop = WholeLoop.open(bundle, target=target, recipe=recipe)
        name, evaluations = loop.settings.sampler, loop.settings.evaluations
        started = time.monotonic()
        samples = loop(request)
    else:
        pipeline = Pipeline(
            open_denoiser(bundle, target=target, recipe=recipe),
            guide=None if guide is None else open_denoiser(guide, target=target, recipe=recipe),
            classifier=None if classifier is None else open_denoiser(classifier, target=target, recipe=recipe),
            tables=StoredTables(Bundle.open(bundle)),
        )
        table = pipeline.table(request)
        name, evaluations = table.sampler, len(table)
        total = evaluations * -(-request.count // batch)

        def on_progress(first: int, evaluation: int) -> None:
            progress.steps(first // batch * evaluations + evaluation + 1, total, "step")

        started = time.monotonic()
        samples = pipeline(request, on_progress=on_progress)
    seconds = time.monotonic() - started
    if output.suffix.lower() == ".png":
        picture.save_png(output, picture.grid(picture.to_bytes(samples, spec.value_range)))
    else:
        picture.save_npz(output, samples)
    data = {
        "output": str(output),
        "shape": list(samples.shape),
        "sampler": name,
        "evaluations": evaluations,
        "seed": seed,
        "seconds": round(seconds, 3),
    }
    emit(
        as_json,
        data,
        f"{output}: {len(samples)} samples, {name} with {evaluations} evaluations, {seconds:.2f} s",
    )


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
