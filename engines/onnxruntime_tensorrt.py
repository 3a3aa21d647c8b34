"""The ONNX Runtime builder with the TensorRT execution provider, on the machine with the GPU.

The provider compiles the part of a graph that TensorRT takes and leaves the rest to others, without a word. Here the
whole graph must be TensorRT's: a session that would use another provider is refused when it is opened, what ran is read
from a profile, and the plan that is kept holds the TensorRT engine and nothing to fall back to. TensorRT decides by
itself in which of the allowed formats a layer computes, and the provider does not tell, so the achieved precision is
unknown: `lehr verify` judges the numbers. Each release of ONNX Runtime is made for one of TensorRT, up to 10.x, which
reads operator set 20 and no ``Attention``.

Nothing here has been run on a GPU yet: it is held by a stand-in for ONNX Runtime (tests/engines/test_ort_tensorrt.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.engines.job import Job
from lehr.engines.onnxruntime_cpu import executed
from lehr.engines.onnxruntime_cuda import check_placement
from lehr.engines.ranges import InputRange
from lehr.engines.settings import Compatible, Settings
from lehr.engines.tensorrt_family import OPSET_WITHOUT_ATTENTION
from lehr.runtime import host
from lehr.runtime.backends import backend
from lehr.runtime.engine import Plan
from lehr.runtime.errors import BuildFailed, IncompatibleEngine, InvalidInput, MissingExtra
from lehr.runtime.recipe import Format, Recipe

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

TITLE = "ONNX Runtime's TensorRT provider"
EMBED_BELOW = 1 << 30  # bytes of weights; a plan with a larger engine in it would pass protobuf's 2 GB
_COMPATIBLE = (Compatible.NONE, Compatible.HARDWARE)  # what the provider has a word for
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeTensorRtBuilder:
    """ONNX Runtime with TensorRT as :class:`lehr.engines.builders.TargetBuilder`."""

    FORMATS = frozenset({Format.FP32, Format.FP16, Format.INT8})
    LOWERED = frozenset({Format.FP16})
    REFUSES: Mapping[Format, str] = {
        Format.BF16: "the provider would also compute in bf16 what must stay in fp32, and does not say so",
    }
    HEEDS = frozenset({"workspace_mb", "effort", "compatible"})
    CACHED = False  # the release of TensorRT, which an engine is bound to, is not known to ONNX Runtime's Python

    def version(self) -> str:
        """ONNX Runtime's version; raises MissingExtra where it is not installed, or was made without TensorRT."""
        return backend("onnxruntime-tensorrt").version()

    def build_for(self, job: Job, folder: Path, progress: Progress) -> Plan:
        """Compile a graph for this machine's GPU; see :class:`lehr.engines.builders.TargetBuilder`.

        Raises:
            IncompatibleEngine: there is no GPU of the target here, or the provider does not load.
        """
        from lehr.runtime.backends.onnxruntime import FAILURES, TENSORRT, open_session, session_options

        import onnxruntime as ort  # isort: skip

        self.version()
        self._check(job)
        graph, name, stored = job.graph, job.name, job.stored
        progress(f"{name} for {job.target.where}: TensorRT through ONNX Runtime, which may take minutes")
        plan = folder / f"{name}.onnx"
        before = {file.name for file in folder.iterdir()}
        inside = stored is None or stored.bytes < EMBED_BELOW
        made = {
            **self._provider_options(job.recipe, job.settings),
            **_profile(job.ranges),
            "trt_dump_ep_context_model": "1",
            "trt_ep_context_file_path": str(plan),
            "trt_ep_context_embed_mode": "1" if inside else "0",
        }
        session = {"intra_op_threads": job.threads, "spinning": False, "cpu_fallback": False, "provider": TENSORRT}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tensorrt-") as scratch:
            readable = _readable(graph, Path(scratch))
            options = session_options(session)
            # The graph's own nodes, which TensorRT knows; ONNX Runtime's fusions are for its own kernels.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            try:
                opened = open_session(readable, options, {**session, "provider_options": made})
            except FAILURES as e:
                raise BuildFailed(f"{TITLE} cannot build {graph.name}: {e}") from e
            feeds = _feeds(opened, job.ranges)
            del opened
        if not plan.is_file():
            raise BuildFailed(
                f"{TITLE} compiled {graph.name} and left no plan: a part of the graph is not TensorRT's. Choose "
                "another recipe, or --library onnxruntime."
            )
        kept = {**session, "provider_options": self._provider_options(job.recipe, job.settings)}
        try:
            operators, _, placement = executed(plan, feeds, kept)
        except FAILURES as e:
            raise BuildFailed(f"{TITLE} cannot run the plan of {graph.name} that it made: {e}") from e
        check_placement(placement, TENSORRT, graph.name)
        if not placement.get(TENSORRT):
            raise BuildFailed(f"{TITLE} ran nothing of {graph.name}. Choose another recipe, or --library onnxruntime.")
        record = {
            **kept,
            "sm": [str(host.gpu_compute_capability())],
            "compatible": job.settings.compatible.value,
            "ranges": {key: given.to_json() for key, given in job.ranges.items()},
            "files": sorted({file.name for file in folder.iterdir()} - before),
        }
        return Plan(file=plan.name, options=record, achieved_precision={}, operators=operators)

    def _check(self, job: Job) -> None:
        recipe, target, settings = job.recipe, job.target, job.settings
        settings.hold(TITLE, self.HEEDS)
        if settings.compatible not in _COMPATIBLE or job.narrow:
            raise InvalidInput(
                f"{TITLE} has no use for --compatible {settings.compatible.value} or narrow profiles. Leave them out."
            )
        if not recipe.computes <= self.FORMATS:
            why = self.REFUSES.get(recipe.arithmetic, "it has no such arithmetic")
            raise BuildFailed(f"{TITLE} cannot build recipe {recipe.name!r}: {why}.")
        here = host.gpu_compute_capability()
        if here is None or (target.sm and here not in target.sm):
            found = "there is no NVIDIA GPU with a driver here" if here is None else f"the GPU here has SM {here}"
            raise IncompatibleEngine(
                f"{TITLE} builds for the GPU it finds, and {found}; {target.where} is built on such a machine. "
                "Run lehr build there."
            )

    def _provider_options(self, recipe: Recipe, settings: Settings) -> dict[str, str]:
        """What holds when the plan is built and when it is loaded."""
        half = Format.FP16 in recipe.computes
        found = {
            "trt_fp16_enable": "1" if half else "0",
            "trt_layer_norm_fp32_fallback": "1" if half else "0",  # sums of squares overflow fp16
            "trt_int8_enable": "1" if Format.INT8 in recipe.computes else "0",
            "trt_engine_hw_compatible": "1" if settings.compatible is Compatible.HARDWARE else "0",
        }
        if settings.workspace_mb:
            found["trt_max_workspace_size"] = str(settings.workspace_mb << 20)
        if settings.effort is not None:
            found["trt_builder_optimization_level"] = str(settings.effort)
        return found


def _profile(ranges: Mapping[str, InputRange]) -> dict[str, str]:
    """The sizes that the engine must take, as the provider writes them: ``sample:1x4x64x64,timestep:1``."""

    def listed(which: str) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, getattr(given, which)))}" for name, given in ranges.items())

    return {f"trt_profile_{which}_shapes": listed(which) for which in ("min", "opt", "max")}


def _feeds(session: Any, ranges: Mapping[str, InputRange]) -> dict[str, Array]:
    """Inputs of the usual sizes to try a plan with."""
    feeds: dict[str, Array] = {}
    for given in session.get_inputs():
        size, kind = ranges[given.name], _TYPES[given.type]
        feeds[given.name] = np.array(size.opt, kind) if size.values else np.ones(size.opt, kind)
    return feeds


def _readable(graph: Path, scratch: Path) -> Path:
    """A copy of the graph in the operator set that the provider's TensorRT reads."""
    try:
        import onnx_ir as ir

        from lehr.engines.graph.lowering import Dialect, lower
        from lehr.engines.graph.lowering.save import write_graph
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    dialect = Dialect(name="tensorrt", pieces=frozenset({"Attention"}))
    return write_graph(lower(ir.load(graph), OPSET_WITHOUT_ATTENTION, dialect), scratch, graph.name)


BUILDER = OnnxRuntimeTensorRtBuilder()
