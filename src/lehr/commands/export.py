"""``lehr export``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lehr.commands._output import Progress, emit, json_option


@click.command("export")
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle to make: NAME.lehr.")
@click.option(
    "--layout",
    type=click.Choice(["bundle", "optimum"]),
    default="bundle",
    show_default=True,
    help="A bundle, or a pipeline's folder of ONNX graphs as Optimum's ORTDiffusionPipeline loads it.",
)
@click.option("--denoiser-only", is_flag=True, help="Leave out text encoders and autoencoder, where SOURCE has them.")
@click.option(
    "--text-encoder",
    "text_encoders",
    metavar="[STAGE=]PATH",
    multiple=True,
    help="A text encoder that SOURCE lacks, or another one: a folder or file, one option each.",
)
@click.option(
    "--tokenizer",
    "tokenizers",
    metavar="[STAGE=]PATH",
    multiple=True,
    help="The tokenizer of a text encoder: a folder. A single file never holds one.",
)
@click.option("--vae", type=click.Path(path_type=Path), help="The autoencoder, where SOURCE lacks it, or another one.")
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:SCALE]",
    multiple=True,
    help="Merge a LoRA into the weights, of text encoders too; repeat for several.  [default: scale 1]",
)
@click.option(
    "--controlnet",
    "controlnets",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A ControlNet for SOURCE, a folder or file, as a stage of its own; repeat for several.",
)
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
    layout: str,
    denoiser_only: bool,
    text_encoders: tuple[str, ...],
    tokenizers: tuple[str, ...],
    vae: Path | None,
    loras: tuple[str, ...],
    controlnets: tuple[Path, ...],
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
    """Export a denoiser from PyTorch into a new bundle, with the rest of its pipeline where SOURCE has it.

    SOURCE is a preset (with its shipped trained weights, else random ones), a checkpoint (a diffusers folder, or a
    single .safetensors file whose architecture is recognised), or FILE.py:FACTORY, a function that returns a
    torch.nn.Module and its lehr.runtime.ModelSpec.

    A folder whose model_index.json names text encoders or an autoencoder is exported whole: every text encoder with
    its tokenizer, both halves of the autoencoder, and the pipeline's conventions. So is a single file that holds them,
    once --tokenizer names the vocabulary, which no such file holds, and a file with a denoiser alone, once
    --text-encoder, --tokenizer and --vae name the rest. Everything else is exported as a denoiser alone. Nothing is
    downloaded.

    \b
    Examples:
      lehr export digits-dit -o d.lehr
      lehr export stable-diffusion-v1-5/unet -o sd.lehr --golden none
      lehr export stable-diffusion-v1-5 -o sd.lehr --steps 20,30,50
      lehr export sd_xl_base_1.0.safetensors -o xl.lehr --tokenizer sdxl/tokenizer
      lehr export flux1-dev.safetensors -o f.lehr --denoiser-only
      lehr export stable-diffusion-v1-5 -o sd.lehr --lora style.safetensors:0.8 --controlnet sd-controlnet-canny
      lehr export my_model.py:make -o mine.lehr --golden steps
      lehr export digits-dit -o d.lehr --unroll 4 --sampler dpmpp_2m
      lehr export stable-diffusion-v1-5 -o sd-onnx --layout optimum
    """
    from lehr.runtime.errors import InvalidInput, MissingExtra
    from lehr.runtime.stored_tables import parse_steps

    if layout == "optimum":
        _lay_out(Path(source), output, allow_pickle=allow_pickle, overwrite=overwrite, as_json=as_json)
        return
    wanted = None if steps is None else parse_steps(steps)
    if denoiser_only and (text_encoders or tokenizers or vae is not None):
        raise InvalidInput(
            "--denoiser-only leaves out what --text-encoder, --tokenizer and --vae name; give one or the other."
        )
    if sys.version_info < (3, 11):
        raise InvalidInput("lehr export needs Python 3.11 or newer; export on another machine and copy the bundle.")
    try:
        from lehr.export.adapters import Adapters
        from lehr.export.checkpoints.files import Pickles
        from lehr.export.graphs import Cut
        from lehr.export.package import Options, export
        from lehr.export.pipelines.parts import Parts
        from lehr.export.pipelines.read import Extent
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
        extent=Extent.DENOISER if denoiser_only else Extent.WHOLE,
        adapters=Adapters(loras=loras, controlnets=controlnets),
        parts=Parts(text_encoders=text_encoders, tokenizers=tokenizers, vae=vae),
        command=("lehr", "export", source),
    )
    summary = export(source, output, options, progress=Progress())
    emit(
        as_json,
        summary.to_json(),
        f"{output}: {summary.parameters:,} parameters, {summary.nodes} operators, golden data: {summary.golden}, "
        f"route: {summary.route}, {summary.seconds:.1f} s, {summary.peak_rss_mb:.0f} MB peak memory\n"
        f"{_scheduler(summary.scheduler)}"
        f"{_pipeline(summary.pipeline, summary.stages, summary.left_out)}"
        f"Next: lehr build {output} --target cpu",
    )


_OF_OPTIMUM = {"source", "output", "layout", "allow_pickle", "overwrite", "as_json"}


def _lay_out(source: Path, output: Path, *, allow_pickle: bool, overwrite: bool, as_json: bool) -> None:
    """Write an ONNX folder; options that only bundles have are refused."""
    from click.core import ParameterSource

    from lehr.runtime.errors import InvalidInput, MissingExtra

    context = click.get_current_context()
    given = {
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _OF_OPTIMUM
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    }
    if given:
        raise InvalidInput(f"{', '.join(sorted(given))} shapes a bundle; leave it out with --layout optimum.")
    try:
        from lehr.export.checkpoints.files import Pickles
        from lehr.export.layout_optimum import lay_out
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "torch", "export") from e
    pickles = Pickles.ALLOWED if allow_pickle else Pickles.REFUSED
    made = lay_out(source, output, pickles=pickles, overwrite=overwrite, progress=Progress())
    graphs = ", ".join(f"{name} ({nodes} operators)" for name, nodes in made.nodes.items())
    emit(
        as_json,
        made.to_json(),
        f"{output}: {graphs}, {made.seconds:.1f} s\n"
        f"Next, with optimum-onnx: ORTDiffusionPipeline.from_pretrained({str(output)!r})",
    )


def _scheduler(found: Mapping[str, Any] | None) -> str:
    """What became of the source's own scheduler; "" where it has none."""
    if found is None:
        return ""
    stored = ", ".join(str(steps) for steps in found["steps"])
    lines = [f"{found['class']}: tables for {stored} steps, used by lehr run"] if stored else []
    lines += [f"{found['class']}: no table for {steps} steps: {why}" for steps, why in found["skipped"].items()]
    return "".join(f"{line}\n" for line in lines)


def _pipeline(name: str | None, stages: Mapping[str, int], left_out: Sequence[str]) -> str:
    """What stands beside the denoiser; "" where it stands alone."""
    if name is None:
        return ""
    listed = ", ".join(f"{stage} ({parameters:,} parameters)" for stage, parameters in stages.items())
    without = f"; left out: {', '.join(left_out)}" if left_out else ""
    return f"{name}: {listed}{without}\n"
