"""``lehr build``."""

from __future__ import annotations

from pathlib import Path

import click

from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option


@click.command("build")
@bundle_argument
@engine_options
@click.option("--library", default="auto", show_default=True, help="Engine library, or auto for the target's first.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="Of the engine; 0: one a core.")
@json_option
def command(bundle: Path, target: str, recipe: str, library: str, threads: int, as_json: bool) -> None:
    """Build an engine for a target into a bundle.

    \b
    Examples:
      lehr build d.lehr --target cpu
      lehr build d.lehr --target cpu --threads 4 --json
    """
    from lehr.engines import target as targets
    from lehr.engines.build import build
    from lehr.runtime.recipe import recipe as find_recipe

    progress = Progress()
    progress(f"building {bundle} for {target} in {recipe}")
    record = build(bundle, targets.target(target), find_recipe(recipe), library=library, threads=threads)
    data = {
        "target": record.target,
        "recipe": record.recipe,
        "library": record.library,
        "seconds": record.seconds,
        "peak_rss_mb": record.peak_rss_mb,
        "engine": record.folder,
        "achieved_precision": dict(record.achieved_precision),
    }
    shares = ", ".join(f"{share:.0%} {name}" for name, share in record.achieved_precision.items())
    emit(
        as_json,
        data,
        f"{bundle}/{record.folder}: {sum(record.operators.values())} operators, {shares}, {record.seconds:.1f} s\n"
        f"Next: lehr verify {bundle} --target {target} --recipe {recipe}",
    )
