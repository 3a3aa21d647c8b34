"""The ONNX Runtime builder for NVIDIA GPUs, through its CUDA execution provider, on the machine with the GPU.

The provider leaves the arithmetic of shapes to the processor, and should leave nothing else there: an evaluation is
profiled, and a build whose floating-point operators run on the processor is refused. Where nothing runs there at all,
the engine says so, and a session that would fall back is refused when it is loaded, too. Nothing here has been run on a
GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lehr.engines.job import Job
from lehr.engines.onnxruntime_cpu import optimise
from lehr.runtime import host
from lehr.runtime.backends import backend
from lehr.runtime.engine import STEP, Plan
from lehr.runtime.errors import BuildFailed, IncompatibleEngine, MissingExtra
from lehr.runtime.precision_schedule import graph_of
from lehr.runtime.recipe import Format
from lehr.runtime.whole_loop import LOOP

FORMATS = frozenset({Format.FP32, Format.FP16})
LOWERED = frozenset({Format.FP16})
REFUSES = {Format.BF16: "ONNX Runtime's CUDA provider has no bf16 kernels for some of the operators"}
HEEDS: frozenset[str] = frozenset()
CACHED = False  # optimising a graph takes no longer than copying its weights


def version() -> str:
    """The installed library's version; raises MissingExtra, too, where it was made without CUDA."""
    found = backend("onnxruntime").version()
    from lehr.runtime.backends.onnxruntime import CUDA

    import onnxruntime as ort  # isort: skip

    if CUDA not in ort.get_available_providers():
        raise MissingExtra(f"onnxruntime with {CUDA}", "ort-cuda")
    return found


def build(job: Job, folder: Path) -> Plan:
    """Optimise a graph for this machine's GPU into ``folder``; see :class:`lehr.engines.builders.Builder`.

    Raises:
        IncompatibleEngine: there is no NVIDIA GPU with a driver here, or CUDA's libraries do not load.
    """
    from lehr.runtime.backends.onnxruntime import CUDA

    job.settings.hold("ONNX Runtime", HEEDS)
    if job.recipe.arithmetic not in FORMATS:
        raise BuildFailed(f"ONNX Runtime cannot build recipe {job.recipe.name!r} for CUDA: {REFUSES[Format.BF16]}.")
    if host.gpu_compute_capability() is None:
        raise IncompatibleEngine(
            "there is no NVIDIA GPU with a driver here; target 'cuda' is built on such a machine. Run lehr build there."
        )
    options = {
        "intra_op_threads": job.threads,
        "spinning": False,
        "prepacking": graph_of(job.name) in (STEP, LOOP),
        "provider": CUDA,
        "provider_options": {"use_tf32": "0"},  # what a recipe keeps in fp32 is meant to have its digits
    }
    plan, placement = optimise(job, folder, options)
    check_placement(placement, CUDA, job.graph.name)
    alone = {provider for provider in placement if provider} == {CUDA}
    return Plan(
        file=plan.file,
        options={**plan.options, "cpu_fallback": not alone or "Shape" in plan.operators},
        achieved_precision=plan.achieved_precision,
        operators=plan.operators,
    )


def check_placement(placement: Mapping[str, Mapping[str, int]], provider: str, graph: str) -> None:
    """Raise BuildFailed where operators that compute ran on another provider than the one that was asked for."""
    elsewhere = {
        name: count
        for where, operators in placement.items()
        if where != provider
        for name, count in operators.items()
        if name not in ("MemcpyToHost", "MemcpyFromHost", "Shape")
    }
    if elsewhere:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(elsewhere.items()))
        raise BuildFailed(
            f"ONNX Runtime would compute {listed} of {graph} on the processor, not with {provider}: it has no kernel "
            "for them. Choose another recipe or library."
        )
