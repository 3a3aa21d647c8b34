"""``lehr build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lehr.commands._build_settings import settings, settings_options
from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option, table

if TYPE_CHECKING:
    from lehr.runtime.engine import EngineRecord
    from lehr.runtime.verify import Verdict


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
@settings_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    target: str,
    recipe: str,
    library: str,
    threads: int,
    batch: str,
    sizes: str,
    workspace: int,
    tactic_memory: int,
    effort: int | None,
    compatible: str,
    weights: str,
    mode: str,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Build an engine for a target into a bundle.

    Engines for RTX GPUs are built ahead of time, on any Linux x86-64 machine with the extra trt-rtx. For targets that
    build on themselves, such as Jetson, a build kit is written into the bundle elsewhere; the same command finishes it
    there, without ONNX, and verifies it.

    Where several engine libraries are installed that can build the recipe, all are tried on the golden inputs and
    the fastest that meets parity is kept. The engine replaces those of the same target and recipe.

    \b
    Examples:
      lehr build d.lehr --target cpu
      lehr build d.lehr --target cpu --recipe bf16 --library openvino
      lehr build d.lehr --target cpu --threads 4 --json
      lehr build d.lehr --target rtx-40 --recipe fp16
      lehr build d.lehr --target rtx-40 --recipe fp16 --batch 1,2,8
      lehr build d.lehr --target orin-agx --recipe fp16      # here a kit, on the Jetson the engine
    """
    from lehr.engines import target as targets
    from lehr.engines.build import build
    from lehr.engines.kit import check_options, elsewhere
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.calibrated import recipe_of

    chosen_recipe = recipe_of(Bundle.open(bundle), recipe)
    progress = Progress()
    chosen = settings(
        batch=batch,
        sizes=sizes,
        workspace=workspace,
        tactic_memory=tactic_memory,
        effort=effort,
        compatible=compatible,
        weights=weights,
        mode=mode,
        no_cache=no_cache,
    )
    if elsewhere(targets.target(target), chosen_recipe, library):
        progress(f"{target} builds on its own machine: preparing a build kit")
        check_options(targets.target(target), chosen_recipe, library, chosen)
        _emit_kit(bundle, target, recipe, _options(ctx), as_json)
        return
    progress(f"building {bundle} for {target} in {recipe}")
    record = build(
        bundle,
        targets.target(target),
        chosen_recipe,
        library=library,
        threads=threads,
        progress=progress,
        settings=chosen,
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
    verdict = _verified(bundle, record)
    if verdict is not None:
        data["verified"] = verdict.to_json()
    tried = ""
    if record.candidates:
        tried = table(("library", "step, ms", "score error", "verdict"), _rows(record)) + "\n\n"
    emit(
        as_json,
        data,
        f"{tried}{bundle}/{record.folder}: {_made(record)}, {record.seconds:.1f} s\n{_next(bundle, record, verdict)}",
    )
    if verdict is not None and not verdict.passed:
        raise click.exceptions.Exit(1)


def _options(ctx: click.Context) -> list[str]:
    """What was asked for beside target and recipe, as it is to be asked for on the device again."""
    given = []
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in ("bundle", "target", "recipe", "as_json"):
            continue
        if ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            continue
        value = ctx.params[name]
        if isinstance(value, bool):
            given.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, tuple) else (value,):
            given += [parameter.opts[0], str(one)]
    return given


def _emit_kit(bundle: Path, target: str, recipe: str, options: list[str], as_json: bool) -> None:
    """Write a build kit instead of an engine, and say who must finish it."""
    from lehr.engines import target as targets
    from lehr.engines.build import build_kit
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.calibrated import recipe_of

    record = build_kit(bundle, targets.target(target), recipe_of(Bundle.open(bundle), recipe), options=options)
    manifest = Bundle.open(bundle).manifest
    size = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(f"{record.folder}/"))
    data = {
        "target": record.target,
        "recipe": record.recipe,
        "library": record.library,
        "engine": None,
        "kit": record.folder,
        "bytes": size,
        "command": list(record.command),
    }
    versions = f" {record.library_versions}" if record.library_versions else ""
    emit(
        as_json,
        data,
        f"{bundle}/{record.folder}: a build kit, {size / 1e6:,.1f} MB. It is no engine yet: the {record.target} must "
        f"finish it with {record.library}{versions}.\n"
        f"Next: lehr pack {bundle} --target {record.target} --recipe {record.recipe} --golden, copy and unpack it "
        f"there, and run there: {' '.join(record.command)}",
    )


def _verified(bundle: Path, record: EngineRecord) -> Verdict | None:
    """An engine that was finished from a kit, held against the golden data; None for others, or where there is none."""
    from lehr.runtime.backends import backends
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.kits import find_kit
    from lehr.runtime.verify import record_parity, verify

    opened = Bundle.open(bundle)
    kit = find_kit(opened, record.target, record.recipe)
    if kit is None or kit.library != record.library or record.library not in backends():
        return None
    if opened.manifest.golden_tier == "none":
        return None
    verdict = verify(opened, record)
    record_parity(opened, verdict)
    return verdict


def _made(record: EngineRecord) -> str:
    """What the engine consists of, as far as that can be known here."""
    if not record.operators:
        return f"{len(record.plans)} graphs, precision unknown (only the target itself could tell)"
    shares = ", ".join(f"{share:.0%} {name}" for name, share in record.achieved_precision.items())
    return f"{sum(record.operators.values())} operators, {shares}"


def _next(bundle: Path, record: EngineRecord, verdict: Verdict | None) -> str:
    from lehr.runtime.backends import backends

    if record.library not in backends():
        return (
            f"Lehr has no runtime backend for {record.library} yet: it builds this engine and cannot run or verify it."
        )
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import differences

    if wrong := differences(Bundle.open(bundle), record):
        return f"This machine cannot run or verify it: {'; '.join(wrong)}."
    if verdict is not None:
        reasons = "; ".join(f"{name} {level.reason}" for name, level in verdict.levels.items())
        return f"{'verified' if verdict.passed else 'NOT within parity'}: {reasons}"
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
