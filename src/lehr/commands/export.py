"""``lehr export``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lehr.commands._output import Progress, emit, json_option


@click.command("export")
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle to make: NAME.lehr.")
@click.option("--preset", help="Which preset a checkpoint is, where its tensors fit several; see lehr list presets.")
@click.option("--allow-pickle", is_flag=True, help="Read .bin, .ckpt, .pt and .pth files, the tensors in them alone.")
@click.option("--seed", default=0, show_default=True, help="Of random weights, where a preset has no trained ones.")
@click.option("--structure-only", is_flag=True, help="The graph without weights; nothing can be built from it.")
@click.option(
    "--golden",
    type=click.Choice(["none", "steps", "full"]),
    help="Eager results to record for lehr verify.  [default: full up to 200M parameters, steps up to 2B]",
)
@click.option(
    "--steps",
    metavar="N,N,…",
    help="Numbers of steps at which a diffusers folder's own scheduler is traced for lehr run.  [default: the model's]",
)
@click.option("--no-split", is_flag=True, help="One graph, not cut by how often its parts must run.")
@click.option("--unroll", type=click.IntRange(1), metavar="N", help="Also write a loop of N steps out as one graph.")
@click.option("--sampler", help="Of the loop that --unroll writes out.  [default: the model's]")
@click.option("--guidance-scale", type=float, help="Of the loop that --unroll writes out.  [default: the model's]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of eager runs.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@json_option
def command(
    source: str,
    output: Path,
    preset: str | None,
    allow_pickle: bool,
    seed: int,
    structure_only: bool,
    golden: str | None,
    steps: str | None,
    no_split: bool,
    unroll: int | None,
    sampler: str | None,
    guidance_scale: float | None,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export a denoiser from PyTorch into a new bundle.

    SOURCE is a preset (with its shipped trained weights, else random ones), a checkpoint (a diffusers folder, or a
    single .safetensors file whose architecture is recognised), or FILE.py:FACTORY, a function that returns a
    torch.nn.Module and its lehr.runtime.ModelSpec.

    \b
    Examples:
      lehr export digits-dit -o d.lehr
      lehr export stable-diffusion-v1-5/unet -o sd.lehr --golden none
      lehr export stable-diffusion-v1-5 -o sd.lehr --steps 20,30,50
      lehr export my_model.py:make -o mine.lehr --golden steps
      lehr export digits-dit -o d.lehr --unroll 4 --sampler dpmpp_2m
    """
    from lehr.runtime.errors import InvalidInput, MissingExtra
    from lehr.runtime.stored_tables import parse_steps

    wanted = None if steps is None else parse_steps(steps)
    if sys.version_info < (3, 11):
        raise InvalidInput("lehr export needs Python 3.11 or newer; export on another machine and copy the bundle.")
    try:
        from lehr.export.checkpoints.files import Pickles
        from lehr.export.graphs import Cut
        from lehr.export.package import Options, export
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "torch", "export") from e
    from lehr.runtime.golden import Tier

    options = Options(
        preset=preset,
        seed=seed,
        structure_only=structure_only,
        tier=None if golden is None else Tier(golden),
        device=device,
        overwrite=overwrite,
        pickles=Pickles.ALLOWED if allow_pickle else Pickles.REFUSED,
        cut=Cut.NONE if no_split else Cut.RATE,
        unroll=unroll,
        sampler=sampler,
        guidance_scale=guidance_scale,
        steps=wanted,
        command=("lehr", "export", source),
    )
    summary = export(source, output, options, progress=Progress())
    emit(
        as_json,
        summary.to_json(),
        f"{output}: {summary.parameters:,} parameters, {summary.nodes} operators, golden data: {summary.golden}, "
        f"route: {summary.route}, {summary.seconds:.1f} s, {summary.peak_rss_mb:.0f} MB peak memory\n"
        f"{_scheduler(summary.scheduler)}"
        f"Next: lehr build {output} --target cpu",
    )


def _scheduler(found: Mapping[str, Any] | None) -> str:
    """What became of the source's own scheduler; "" where it has none."""
    if found is None:
        return ""
    stored = ", ".join(str(steps) for steps in found["steps"])
    lines = [f"{found['class']}: tables for {stored} steps, used by lehr run"] if stored else []
    lines += [f"{found['class']}: no table for {steps} steps: {why}" for steps, why in found["skipped"].items()]
    return "".join(f"{line}\n" for line in lines)
