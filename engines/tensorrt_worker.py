"""The process that builds one TensorRT engine; :mod:`lehr.engines.tensorrt_family` starts it and reads what it says.

A process of its own, since a failed build can spoil the next one of the same process, since the library ends the
process where memory runs out, and since only so its memory can be told from the caller's. It needs the library alone.

    python tensorrt_worker.py JOB.json FD

It writes one JSON object a line to the file descriptor FD: ``{"event": "progress" | "failed" | "done", …}``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Say = Callable[..., None]
Problem = dict[str, str]

PAUSE = 0.5  # seconds between two lines of progress; small graphs make a thousand steps a second

_MANGLED = re.compile(r"_U\d+$")  # the compiler's own numbering, behind the name of the network's layer
_QUOTED = re.compile(r"(?:operation|node|layer) '([^']+)'|\{?ForeignNode\[([^\]]+)\]", re.IGNORECASE)


class Refused(Exception):
    """The library refuses the graph; ``problems`` are rows of node, operator and message."""

    def __init__(self, stage: str, problems: list[Problem]) -> None:
        super().__init__(stage)
        self.stage, self.problems = stage, problems


def peak_mb() -> float:
    """Largest resident memory of this program, in MB; what stood here before ``exec`` does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    return 0.0


# --------------------------------------------------------------------------------------------- the library's callbacks


def make_logger(trt: Any, errors: list[str]) -> Any:
    """A logger that keeps what goes wrong: a failed build returns None and says why nowhere else."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(msg)

    return Logger()


def make_monitor(trt: Any, say: Say) -> Any:
    """A monitor that reports how far a phase is; it stops the build when nobody listens any more."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._said = -PAUSE

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._said < PAUSE:
                return True
            self._said = now
            try:
                say("progress", phase=phase_name, step=step + 1, steps=self._steps.get(phase_name, 0), peak=peak_mb())
            except OSError:
                return False
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


# ------------------------------------------------------------------------------------------------------------ stages


def parse(trt: Any, network: Any, logger: Any, graph: str) -> Any:
    """Read the graph into the network; raises Refused with every node that has no place there."""
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(graph):
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        raise Refused(
            "parse", [{"node": e.node_name(), "operator": e.node_operator(), "message": e.desc()} for e in errors]
        )
    return parser


def loosen_attention(trt: Any, network: Any) -> int:
    """Let attention without a kernel of its own be computed in pieces; returns how many there are.

    Without that, attention in fp32, or with heads of odd sizes, fails the build. Layers come back as their base class;
    giving them the class of their type is how the library's own samples reach what only that class has.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return 0
    found = 0
    for k in range(network.num_layers):
        layer = network.get_layer(k)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            found += 1
    return found


def target_config(trt: Any, config: Any, capabilities: list[str]) -> None:
    """Say which GPUs the engine is for; raises Refused for one that the library does not know.

    Where no target is set, TensorRT-RTX builds formats that the GPU has not without a word.
    """
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        return  # TensorRT proper builds for the GPU of this machine, which the caller has compared with the target
    missing = [name for name in capabilities if not hasattr(known, name)]
    if missing or not capabilities:
        have = ", ".join(sorted(name for name in dir(known) if name.startswith("SM")))
        wanted = ", ".join(missing) or "no target"
        raise Refused("target", [{"node": "", "operator": "", "message": f"it has no {wanted}; it knows {have}"}])
    config.num_compute_capabilities = len(capabilities)
    for k, name in enumerate(capabilities):
        config.set_compute_capability(getattr(known, name), k)


def add_profile(builder: Any, network: Any, config: Any, ranges: Mapping[str, Mapping[str, Any]]) -> None:
    """One optimisation profile over the ranges of every input; raises Refused where one is missing or not taken."""
    profile = builder.create_optimization_profile()
    for k in range(network.num_inputs):
        tensor = network.get_input(k)
        name, given = tensor.name, ranges.get(tensor.name)
        if given is None or (tensor.is_shape_tensor and not given["values"]):
            reason = "its values decide shapes, and nothing says between which bounds they lie" if given else "no range"
            raise Refused("profile", [{"node": name, "operator": "input", "message": reason}])
        sizes = [tuple(given[key]) for key in ("min", "opt", "max")]
        if tensor.is_shape_tensor:
            profile.set_shape_input(name, *sizes)
        elif given["values"]:
            profile.set_shape(name, *[(len(sizes[0]),)] * 3)
        else:
            profile.set_shape(name, *sizes)
    if config.add_optimization_profile(profile) < 0:
        raise Refused("profile", [{"node": "", "operator": "", "message": f"the ranges {dict(ranges)} are not taken"}])


def configure(trt: Any, config: Any, job: Mapping[str, Any]) -> None:
    """Everything but targets and profiles; raises Refused for what the library's version has not."""
    config.clear_flag(trt.BuilderFlag.TF32)  # what a recipe keeps in fp32 is meant to have its digits
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows no formats
    for name in job["flags"]:
        config.set_flag(_member(trt.BuilderFlag, name))
    if job["hardware"]:
        config.hardware_compatibility_level = _member(trt.HardwareCompatibilityLevel, job["hardware"])
    for pool, megabytes in job["pools"].items():
        config.set_memory_pool_limit(_member(trt.MemoryPoolType, pool), megabytes * 1_000_000)
    if job["effort"] is not None:
        config.builder_optimization_level = job["effort"]
    if job["timing"]:
        file = Path(job["timing"])
        config.set_timing_cache(_timings(config, file.read_bytes() if file.is_file() else b""), False)


def _member(kind: Any, name: str) -> Any:
    if not hasattr(kind, name):
        have = ", ".join(sorted(member for member in dir(kind) if member.isupper()))
        message = f"this version has no {kind.__name__} {name}; it has {have}"
        raise Refused("settings", [{"node": "", "operator": "", "message": message}])
    return getattr(kind, name)


def _timings(config: Any, known: bytes) -> Any:
    """A timing cache from a file's bytes; an empty one where the library refuses them."""
    return (config.create_timing_cache(known) if known else None) or config.create_timing_cache(b"")


def keep_timings(config: Any, file: Path) -> None:
    """Write what was timed for the next build; a folder that cannot be written costs that one time, no more."""
    timings = config.get_timing_cache()
    if timings is None:
        return
    new = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(timings.serialize())
        new.replace(file)


def look_into(trt: Any, logger: Any, engine: Any, job: Mapping[str, Any], errors: list[str]) -> Any:
    """What the inspector says of an engine on the GPU it is for; raises Refused where it does not load there.

    Formats of layers whose sizes are open are known to a context alone, which is given the usual sizes.
    """
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        reason = "; ".join(errors) or "no reason given"
        message = f"the new engine does not load on this machine's GPU: {reason}"
        raise Refused("inspect", [{"node": "", "operator": "", "message": message}])
    inspector = loaded.create_engine_inspector()
    if not job["stripped"]:  # one without its weights makes no context
        context = loaded.create_execution_context()
        if context is not None:
            for name, given in job["ranges"].items():
                if not given["values"]:
                    context.set_input_shape(name, tuple(given["opt"]))
            inspector.execution_context = context
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def explain(network: Any, errors: list[str]) -> list[Problem]:
    """The library's error messages with the node and the operator that each is about, where it names one."""
    kinds = {layer.name: layer.type.name for layer in (network.get_layer(k) for k in range(network.num_layers))}
    problems = []
    for message in errors:
        quoted = _QUOTED.search(message)
        name = "" if quoted is None else _MANGLED.sub("", quoted[1] or quoted[2])
        problems.append({"node": name, "operator": kinds.get(name, ""), "message": " ".join(message.split())})
    return problems


def build(job: Mapping[str, Any], say: Say) -> None:
    """Parse, configure, build, and write the plan; raises Refused."""
    trt: Any = importlib.import_module(job["module"])
    errors: list[str] = []
    logger = make_logger(trt, errors)
    builder = trt.Builder(logger)
    if job["threads"]:
        builder.max_threads = job["threads"]
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = parse(trt, network, logger, job["graph"])
    attention = loosen_attention(trt, network)
    config = builder.create_builder_config()
    config.progress_monitor = make_monitor(trt, say)
    configure(trt, config, job)
    target_config(trt, config, job["capabilities"])
    for ranges in (job["ranges"], *job["narrow"]):
        add_profile(builder, network, config, ranges)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refused("build", explain(network, errors) or [{"node": "", "operator": "", "message": "no reason given"}])
    Path(job["plan"]).write_bytes(engine)
    peak = peak_mb()
    if job["timing"]:
        keep_timings(config, Path(job["timing"]))
    layers = look_into(trt, logger, engine, job, errors) if job["inspect"] else None
    del parser  # alive until here: it owns weights that the network points to
    say(
        "done",
        layers=network.num_layers,
        settings={
            "tf32": False,
            "optimization_level": config.builder_optimization_level,
            "decomposable_attention": attention,
        },
        inspected=layers,
        peak=peak,
    )


def main() -> None:
    """Read the job, build, report."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8", buffering=1) as out:

        def say(event: str, **fields: Any) -> None:
            out.write(json.dumps({"event": event, **fields}) + "\n")

        try:
            build(job, say)
        except Refused as e:
            say("failed", stage=e.stage, problems=e.problems, peak=peak_mb())


if __name__ == "__main__":
    main()
