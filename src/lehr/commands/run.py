"""``lehr run``."""

from __future__ import annotations

from pathlib import Path

import click

from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option


@click.command("run")
@bundle_argument
@engine_options
@click.option("--sampler", help="One of lehr list samplers.  [default: the model's own]")
@click.option("--steps", type=int, help="Number of sampler steps.  [default: the model's own, 20 as a rule]")
@click.option("--eta", default=0.0, show_default=True, help="Share of ancestral noise, for samplers that take it.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the noise.")
@click.option("--num", type=click.IntRange(1), help="How many samples.  [default: one a label, or 1]")
@click.option("--class-label", "class_labels", type=int, multiple=True, help="Class to draw; repeat for several.")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 is none.  [default: the model's own]")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1, 512), help="Samples drawn at once.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="OUT.png or OUT.npz.")
@json_option
def command(
    bundle: Path,
    target: str,
    recipe: str,
    sampler: str | None,
    steps: int | None,
    eta: float,
    seed: int,
    num: int | None,
    class_labels: tuple[int, ...],
    guidance_scale: float | None,
    batch: int,
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
    """
    import time

    from lehr.runtime import picture
    from lehr.runtime.loop import Step
    from lehr.runtime.pipeline import Pipeline, Request

    picture.check_output(output, (".png", ".npz"))
    progress = Progress()
    pipeline = Pipeline.open(bundle, target=target, recipe=recipe)
    request = Request(
        num=num,
        seed=seed,
        sampler=sampler,
        num_inference_steps=steps,
        eta=eta,
        guidance_scale=guidance_scale,
        class_labels=class_labels,
        batch=batch,
    )
    table = pipeline.table(request)
    spec = pipeline.denoiser.spec
    if output.suffix.lower() == ".png":
        picture.check_channels(spec.sample_shape(1))
    total = len(table) * -(-(num or max(1, len(class_labels))) // batch)

    def on_step(first: int, step: Step) -> None:
        progress.steps(first // batch * len(table) + step.index + 1, total, "step")

    started = time.monotonic()
    samples = pipeline(request, on_step=on_step)
    seconds = time.monotonic() - started
    if output.suffix.lower() == ".png":
        picture.save_png(output, picture.grid(picture.to_bytes(samples, spec.value_range)))
    else:
        picture.save_npz(output, samples)
    data = {
        "output": str(output),
        "shape": list(samples.shape),
        "sampler": table.sampler,
        "evaluations": len(table),
        "seed": seed,
        "seconds": round(seconds, 3),
    }
    emit(
        as_json,
        data,
        f"{output}: {len(samples)} samples, {table.sampler} with {len(table)} evaluations, {seconds:.2f} s",
    )
