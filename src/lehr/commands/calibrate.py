"""``lehr calibrate``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import Progress, bundle_argument, emit, json_option, table
from lehr.commands._stages import DENOISER

if TYPE_CHECKING:
    from lehr.calibration.calibrate import Calibration, Data
    from lehr.calibration.ends import EndAsked
    from lehr.calibration.stage_feeds import StageData
    from lehr.runtime.recipe import Recipe

_RESTS = ("fp32", "bf16", "fp16")
_OF_LOOPS = ("budget", "target", "costs", "held_out", "features", "time_limit", "first", "last")  # for no stage beside


@click.command("calibrate")
@bundle_argument
@click.option("--recipe", help="A quantised recipe; see lehr list recipes.")
@click.option("--stage", metavar="NAME", default=DENOISER, show_default=True, help="The stage to calibrate.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="With --stage: text file in UTF-8, a prompt a line.  [default: a built-in list of plain prompts]",
)
@click.option("--budget", help="Instead of a recipe the loss to keep, as psnr>=35, ssim>=0.98, sqnr>=40, fid<=1.")
@click.option("--target", help="With --budget: the class of machine whose formats and costs count.  [default: a CPU]")
@click.option(
    "--costs",
    default="static",
    show_default=True,
    type=click.Choice(("static", "measured")),
    help="With --budget: layers cost what a model of the target says, or what they take on this machine.",
)
@click.option(
    "--held-out", default=64, show_default=True, type=click.IntRange(16, 1 << 14), help="Samples to judge by."
)
@click.option(
    "--features",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="With a budget on fid: ONNX file of the feature network.  [default: one that comes with Lehr, if any fits]",
)
@click.option("--time-limit", default=600.0, show_default=True, type=click.FloatRange(1.0), help="Seconds of search.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Recorded inputs of the denoiser or the stage, FILE.npz or a folder of them; of a vae_encoder also pictures.  "
    "[default: drawn by the model's own sampler]",
)
@click.option(
    "--num",
    default=32,
    type=click.IntRange(1),
    help="Samples drawn for calibration.  [default: 32; for a vae_decoder or vae_encoder 8]",
)
@click.option("--steps", type=click.IntRange(1), help="Steps of the sampler.  [default: the model's own]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, (1 << 31) - 1), help="Of those samples.")
@click.option("--rest", type=click.Choice(_RESTS), help="Arithmetic of what is not quantised.  [default: the recipe's]")
@click.option("--first", metavar="K:RECIPE", help="Another recipe for the first K steps of a loop, such as 2:bf16.")
@click.option("--last", metavar="K:RECIPE", help="Another recipe for the last K steps of a loop, such as 3:fp32.")
@click.option("--name", help="Keep the result under this name.  [default: the recipe's]")
@click.option(
    "--trajectories",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where calibration data is kept between runs.  [default: the user's cache]",
)
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0: one a core.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    recipe: str | None,
    stage: str,
    prompts: Path | None,
    budget: str | None,
    target: str | None,
    costs: str,
    held_out: int,
    features: Path | None,
    time_limit: float,
    data: Path | None,
    num: int,
    steps: int | None,
    seed: int,
    rest: str | None,
    first: str | None,
    last: str | None,
    name: str | None,
    trajectories: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Find the scales of a quantised recipe, and keep its graph in the bundle.

    Draws samples in fp32, guidance included, and keeps every evaluation's inputs; an interrupted run goes on where it
    was. The same bundle, data and options give the same bytes (calibration/RECIPE/).

    --first and --last give steps at the ends of a loop to other recipes; then RECIPE may also be one that needs no
    calibration, and --name is needed.

    --stage calibrates a text encoder with prompts, a decoder with the latents that the pipeline draws, an encoder with
    its pictures, and keeps the result in stages/STAGE/calibration/RECIPE/; build it with --stage-recipe.

    With --budget it searches for the cheapest mixture of formats, layer by layer, whose final samples on held-out seeds
    keep the budget, and stores it as recipe "mixed". Exit code 1 if there is none.

    \b
    Examples:
      lehr calibrate d.lehr --recipe int8-sq && lehr build d.lehr --recipe int8-sq
      lehr calibrate d.lehr --recipe int8-sq --rest bf16 --name int8-fast
      lehr calibrate d.lehr --recipe int8-sq --last 3:fp32 --name int8-late
      lehr calibrate d.lehr --recipe fp8 --data recorded/ --json
      lehr calibrate d.lehr --budget "psnr>=35" && lehr build d.lehr --recipe mixed
      lehr calibrate p.lehr --stage text_encoder --recipe int8-weight
      lehr calibrate p.lehr --stage vae_decoder --recipe int8-sq --prompts mine.txt --num 4
    """
    from lehr.runtime.errors import MissingExtra

    try:
        from lehr.calibration.calibrate import Data
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e

    source = Data(path=data, num=num, steps=steps, seed=seed, folder=trajectories, threads=threads)
    if prompts is not None and stage == DENOISER:
        raise click.UsageError("--prompts goes with --stage; the denoiser is calibrated with what was recorded.")
    if (recipe is None) == (budget is None):
        raise click.UsageError(
            "what is to be calibrated? Give --recipe, one of those that lehr list recipes shows, or --budget, the loss "
            "to keep."
        )
    if stage != DENOISER:
        given = _given(ctx)
        if odd := [name for name in _OF_LOOPS if name in given]:
            raise click.UsageError(f"--{odd[0].replace('_', '-')} is for the denoiser, not for stage {stage!r}.")
        from lehr.calibration.stage_feeds import StageData

        _stage(
            bundle,
            stage,
            str(recipe),
            StageData(
                path=data,
                prompts=prompts,
                num=num if "num" in given else None,
                steps=steps,
                seed=seed if "seed" in given else None,
                folder=trajectories,
                threads=threads,
            ),
            rest,
            name,
            as_json,
        )
        return
    if budget is not None and (first is not None or last is not None):
        raise click.UsageError("--first and --last go with --recipe; a search finds by itself what the ends need.")
    if budget is not None:
        from lehr.commands._budget import Asked, by_budget

        asked = Asked(
            budget=budget,
            target=target,
            costs=costs,
            held_out=held_out,
            time_limit=time_limit,
            rest=rest,
            name=name,
            steps=steps,
            features=features,
        )
        by_budget(bundle, asked, source, as_json)
        return
    if target is not None or costs != "static" or features is not None:
        raise click.UsageError(
            "--target, --costs and --features go with --budget; a recipe's graph is the same for every target."
        )
    from lehr.calibration.ends import parse_end

    ends = {end: parse_end(text) for end, text in (("first", first), ("last", last)) if text is not None}
    _by_recipe(bundle, str(recipe), source, rest, name, ends, as_json)


def _given(ctx: click.Context) -> set[str]:
    """Names of the options that were given, and not left at their defaults."""
    default = click.core.ParameterSource.DEFAULT
    names = {parameter.name or "" for parameter in ctx.command.params}
    return {name for name in names if ctx.get_parameter_source(name) is not default}


def _stage(
    bundle: Path, stage: str, recipe: str, source: StageData, rest: str | None, name: str | None, as_json: bool
) -> None:
    from lehr.calibration.stage_calibrate import calibrate_stage
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.recipe import Format

    progress = Progress()
    progress(f"calibrating stage {stage} of {bundle} for {recipe}")
    made = calibrate_stage(
        Bundle.open(bundle),
        stage,
        recipe,
        data=source,
        rest=None if rest is None else Format(rest),
        stored_as=name,
        on_step=lambda what, done, total: progress.steps(done, total, what),
    )
    emit(as_json, {"stage": stage, **data_of(made)}, _prose(made, bundle, stage))


def _by_recipe(
    bundle: Path,
    recipe: str,
    source: Data,
    rest: str | None,
    name: str | None,
    ends: dict[str, EndAsked],
    as_json: bool,
) -> None:
    from lehr.calibration.calibrate import calibrate
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.recipe import Format

    progress = Progress()
    progress(f"calibrating {bundle} for {recipe}")
    opened = Bundle.open(bundle)
    made = calibrate(
        opened,
        recipe,
        data=source,
        rest=None if rest is None else Format(rest),
        stored_as=name,
        ends=ends,
        on_step=lambda what, done, total: progress.steps(done, total, f"{what}, evaluation"),
    )
    emit(as_json, data_of(made), _prose(made, bundle))


def data_of(made: Calibration) -> dict[str, Any]:
    """The fields of ``--json``."""
    return {
        "recipe": made.recipe.name,
        "weights": made.recipe.weights.value,
        "arithmetic": made.recipe.arithmetic.value,
        "rest": made.recipe.rest.value,
        "layers": made.layers,
        "quantised": len(made.plan),
        "weight_bytes": made.weight_bytes,
        "portable_bytes": made.portable_bytes,
        "statistics": made.digest,
        "files": dict(made.files),
        "schedule": None if made.recipe.schedule is None else schedule_of(made.recipe),
    }


def schedule_of(recipe: Recipe) -> dict[str, Any]:
    """End of a loop -> steps and recipe."""
    ends = {} if recipe.schedule is None else {"first": recipe.schedule.ends.first, "last": recipe.schedule.ends.last}
    return {name: {"steps": ends[name], "recipe": part.name} for name, part in recipe.parts.items()}


def _prose(made: Calibration, bundle: Path, stage: str | None = None) -> str:
    kinds = Counter(type(config).__name__ for config in made.plan.values())
    rows = [(name, count) for name, count in sorted(kinds.items())]
    rows.append(("as before", made.layers - len(made.plan)))
    share = made.weight_bytes / max(made.portable_bytes, 1)
    name = made.recipe.name
    schedule = "" if made.recipe.schedule is None else f"{made.recipe.schedule}.\n"
    options = f"--recipe {name}" if stage is None else f"--stage {stage} --stage-recipe {stage}={name}"
    graph = "the step graph" if stage is None else f"stage {stage}"
    told = (
        f"{schedule}recipe {name}: {made.weight_bytes / 1e6:,.1f} MB of weights in {graph}, {share:.2f} of what "
        f"they were; what is not quantised computes in {made.recipe.rest.value}.\n"
        f"Next: lehr build {bundle} {options} && lehr verify {bundle} {options}"
    )
    return "\n\n".join((table(("quantised as", "layers"), rows), told))
