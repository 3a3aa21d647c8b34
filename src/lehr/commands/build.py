"""``lehr build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option, table

if TYPE_CHECKING:
    from lehr.runtime.engine import EngineRecord


@click.command("build")
@bundle_argument
@engine_options
@click.option("--library", default="auto", show_default=True, help="Engine library; auto measures those installed.")
@click.option(
    "--threads",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Of the engine or, for GPUs, of its build; 0: one a core.",
)
@json_option
def command(bundle: Path, target: str, recipe: str, library: str, threads: int, as_json: bool) -> None:
    """Build an engine for a target into a bundle.

    Engines for RTX GPUs are built ahead of time, on any Linux x86-64 machine with the extra trt-rtx.

    Where several engine libraries are installed that can build the recipe, all are tried on the golden inputs and
    the fastest that meets parity is kept. The engine replaces those of the same target and recipe.

    \b
    Examples:
      lehr build d.lehr --target cpu
      lehr build d.lehr --target cpu --recipe bf16 --library openvino
      lehr build d.lehr --target cpu --threads 4 --json
      lehr build d.lehr --target rtx-40 --recipe fp16
    """
    from lehr.engines import target as targets
    from lehr.engines.build import build
    from lehr.runtime.recipe import recipe as find_recipe

    progress = Progress()
    progress(f"building {bundle} for {target} in {recipe}")
    record = build(
        bundle, targets.target(target), find_recipe(recipe), library=library, threads=threads, progress=progress
    )
    data = {
        "target": record.target,
        "recipe": record.recipe,
        "library": record.library,
        "seconds": record.seconds,
        "peak_rss_mb": record.peak_rss_mb,
        "engine": record.folder,
        "achieved_precision": dict(record.achieved_precision),
        "candidates": [dict(row) for row in record.candidates],
    }
    tried = ""
    if record.candidates:
        tried = table(("library", "step, ms", "score error", "verdict"), _rows(record)) + "\n\n"
    emit(
        as_json,
        data,
        f"{tried}{bundle}/{record.folder}: {_made(record)}, {record.seconds:.1f} s\n{_next(bundle, record)}",
    )


def _made(record: EngineRecord) -> str:
    """What the engine consists of, as far as that can be known here."""
    if not record.operators:
        return f"{len(record.plans)} graphs, precision unknown (only the target itself could tell)"
    shares = ", ".join(f"{share:.0%} {name}" for name, share in record.achieved_precision.items())
    return f"{sum(record.operators.values())} operators, {shares}"


def _next(bundle: Path, record: EngineRecord) -> str:
    from lehr.runtime.backends import backends

    if record.library not in backends():
        return (
            f"Lehr has no runtime backend for {record.library} yet: it builds this engine and cannot run or verify it."
        )
    return f"Next: lehr verify {bundle} --target {record.target} --recipe {record.recipe}"


def _rows(record: EngineRecord) -> list[tuple[str, str, str, str]]:
    """What was tried, for people."""
    return [
        (
            row["library"],
            "-" if row["step_ms"] is None else f"{row['step_ms']:.2f}",
            "-" if row["max_rel_error"] is None else f"{row['max_rel_error']:.1e}",
            "kept" if row["library"] == record.library else "slower" if row["passed"] else row["reason"] or "no parity",
        )
        for row in record.candidates
    ]
