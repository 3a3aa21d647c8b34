"""From graphs to an engine in a bundle: several libraries compile, one is chosen, what was made is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lehr.engines.choose import Candidate, Measured, fastest
from lehr.engines.target import Target
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord, Plan, engine_folder, engine_folders
from lehr.runtime.errors import BuildFailed
from lehr.runtime.host import host, peak_rss_mb
from lehr.runtime.recipe import Recipe


def _alone(_: Candidate) -> Sequence[Candidate]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an engine is made of: the denoiser or one stage.

    Attributes:
        stage: its name; None for the denoiser.
        compile: every graph, with one library into one folder; raises BuildFailed.
        measure: engines of several libraries against each other.
        sources: SHA-256 of what a library's engine is made from, by file.
        variants: other ways to run what a library has compiled, which are measured as well.
    """

    stage: str | None
    compile: Callable[[str, Path], Mapping[str, Plan]]
    measure: Callable[[list[Candidate]], list[Measured]]
    sources: Callable[[str], Mapping[str, str]]
    variants: Callable[[Candidate], Sequence[Candidate]] = field(default=_alone)


def make_engine(
    bundle: Bundle, work: Work, target: Target, recipe: Recipe, versions: Mapping[str, str]
) -> EngineRecord:
    """Compile with each library, keep the fastest engine that meets parity, and record it.

    Args:
        bundle: that gets the engine; older ones of this target and recipe are replaced.
        work: see there.
        target: of the engine.
        recipe: of the engine.
        versions: of the libraries to try, best first.

    Raises:
        BuildFailed: no library can build it, or none meets parity.
    """
    started = time.monotonic()
    with bundle.edit() as edit:
        replaced = set(engine_folders(bundle, target.name, recipe.name, work.stage))
        for old in replaced:
            edit.remove(old)
        edit.set_manifest(parity={k: v for k, v in bundle.manifest.parity.items() if k not in replaced})
        folders = {
            name: engine_folder(target.name, recipe.name, name, version, work.stage)
            for name, version in versions.items()
        }
        built, failed = _compiled(work, {name: edit.folder(folder) for name, folder in folders.items()})
        chosen, rows = _chosen(work, recipe, built, failed)
        for name in versions:
            if name != chosen.library:
                edit.remove(folders[name])
        record = EngineRecord(
            target=target.name,
            recipe=recipe.name,
            recipe_version=recipe.version,
            library=chosen.library,
            library_version=versions[chosen.library],
            host=_host(target),
            sources=work.sources(chosen.library),
            plans=chosen.plans,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_mb=round(max(peak_rss_mb(), *(_peak(plan) for plan in chosen.plans.values())), 1),
            candidates=tuple(row.to_json() for row in rows),
            ends=None if recipe.schedule is None else recipe.schedule.ends,
            end_recipes={end: part.name for end, part in recipe.parts.items()},
            stage=work.stage,
        )
        edit.add_json(f"{record.folder}/build.json", record.to_json())
    return record


def _host(target: Target) -> dict[str, Any]:
    """What an engine depends on of the machine that built it; one for a GPU does not depend on the processor's."""
    return {key: value for key, value in host().items() if not target.sm or key in ("os", "arch")}


def _peak(plan: Plan) -> float:
    """Memory of a plan's build in MB, where it had a process of its own; else 0."""
    return float(plan.options.get("build_peak_mb", 0))


def _compiled(work: Work, folders: Mapping[str, Path]) -> tuple[list[Candidate], dict[str, BuildFailed]]:
    """Engines by the libraries that can build one, and what stopped the others."""
    built: list[Candidate] = []
    failed: dict[str, BuildFailed] = {}

    def attempt(name: str, folder: Path) -> None:
        try:
            plans = work.compile(name, folder)
        except BuildFailed as e:
            failed[name] = e
        else:
            built.append(Candidate(library=name, folder=folder, plans=plans))

    for name, folder in folders.items():
        attempt(name, folder)
    return built, failed


def _chosen(
    work: Work, recipe: Recipe, built: list[Candidate], failed: Mapping[str, BuildFailed]
) -> tuple[Candidate, list[Measured]]:
    """The engine to keep, and the table of what was tried; the table is empty if there was one candidate."""
    if not built:
        raise next(iter(failed.values()))
    entered = [one for candidate in built for one in (candidate, *work.variants(candidate))]
    if len(entered) == 1 and not failed:
        return built[0], []
    rows = work.measure(entered)
    rows += [Measured(library=name, reason=str(error)) for name, error in failed.items()]
    best = fastest(rows)
    if best is None:
        tried = "; ".join(
            f"{r.name}: {r.reason or f'score error {r.max_rel_error:.2e}, limit {r.limit:.2e}'}" for r in rows
        )
        raise BuildFailed(f"no library's {recipe.name} engine meets parity ({tried}). Choose one with --library.")
    return next(c for c, row in zip(entered, rows, strict=False) if row is best), rows
