"""The TensorRT builders: one for TensorRT 10.3 to 11 and for TensorRT-RTX, which share all that is needed here.

Networks are strongly typed, so a graph says itself what computes in which format: recipes with less than fp32 get a
graph of their own (:mod:`lehr.engines.graph.lowering.half`), and nothing falls back behind it. Each build runs in a
process of its own (:mod:`lehr.engines.tensorrt_worker`).

TensorRT-RTX builds for any RTX GPU on a machine that has none
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html); the target's compute
capabilities are always set. TensorRT proper builds for the GPU it finds, so that one is compared with the target first.

Which formats and fusions an engine ended up with can be read on its GPU only: elsewhere ``achieved_precision`` and
``operators`` stay empty, which means unknown. Kernel timings are kept between builds for TensorRT proper; TensorRT-RTX
chooses kernels where an engine is loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lehr.engines import cache, forecast, tensorrt_layers
from lehr.engines.job import Job
from lehr.engines.settings import Compatible, Settings, StoredWeights, Weights
from lehr.engines.target import Target
from lehr.runtime import host
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.recipe import Format

Progress = Callable[[str], None]

PORTABLE_OPSET = 23  # the newest of exported graphs
OPSET_WITHOUT_ATTENTION = 20  # what TensorRT 10.3 reads; IAttention, and opset 23 with it, came later
_WORKER = Path(__file__).with_name("tensorrt_worker.py")
_SHOWN, _TAIL = 3, 600  # problems of one build, and characters of what a killed one printed

# TensorRT-RTX 1.7 fails on group norms in half precision with one channel a group; in pieces they compute in fp32.
_NORM = "GroupNormalization"
_COMPILER_BUG = "MyelinCheckException"

_WEIGHT_FLAGS = {
    Weights.EMBEDDED: (),
    Weights.STRIPPED: ("STRIP_PLAN", "REFIT_IDENTICAL"),  # the safe pair: REFIT alone lost a bias in 11.3
    Weights.STREAMED: ("WEIGHT_STREAMING",),
}
_HARDWARE = {Compatible.HARDWARE: "AMPERE_PLUS", Compatible.CAPABILITY: "SAME_COMPUTE_CAPABILITY"}
_JETSON = frozenset({"8.7", "11.0"})  # hardware compatibility is for discrete GPUs from SM 8.0 on
_PROFILED = frozenset({"batches", "sizes"})

# What a message of the library's compiler contains -> what to do about it.
_HINTS = (
    ("FP32 GEMM is not supported", "SM 7.5 multiplies matrices in fp16 only: use --recipe fp16"),
    ("HW-specific datatypes", "a target lacks a number format of the graph: choose another recipe or target"),
    ("out of memory", "build on a machine with more memory, or limit --workspace and --tactic-memory"),
    ("OutOfMemory", "build on a machine with more memory, or limit --workspace and --tactic-memory"),
    ("requires a GPU", "this kind of engine is built on a machine with the GPU"),
    ("CUDA", "a driver is needed for this: build on a machine with the GPU, or leave the option out"),
    ("No importer registered", "the library does not know the operator: lower the graph to an older operator set"),
    ("UNSUPPORTED_NODE", "the library does not know the operator: lower the graph to an older operator set"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtBuilder:
    """A builder for targets, :class:`lehr.engines.builders.TargetBuilder`.

    Attributes:
        module: the Python module, which is also the engine library's name.
        title: the library's name for people.
        extra: of Lehr, that installs it; None if no package does on its own.
    """

    module: str
    title: str
    extra: str | None
    FORMATS: frozenset[Format] = frozenset(Format)
    LOWERED: frozenset[Format] = frozenset({Format.FP16, Format.BF16})
    REFUSES: Mapping[Format, str] = field(default_factory=dict)
    HEEDS: frozenset[str] = frozenset()
    CACHED: bool = True

    def version(self) -> str:
        """The installed library's version.

        Raises:
            MissingExtra: it is not installed, and an extra installs it.
            BuildFailed: it is not installed, or does not load; with what is missing.
        """
        return str(self._library().__version__)

    def _library(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as e:
            if self.extra is not None:
                raise MissingExtra(self.module, self.extra) from e
            raise BuildFailed(
                f"{self.title} builds engines on the machine that runs them, and there is no Python module "
                f"{self.module!r} here. Install {self.title} there (Jetson: it comes with JetPack) and run lehr build "
                "on that machine. Lehr's builder for it is held to its interface by tests and has not been run on a "
                "GPU yet."
            ) from e
        except (ImportError, OSError) as e:
            raise BuildFailed(f"{self.title} is installed but does not load: {e}. Install it again.") from e

    def build_for(self, job: Job, folder: Path, progress: Progress) -> Plan:
        """Compile a graph for its target into ``folder``; see :class:`lehr.engines.builders.TargetBuilder`."""
        library = self._library()
        graph, recipe, target, settings, stored = job.graph, job.recipe, job.target, job.settings, job.stored
        if recipe.arithmetic not in self.FORMATS:
            raise BuildFailed(f"{self.title} cannot build recipe {recipe.name!r}: no {recipe.arithmetic.value}.")
        here = host.gpu_compute_capability()
        ahead = hasattr(library, "ComputeCapability")
        if not ahead:
            self._check_gpu(target, here)
        self._check_settings(settings, target, stored)
        what = f"{job.name} for {target.where}"
        needed = forecast.forecast_mb(graph, stored)
        if warning := forecast.check(needed, what):
            progress(warning)
        stripped = settings.weights is Weights.STRIPPED
        plan = folder / f"{job.name}.engine"
        timed = settings.cached and not ahead
        timing = str(cache.timing_file(self.module, self.version(), f"sm{here}")) if timed else ""
        order: dict[str, Any] = {
            "module": self.module,
            "plan": str(plan),
            "capabilities": [f"SM{sm.replace('.', '')}" for sm in target.sm],
            "ranges": {key: given.to_json() for key, given in job.ranges.items()},
            "narrow": [{key: given.to_json() for key, given in profile.items()} for profile in job.narrow],
            "threads": job.threads,
            "flags": [
                *_WEIGHT_FLAGS[settings.weights],
                *(["VERSION_COMPATIBLE"] if settings.compatible is Compatible.VERSION else []),
            ],
            "hardware": _HARDWARE.get(settings.compatible, ""),
            "pools": {
                pool: megabytes
                for pool, megabytes in (("WORKSPACE", settings.workspace_mb), ("TACTIC_DRAM", settings.tactic_mb))
                if megabytes
            },
            "effort": settings.effort,
            "timing": timing,
            "inspect": here in target.sm,
            "stripped": stripped,
        }

        def attempt(pieces: frozenset[str]) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".tensorrt-") as scratch:
                readable = self.readable(graph, target, Path(scratch), pieces)
                done = self._run({**order, "graph": str(readable)}, Path(scratch), what, progress)
                if stripped and stored is not None:
                    done["refit"] = self._refit(readable, stored, folder / f"{job.name}.refit")
                return done

        pieces = frozenset() if hasattr(library, "IAttention") else frozenset({"Attention"})
        try:
            done = attempt(pieces)
        except BuildFailed as e:
            if _COMPILER_BUG not in str(e) or _NORM.encode() not in graph.read_bytes():
                raise
            progress(f"{what}: the compiler failed, again with every {_NORM} in pieces")
            pieces |= {_NORM}
            done = attempt(pieces)
        precision, operators = tensorrt_layers.achieved(done["inspected"], asked=recipe.arithmetic, what=what)
        options = {
            "sm": list(target.sm),
            "ranges": order["ranges"],
            "narrow": order["narrow"],
            "in_pieces": sorted(pieces),
            **done["settings"],
            **{key: value for key, value in settings.to_json().items() if key not in _PROFILED},
            **({"refit": done["refit"]} if "refit" in done else {}),
            "layers": done["layers"],
            "forecast_mb": needed,
            "build_peak_mb": done["peak"],
        }
        return Plan(file=plan.name, options=options, achieved_precision=precision, operators=operators)

    # -------------------------------------------------------------------------------------------- before the build

    def _check_gpu(self, target: Target, here: str | None) -> None:
        if here not in target.sm:
            found = f"the GPU here has SM {here}" if here else "there is no NVIDIA GPU with a driver here"
            raise IncompatibleEngine(
                f"{self.title} builds for the GPU it finds, and {found}; {target.where} is built on such a machine. "
                "Run lehr build there."
            )

    def _check_settings(self, settings: Settings, target: Target, stored: StoredWeights | None) -> None:
        settings.hold(self.title, self.HEEDS)
        if settings.compatible in _HARDWARE and (_JETSON & set(target.sm) or min(map(float, target.sm)) < 8):
            raise InvalidInput(
                f"{self.title} makes hardware-compatible engines for discrete GPUs from SM 8.0 on, and not for "
                f"{target.where}. Leave out --compatible {settings.compatible.value}."
            )
        if settings.weights is Weights.STRIPPED and stored is None:
            raise InvalidInput("a stripped engine is refitted from a bundle's weights file, and there is none here.")

    def _refit(self, graph: Path, stored: StoredWeights, beside: Path) -> dict[str, Any]:
        """Where the runtime finds the weights of a stripped plan."""
        try:
            from lehr.engines.refit import refit_sources
        except ModuleNotFoundError as e:
            raise MissingExtra(e.name or "onnx_ir", "export") from e
        return refit_sources(graph, stored, beside)

    def readable(self, graph: Path, target: Target, scratch: Path, pieces: frozenset[str]) -> Path:
        """The graph in an operator set that the library reads: itself, or a lowered copy in ``scratch``.

        ``pieces`` are the operators that must be taken apart.
        """
        ceiling = min(target.opset, OPSET_WITHOUT_ATTENTION) if "Attention" in pieces else target.opset
        if not pieces and ceiling >= PORTABLE_OPSET:
            return graph
        try:
            import onnx_ir as ir

            from lehr.engines.graph.lowering import Dialect, lower
            from lehr.engines.graph.lowering.save import write_graph
        except ModuleNotFoundError as e:
            raise MissingExtra(e.name or "onnx_ir", "export") from e
        folder = scratch / "lowered"
        folder.mkdir()
        dialect = Dialect(name=self.module, pieces=pieces)
        return write_graph(lower(ir.load(graph), ceiling, dialect), folder, graph.name)

    # --------------------------------------------------------------------------------------------- the build itself

    def _run(self, job: Mapping[str, Any], scratch: Path, what: str, progress: Progress) -> dict[str, Any]:
        """Run the worker; returns what it said at the end, or raises BuildFailed with the reason."""
        asked, printed = scratch / "job.json", scratch / "printed"
        asked.write_text(json.dumps(job), encoding="utf-8")
        listen, speak = os.pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        last: dict[str, Any] = {}
        with os.fdopen(listen, encoding="utf-8") as events, printed.open("wb") as sink:
            try:
                worker = subprocess.Popen(
                    [sys.executable, str(_WORKER), str(asked), str(speak)],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    pass_fds=(speak,),
                    env=environment,
                )
            finally:
                os.close(speak)
            try:
                for line in events:
                    last = json.loads(line)
                    if last["event"] == "progress":
                        progress(f"{what}: {last['phase']} {last['step']}/{last['steps']}, {last['peak']:.0f} MB")
                code = worker.wait()
            finally:
                if worker.poll() is None:  # interrupted
                    worker.kill()
                    worker.wait()
        if last.get("event") == "done" and code == 0:
            return last
        if last.get("event") == "failed":
            raise BuildFailed(f"{self.title} cannot build {what}: {_told(last['problems'])}")
        text = printed.read_text(encoding="utf-8", errors="replace").strip()[-_TAIL:]
        raise BuildFailed(f"{self.title} cannot build {what}: {_ended(code, last.get('peak'))} {text}".rstrip())


def _told(problems: list[dict[str, str]]) -> str:
    """What the library refuses, node by node, with a hint where one is known."""
    told = []
    for problem in problems[:_SHOWN]:
        node = f"node {problem['node']!r} ({problem['operator'] or 'of an unnamed kind'}): " if problem["node"] else ""
        hint = next((f" Hint: {way}." for mark, way in _HINTS if mark in problem["message"]), "")
        told.append(f"{node}{problem['message']}.{hint}")
    more = len(problems) - _SHOWN
    return " ".join(told) + (f" And {more} more." if more > 0 else "")


def _ended(code: int, peak: float | None) -> str:
    """Why a worker ended that could not say so itself."""
    so_far = f" after using {peak:.0f} MB" if peak else ""
    if code == -signal.SIGKILL:
        return f"the build was killed{so_far}, as a rule because memory ran out. Free some, or build a smaller model."
    if code < 0:
        return f"the build crashed ({signal.Signals(-code).name}){so_far}."
    return f"the build ended with code {code}{so_far}."


TENSORRT = TensorRtBuilder(
    module="tensorrt",
    title="TensorRT",
    extra=None,
    HEEDS=_PROFILED | {"workspace_mb", "tactic_mb", "effort", "compatible", "weights"},
)
# TensorRT-RTX times nothing when it builds, and says itself where its engines run.
TENSORRT_RTX = TensorRtBuilder(
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    extra="trt-rtx",
    HEEDS=_PROFILED | {"workspace_mb", "effort", "weights"},
)
