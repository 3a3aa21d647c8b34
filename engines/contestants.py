"""What ``lehr bench`` measures: a bundle's engines that run here, and other ways to run the model it was made from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.engines.bench import Contestant, Row, child_environment
from lehr.engines.roofline import Bound, bound, measured_roof, roof_of, stored_bytes
from lehr.engines.target import target as find_target
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import recipe_of
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.engine import STEP, EngineRecord
from lehr.runtime.errors import BundleError, IncompatibleEngine, InvalidInput, MissingExtra, RunFailed
from lehr.runtime.golden import INDEX_FILE, read
from lehr.runtime.host import cpu_features
from lehr.runtime.noise import batch_normal

Array = npt.NDArray[Any]

EAGER = "eager fp32"
SAME_WEIGHTS_DB = 60.0  # eager fp32 repeats itself to over 100 dB; other weights are below 30
_PYTHON = (sys.executable, "-m")


def runnable(bundle: Bundle, target: str | None, recipes: Sequence[str]) -> list[EngineRecord]:
    """The engines of a bundle that this machine can load, of one target and some recipes where those are named.

    Raises:
        BundleError: there is none.
        IncompatibleEngine: one that is named, or the only ones there are, do not fit this machine.
    """
    if recipes:
        found = [engines.find(bundle, target or "cpu", name) for name in recipes]
        for record in found:
            engines.check(bundle, record)
        return found
    found = [record for record in engines.engines(bundle) if target in (None, record.target)]
    problems = {record.folder: _problem(bundle, record) for record in found}
    able = [record for record in found if problems[record.folder] is None]
    if not able:
        if found:
            raise BundleError(f"no engine in {bundle.root.name} runs here: {problems[found[0].folder]}")
        raise BundleError(
            f"{bundle.root.name} holds no engine{f' for {target}' if target else ''}. "
            f"Build one: lehr build {bundle.root} --target {target or 'cpu'}"
        )
    return able


def _problem(bundle: Bundle, record: EngineRecord) -> str | None:
    try:
        engines.check(bundle, record)
    except (IncompatibleEngine, MissingExtra, BundleError) as e:
        return str(e)
    return None


def contestants(bundle: Bundle, records: Sequence[EngineRecord]) -> list[Contestant]:
    """A process for each engine."""
    return [
        Contestant(
            name=named(record, records),
            command=(*_PYTHON, "lehr.runtime.timing", str(bundle.root), record.folder),
            size=sum(bundle.manifest.files[name].bytes for name in bundle.names(record.folder + "/")),
            loops=True,
        )
        for record in records
    ]


def named(record: EngineRecord, records: Sequence[EngineRecord]) -> str:
    """Of an engine among others: Lehr, the recipe and the library, and the target where there are several."""
    several = len({other.target for other in records}) > 1
    return " ".join(["lehr", record.recipe, record.library, *([record.target] if several else [])])


def evaluations(bundle: Bundle, batch: int) -> tuple[list[dict[str, Array]], list[Array]]:
    """Inputs of single evaluations, and what eager returned for each: the recorded ones where there is golden data.

    Those are what the network sees in a loop; samples are repeated up to the batch. The middle timestep comes first.
    Without golden data it is noise in the middle of the path, and no results.
    """
    spec = bundle.manifest.model
    spec.dim("batch").check(batch, "the sample")
    kind = spec.timestep.dtype.numpy
    if INDEX_FILE not in bundle.manifest.files:
        sample = batch_normal(0, range(batch), spec.sample_shape(batch)[1:]).astype(spec.sample.dtype.numpy)
        feeds = {spec.sample.name: sample, spec.timestep.name: spec.path.timestep_of([1.0]).astype(kind).repeat(batch)}
        return [{**feeds, **synthetic_conditions(spec, batch, seed=0)}], []
    steps = read(bundle).steps
    rows = np.arange(batch) % len(steps.inputs[0])
    batched = {tensor.name for tensor in spec.conditions if tensor.batched}
    conditions = {name: value[rows] if name in batched else value for name, value in steps.conditions.items()}
    order = sorted(range(len(steps.timesteps)), key=lambda k: abs(k - len(steps.timesteps) // 2))
    made = [
        {spec.sample.name: steps.inputs[k][rows], spec.timestep.name: np.full(batch, steps.timesteps[k], kind)}
        for k in order
    ]
    return [feeds | conditions for feeds in made], [steps.outputs[k][rows] for k in order]


# ---------------------------------------------------------------------------------------------------------- peers


def peers(source: str, feeds: Path, scratch: Path) -> list[Contestant]:
    """Other ways to run a model, eager PyTorch first; bf16 where the processor computes in it.

    Args:
        source: what ``lehr export`` took.
        feeds: inputs of an evaluation, as a file.
        scratch: the graph that plain ``torch.onnx.export`` makes is written there.

    Raises:
        MissingExtra: a library is not installed.
        RunFailed: plain ``torch.onnx.export`` fails on the model.
    """
    for module, extra in (("torch", "export"), ("onnxruntime", "cpu"), ("openvino", "openvino")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module, extra)
    graph = scratch / "peer.onnx"
    made = subprocess.run(
        [*_PYTHON, "lehr.export.peers", "onnx", source, str(feeds), str(graph)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    if made.returncode != 0:
        last = (made.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"plain torch.onnx.export of {source} failed: {last}. Measure without --peers.")
    torch = {EAGER: "eager-fp32", "torch.compile fp32": "compile-fp32"}
    plain = {"onnxruntime fp32": "onnxruntime", "openvino f32": "openvino-f32"}
    if {"avx512_bf16", "amx_bf16"} & set(cpu_features()):
        torch |= {"eager bf16": "eager-bf16", "torch.compile bf16": "compile-bf16"}
        plain |= {"openvino bf16 (its default)": "openvino"}
    return [
        *(Contestant(name=n, command=(*_PYTHON, "lehr.export.peers", kind, source)) for n, kind in torch.items()),
        *(Contestant(name=n, command=(*_PYTHON, "lehr.engines.peers", k, str(graph))) for n, k in plain.items()),
    ]


def check_same_weights(bundle: Bundle, rows: Sequence[Row]) -> None:
    """Raise InvalidInput if the peers run other weights than the bundle's: eager fp32 then differs."""
    found = {row.name: row.sqnr_db for row in rows if row.sqnr_db is not None}
    ours = [db for name, db in found.items() if name.startswith("lehr fp32")]
    if EAGER in found and min([found[EAGER], *ours]) < SAME_WEIGHTS_DB:
        raise InvalidInput(
            f"{bundle.manifest.source} is not the model that {bundle.root.name} was made from: eager fp32 and the "
            f"engine differ by {min([found[EAGER], *ours]):g} dB. Peers need that source with the same weights: export "
            "it again, or measure without --peers."
        )


# ---------------------------------------------------------------------------------------------------------- roof


def least_time(bundle: Bundle, record: EngineRecord, feeds: Mapping[str, Array]) -> Bound:
    """What one evaluation by an engine could take at least; measured on CPUs, published figures for GPUs."""
    entry, recipe, machine = (
        bundle.manifest.graphs[STEP],
        recipe_of(bundle, record.recipe),
        find_target(record.target),
    )
    roof = roof_of(machine, recipe) if machine.sm else measured_roof()
    batch = len(feeds[bundle.manifest.model.sample.name])
    return bound(entry, batch, stored_bytes(entry, recipe), sum(value.nbytes for value in feeds.values()), roof)
