"""One graph, one builder: compiled, or taken from the user's cache where the same was compiled before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lehr.engines.builders import Builder, TargetBuilder
from lehr.engines.cache import contents, engine_cache, key
from lehr.engines.job import Job
from lehr.engines.target import Target
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import Plan
from lehr.runtime.host import gpu_compute_capability, host

Progress = Callable[[str], None]


def remembered(bundle: Bundle, made: Builder | TargetBuilder, job: Job, folder: Path, progress: Progress) -> Plan:
    """The plan of a job in ``folder``: from the user's cache if the same was built before, else built and kept."""
    if not (made.CACHED and job.settings.cached):
        return _compiled(made, job, folder, progress)
    known = {str(bundle.root / name): entry.sha256 for name, entry in bundle.manifest.files.items()}
    name = key(
        {
            "graph": contents(job.graph, known),
            "name": job.name,
            "recipe": asdict(job.recipe),
            "target": [job.target.name, job.target.sm, job.target.opset, sorted(job.target.devices.items())],
            "library": [job.library, made.version()],
            "machine": _machine(job.target),
            "ranges": [{k: r.to_json() for k, r in ranges.items()} for ranges in (job.ranges, *job.narrow)],
            "feeds": {name: array.shape for name, array in job.feeds.items()},
            "threads": job.threads,
            "settings": job.settings.to_json(),
            "stored": job.stored and [job.stored.name, known.get(str(job.stored.path))],
        }
    )
    cache = engine_cache()
    plan = cache.fetch(name, folder)
    if plan is not None:
        progress(f"{job.name} for {job.target.where}: built before, from {cache.folder}")
        return plan
    before = {file.name for file in folder.iterdir()}
    plan = _compiled(made, job, folder, progress)
    after = {file.name for file in folder.iterdir() if file.is_file()}
    cache.store(name, folder, sorted(after - before), plan)
    return plan


def _compiled(made: Builder | TargetBuilder, job: Job, folder: Path, progress: Progress) -> Plan:
    if isinstance(made, TargetBuilder):
        return made.build_for(job, folder, progress)
    return made.build(job, folder)


def _machine(target: Target) -> list[Any]:
    """What an engine depends on of the machine: its processor, or of an engine for a GPU, its system and that GPU.

    Of an engine that is built ahead of time, more can be read where the GPU is.
    """
    here = host()
    return [here if not target.sm else {"os": here["os"], "arch": here["arch"]}, gpu_compute_capability()]
