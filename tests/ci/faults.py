"""Faults to inject into bundles, engines and what runs them, each with what it does to eager's own samples.

``eager`` draws with the fault in PyTorch, so the fault's magnitude is known without the engine: it *counts* if it moves
eager's samples further than the policy lets an engine move them, and is harmless otherwise.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from lehr.ci import gate as gates
from lehr.engines.build import build
from lehr.engines.target import target
from lehr.export.eager import eager
from lehr.export.source import resolve
from lehr.runtime import engine as engines
from lehr.runtime import hoisted, pipeline
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.guidance import plain
from lehr.runtime.loop import sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.prediction import EPSILON
from lehr.runtime.recipe import recipe
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import Sampling
from lehr.runtime.verify import replay

WEIGHTS = "model/weights.safetensors"
QKV, FC2, HEAD = "blocks.3.attn.qkv.weight", "blocks.2.mlp.fc2.weight", "final_layer.linear.weight"
TABLE = "y_embedder.embedding_table.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        name: for the test's name.
        inject: plants it, into the copy of a bundle at a path or by patching; may rebuild the engine.
        eager: final samples that eager draws with it, for a recorded loop.
        level: that must fail first.
        names: what the report must say of it, in the culprit's or a failed check's text.
        loop: the recorded loop on which ``eager`` is measured.
    """

    name: str
    inject: Callable[[Path, Any], None]
    eager: Callable[[Any], np.ndarray]
    level: str
    names: str
    loop: str = "unguided"


# ---------------------------------------------------------------------------------------------------------- weights


def flip_largest(tensor):
    at = np.unravel_index(np.argmax(np.abs(tensor)), tensor.shape)
    tensor[at] = -tensor[at]


def scale_channel(tensor):
    tensor[5] *= 1.25


def nudge_one(tensor):
    tensor.flat[77] *= np.float32(1 + 1.2e-7)


def nudge_channel(tensor):
    tensor[5] *= np.float32(1 + 1e-6)


def nan_row(tensor):
    tensor[3] = np.nan


def edit_weights(root, name, change, *, rebuild=True):
    """Change one tensor of the bundle's weights, and build the engine from what is there then."""
    bundle = Bundle.open(root)
    data = bytearray(bundle.path(WEIGHTS).read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    tensor = np.frombuffer(bytes(data[begin:end]), np.float32).reshape(entry["shape"]).copy()
    change(tensor)
    data[begin:end] = tensor.tobytes()
    with bundle.edit() as edit:
        edit.add_bytes(WEIGHTS, bytes(data))
    if rebuild:
        build(root, target("cpu"), recipe("fp32"), library="onnxruntime")


def edit_plan(root, graph, change):
    """Change the built engine alone: ``change`` gets its ONNX graph with all weights inside."""
    bundle = Bundle.open(root)
    record = engines.find(bundle, "cpu", "fp32")
    file = f"{record.folder}/{record.plans[graph].file}"
    model = onnx.load(bundle.path(file))
    change(model)
    with bundle.edit() as edit:
        edit.add_bytes(file, model.SerializeToString())


def in_plan(graph, part, change):
    """``change`` to the initialiser of the built engine whose name starts with ``part``."""

    def planted(model):
        tensor = next(t for t in model.graph.initializer if t.name.startswith(part))
        values = numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return lambda root, patch: edit_plan(root, graph, planted)


def shifted_in_plan(by):
    """A built engine that takes each timestep for another one."""

    def planted(model):
        for node in model.graph.node:
            for k, name in enumerate(node.input):
                if name == "timestep":
                    node.input[k] = "timestep.shifted"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(by), "timestep.by"))
        model.graph.node.insert(0, onnx.helper.make_node("Add", ["timestep", "timestep.by"], ["timestep.shifted"]))

    return lambda root, patch: edit_plan(root, "schedule", planted)


# ------------------------------------------------------------------------------------------------------------ eager


class Model:
    """Eager ``digits-dit``, and its golden data."""

    def __init__(self, golden):
        self.source = resolve("digits-dit", preset=None, seed=0, structure_only=False)
        self.module = self.source.runnable().float().eval()
        self.golden, self.spec = golden, self.source.spec

    def loop(self, name):
        return next(loop for loop in self.golden.trajectories if loop.name == name)

    def denoiser(self):
        return eager(self.module, self.spec)

    def with_weight(self, name, change, loop="unguided"):
        """Final samples with one tensor changed."""
        parameters = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        before = parameters[name].detach().clone()
        try:
            tensor = before.numpy().copy()
            change(tensor)
            with torch.no_grad():
                parameters[name].copy_(torch.from_numpy(tensor))
            return replay(self.denoiser(), self.loop(loop))[0]
        finally:
            with torch.no_grad():
                parameters[name].copy_(before)

    def through(self, change, loop="unguided"):
        return replay(Wrapped(self.denoiser(), change), self.loop(loop))[0]


class Wrapped(Denoiser):
    """A denoiser whose evaluations pass through ``change(evaluate, sample, timestep, conditions)``."""

    def __init__(self, inner, change):
        super().__init__(inner.spec, lambda feeds: {})
        self.inner, self.change = inner, change

    def prepare(self, timesteps, sample_sizes, conditions):
        self.inner.prepare(timesteps, sample_sizes, conditions)

    def with_variance(self, sample, timestep, conditions):
        return self.change(self.inner.with_variance, sample, timestep, conditions)


def wrap(patch, change):
    load = gates.load_denoiser
    patch.setattr(gates, "load_denoiser", lambda *given: Wrapped(load(*given), change))


# ------------------------------------------------------------------------------------- faults around the network


def late(by):
    return lambda evaluate, x, t, conditions: evaluate(x, t + by, conditions)


def first_prompt(evaluate, x, t, conditions):
    return evaluate(x, t, {n: np.repeat(v[:1], len(v), axis=0) for n, v in conditions.items()})


def nan_in_one(evaluate, x, t, conditions):
    output = evaluate(x, t, conditions).copy()
    if 290 < t < 310:
        output[3, 0, 4, 4] = np.nan
    return output


def louder_at(step):
    """Wrong at one evaluation of a loop of 20 only."""

    def change(evaluate, x, t, conditions):
        output = evaluate(x, t, conditions)
        return output * np.float32(1.05) if abs(t - step) < 1e-6 else output

    return change


def keep_first_prompt(root, patch):
    keys = hoisted.HoistedNetwork._keys
    known: dict[Any, Any] = {}
    patch.setattr(
        hoisted.HoistedNetwork,
        "_keys",
        lambda self, conditions, shape: known.setdefault(shape, keys(self, conditions, shape)),
    )


def swap_halves(root, patch):
    patch.setattr(
        plain, "halves", lambda conditions, without: {n: np.concatenate([v, without[n]]) for n, v in conditions.items()}
    )


def swapped_in_eager(model):
    loop = model.loop("guided")
    return replay(
        model.denoiser(), replace(loop, conditions=dict(loop.unconditional), unconditional=dict(loop.conditions))
    )[0]


def declare(**fields):
    def inject(root, patch):
        opened = Bundle.open(root)
        with opened.edit() as edit:
            edit.set_manifest(model=replace(opened.manifest.model, **fields))

    return inject


def by_table(sampler, prediction=None):
    """Eager's loop with the table of another sampler or prediction."""

    def draw(model):
        loop, spec = model.loop("unguided"), model.spec
        if prediction is not None:
            # The network's output taken for another quantity: the same loop over a wrong conversion.
            table = loop.table
            wrong = replace(table, outputs=-table.outputs)
            return sample(lambda x, t: model.denoiser()(x, t, loop.conditions), wrong, loop.x_T)
        return replay(model.denoiser(), replace(loop, table=solver_table(sampler, spec.path, spec.prediction, 20)))[0]

    return draw


def other_table(root, patch):
    read = gates.read

    def other(opened):
        golden, spec = read(opened), opened.manifest.model
        table = replace(solver_table("dpmpp_2m", spec.path, spec.prediction, 20), sampler="flow_euler")
        return replace(golden, trajectories=tuple(replace(loop, table=table) for loop in golden.trajectories))

    patch.setattr(gates, "read", other)


def reversed_noise(root, patch):
    def turned(seed, numbers, shape, *, stream=0):
        return batch_normal(seed, list(numbers)[::-1], shape, stream=stream)

    patch.setattr(pipeline, "batch_normal", turned)


def reversed_in_eager(model):
    loop = model.loop("guided")
    return replay(model.denoiser(), replace(loop, x_T=loop.x_T[::-1].copy()))[0]


def overflow(root, patch):
    """Equal in fp32 and beyond fp16: large values, undone behind them; its range audit is of the weights before."""

    def grow(tensor):
        tensor[256:] *= 1e5

    edit_weights(root, QKV, grow, rebuild=False)
    edit_weights(root, "blocks.3.attn.qkv.bias", grow, rebuild=False)
    edit_weights(root, "blocks.3.attn.proj.weight", lambda t: np.multiply(t, 1e-5, out=t), rebuild=False)
    bundle = Bundle.open(root)
    entry = bundle.manifest.graphs["step"]
    forged = {
        "version": 1,
        "sources": {name: bundle.manifest.files[name].sha256 for name in (entry.file, entry.weights)},
        "keep_high": {"fp16": [], "bf16": []},
    }
    with bundle.edit() as edit:
        edit.add_json("calibration/ranges.json", forged)
    build(root, target("cpu"), recipe("fp16"), library="onnxruntime")


def never(model):
    return np.full_like(model.loop("unguided").final, np.nan)


def weight(name, change, *, level="L1", loop="unguided", harmless=False):
    layer = name.rpartition(".")[0]
    words = f"{change.__name__.replace('_', '-')}-{layer}"
    return Fault(
        name=words,
        inject=lambda root, patch: edit_weights(root, name, change),
        eager=lambda model: model.with_weight(name, change, loop),
        level=level,
        names="" if harmless else layer,
    )


COUNTING = (
    *(weight(name, flip_largest) for name in (QKV, FC2, HEAD)),
    *(weight(name, scale_channel) for name in (QKV, FC2, HEAD)),
    Fault(
        name="flip-in-the-plan-alone",
        inject=in_plan("step", "blocks.1.mlp.fc1/Transpose", flip_largest),
        eager=lambda model: model.with_weight("blocks.1.mlp.fc1.weight", flip_largest),
        level="L1",
        names="layer blocks.1.mlp.fc1",
    ),
    Fault(
        name="nan-in-one-class-of-the-plan",
        inject=in_plan("schedule", TABLE.rpartition(".")[0], nan_row),
        eager=never,
        level="L0",
        names="layer y_embedder",
    ),
    Fault(
        name="epsilon-taken-for-v",
        inject=declare(prediction=EPSILON),
        eager=by_table("flow_euler", EPSILON),
        level="L0",
        names="prediction is epsilon",
    ),
    Fault(
        name="timesteps-one-off",
        inject=lambda root, patch: wrap(patch, late(-1.0)),
        eager=lambda model: model.through(late(-1.0)),
        level="L1",
        names="instead of",
    ),
    Fault(
        name="timesteps-one-off-in-the-plan",
        inject=shifted_in_plan(-1.0),
        eager=lambda model: model.through(late(-1.0)),
        level="L1",
        names="of graph schedule",
    ),
    Fault(
        name="halves-of-guidance-swapped",
        inject=swap_halves,
        eager=swapped_in_eager,
        level="L2",
        names="look at guidance",
        loop="guided",
    ),
    Fault(
        name="scheduler-declared-wrongly",
        inject=declare(sampling=Sampling(sampler="dpmpp_2m", guidance_scale=1.5)),
        eager=by_table("dpmpp_2m"),
        level="L0",
        names="sampler is dpmpp_2m",
    ),
    Fault(
        name="loop-of-another-scheduler",
        inject=other_table,
        eager=by_table("dpmpp_2m"),
        level="L0",
        names="other coefficients",
    ),
    Fault(
        name="nan-in-one-sample",
        inject=lambda root, patch: wrap(patch, nan_in_one),
        eager=never,
        level="L0",
        names="sample 3 at timestep 300",
    ),
    Fault(
        name="wrong-at-one-evaluation",
        inject=lambda root, patch: wrap(patch, louder_at(650.0)),
        eager=lambda model: model.through(louder_at(650.0)),
        level="L2",
        names="in evaluation 8 of 20",
    ),
    Fault(
        name="seeds-in-another-order",
        inject=reversed_noise,
        eager=reversed_in_eager,
        level="L2",
        names="look at the noise",
        loop="guided",
    ),
    Fault(
        name="first-prompts-tensors-kept",
        inject=keep_first_prompt,
        eager=lambda model: model.through(first_prompt),
        level="L1",
        names="another order",
    ),
)

HARMLESS = (
    weight(QKV, nudge_one, harmless=True),
    weight(FC2, nudge_channel, harmless=True),
    Fault(
        name="timesteps-off-by-a-rounding",
        inject=lambda root, patch: wrap(patch, late(1e-5)),
        eager=lambda model: model.through(late(1e-5)),
        level="",
        names="",
    ),
)
