"""A small network in three graphs, or in one, whose engines are numpy functions: on the host, or on the fake device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np
from fake_device import FakeDevice
from fake_tensorrt_runtime import NumpyEngine, library

from lehr.runtime import tensorrt_context
from lehr.runtime.backends import tensorrt
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.device import Stream
from lehr.runtime.hoisted import Residency, hoisted_denoiser
from lehr.runtime.paths import VP
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.spec import BATCH, Dim, DType, GraphSpec, ModelSpec, TensorSpec, Varies

CHANNELS, WIDTH, CLASSES = 2, 3, 4
SAMPLE = TensorSpec(name="sample", shape=("batch", CHANNELS, "height", WIDTH), varies=Varies.SAMPLE)
TIMESTEP = TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP)
LABELS = TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
OUTPUT = TensorSpec(name="output", shape=("batch", CHANNELS, "height", WIDTH), varies=Varies.SAMPLE)
SPEC = ModelSpec(
    name="toy",
    inputs=(SAMPLE, TIMESTEP, LABELS),
    outputs=(OUTPUT,),
    dims=(BATCH, Dim(name="height", default=4)),
    path=VP(),
    prediction=Prediction(kind=PredictionKind.EPSILON),
    num_classes=CLASSES,
    null_class=CLASSES,
)
K = TensorSpec(name="k", shape=("batch", CHANNELS), varies=Varies.PROMPT)
POSITIONS = TensorSpec(name="positions", shape=("height",), varies=Varies.PROMPT)
M = TensorSpec(name="m", shape=("batch", 5), varies=Varies.TIMESTEP)
HALF = TensorSpec(name="half", dtype=DType.FLOAT16, shape=("batch", 1, 3), varies=Varies.TIMESTEP)
SHAPE = TensorSpec(name="sample.shape", dtype=DType.INT64, shape=(4,), varies=Varies.CONSTANT)
SPLIT = {
    "prompt": GraphSpec(inputs=(LABELS, SHAPE), outputs=(K, POSITIONS)),
    "schedule": GraphSpec(inputs=(TIMESTEP, K), outputs=(M, HALF)),
    "step": GraphSpec(inputs=(SAMPLE, K, POSITIONS, M, HALF), outputs=(OUTPUT,)),
}
WHOLE = {"step": GraphSpec(inputs=SPEC.inputs, outputs=SPEC.outputs)}

Feeds = Mapping[str, np.ndarray]


def prompt(feeds: Feeds) -> dict[str, np.ndarray]:
    angle = feeds["class_labels"][:, None] + np.arange(CHANNELS)
    height = int(feeds["sample.shape"][2])
    return {"k": np.sin(angle).astype(np.float32), "positions": np.cos(np.arange(height)).astype(np.float32)}


def schedule(feeds: Feeds) -> dict[str, np.ndarray]:
    m = np.cos(feeds["timestep"] / 100)[:, None] * np.arange(1, 6, dtype=np.float32) + feeds["k"].sum(axis=1)[:, None]
    return {"m": m.astype(np.float32), "half": m[:, None, :3].astype(np.float16)}


def step(feeds: Feeds) -> dict[str, np.ndarray]:
    scale = 1 + feeds["m"].mean(axis=1) * feeds["half"].astype(np.float32).sum(axis=(1, 2)) / 40
    shift = feeds["k"][:, :, None, None] + feeds["positions"][:, None]
    return {"output": (np.tanh(feeds["sample"]) * scale[:, None, None, None] + shift).astype(np.float32)}


def whole(feeds: Feeds) -> dict[str, np.ndarray]:
    made = prompt({**feeds, "sample.shape": np.array(feeds["sample"].shape)})
    return step({**feeds, **made, **schedule({**feeds, **made})})


class OnHost:
    def __init__(self, function) -> None:
        self.run = function


def engine(graph: GraphSpec, function, **options) -> NumpyEngine:
    def described(tensors):
        return {t.name: (t.dtype.value, tuple(k if isinstance(k, int) else -1 for k in t.shape)) for t in tensors}

    on_host = frozenset(tensor.name for tensor in graph.inputs if tensor.name.endswith(".shape"))
    made = {"inputs": described(graph.inputs), "outputs": described(graph.outputs), "on_host": on_host}
    return NumpyEngine(**{**made, "function": function, **options})


class Machine:
    """A fake device with a TensorRT of ``release``; ``close`` finds what was never given back."""

    def __init__(self, release: str = "tensorrt 10.3.0", **engines: NumpyEngine) -> None:
        self.device = FakeDevice()
        self.stream = Stream(self.device)
        self.library = library(release, self.device, engines)
        self.log = tensorrt_context.Log(self.library)
        self.loaded: dict[str, weakref.ref[tensorrt_context.LoadedEngine]] = {}  # the last engine of each name
        self.alive: list[tuple[str, list[str]]] = []  # at each load: which one, and which others were in memory

    def session(self, name: str) -> tensorrt.TensorRtSession:
        runtime = self.library.Runtime(self.log.logger)
        plan = runtime.deserialize_cuda_engine(f"plan {name}".encode())
        self.alive.append((name, sorted(other for other, engine in self.loaded.items() if engine() is not None)))
        made = tensorrt_context.LoadedEngine(self.library, runtime, plan, self.stream, self.log)
        self.loaded[name] = weakref.ref(made)
        return tensorrt.TensorRtSession(made)

    def close(self) -> None:
        self.stream.close()
        self.device.close()


def host_denoiser(*, split: bool) -> Denoiser:
    graphs = SPLIT if split else WHOLE
    functions = {"prompt": prompt, "schedule": schedule, "step": step if split else whole}
    return hoisted_denoiser(SPEC, graphs, lambda name: OnHost(functions[name]))


def machine(*, split: bool, release: str = "tensorrt 10.3.0", **options) -> Machine:
    if not split:
        return Machine(release, step=engine(WHOLE["step"], whole, **options))
    parts = {"prompt": engine(SPLIT["prompt"], prompt), "schedule": engine(SPLIT["schedule"], schedule)}
    return Machine(release, **parts, step=engine(SPLIT["step"], step, **options))


def device_denoiser(on: Machine, *, split: bool, residency: Residency = Residency.ALL) -> Denoiser:
    return hoisted_denoiser(SPEC, SPLIT if split else WHOLE, on.session, residency=residency)
