"""What tests of backbones share: diffusers as an oracle in float64, and what an export must compute again."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from small_backbones import random_feeds, unseen
from torch import Tensor, nn

from lehr.engines.graph.check import check_graph
from lehr.engines.graph.split import split
from lehr.engines.graph.weights import bind_weights, save_graph
from lehr.export.checkpoints import rules
from lehr.export.checkpoints.rules import Rule
from lehr.export.trace import trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.backends.onnxruntime import BACKEND
from lehr.runtime.hoisted import HoistedNetwork
from lehr.runtime.spec import ModelSpec

ROUNDED = 1e-5  # diffusers as it is
EXACT = 1e-9  # diffusers with its float32 roundings taken out
EXPORTED = 1e-4  # of a graph in float32, relative to the largest output

# ------------------------------------------------------------------------------------------------- the oracle


def without_rounding(monkeypatch: pytest.MonkeyPatch, roundings: Sequence[tuple[Any, str]]) -> None:
    """Recompile diffusers' own source with float64 in place of float32: functions and classes of a module, wherever
    they are imported, and methods of a class."""
    for owner, name in roundings:
        original = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(original))
        exact = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
        assert exact != source, f"{name} no longer rounds; take it out of the list"
        module = inspect.getmodule(original)
        namespace = dict(vars(module))
        exec(compile(exact, f"{module.__file__} (float64)", "exec"), namespace)  # type: ignore[union-attr]
        if inspect.isclass(owner):
            monkeypatch.setattr(owner, name, namespace[name])
            continue
        if inspect.isfunction(original):  # its globals are its module's, where the other functions are replaced
            code = namespace[name].__code__
            monkeypatch.setattr(original, "__code__", code)
            continue
        for user in [m for n, m in sys.modules.items() if n.startswith("diffusers.models")]:
            if vars(user).get(name) is original:
                monkeypatch.setattr(user, name, namespace[name])


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = float((got - expected).norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.2e}"


def load_mapped(module: nn.Module, reference: nn.Module, table: Sequence[Rule], ignored: Sequence[str] = ()) -> None:
    """Give ``module`` the reference's weights by the key map alone; all of them are used."""
    state = reference.state_dict()
    origins = {key: rules.origin(table, key, state) for key in module.state_dict()}
    used = {key for origin in origins.values() for key in origin.keys}
    left = [key for key in set(state) - used if not rules.ignored(ignored, key)]
    assert not left, f"the map leaves {left} of the checkpoint unused"
    module.load_state_dict({key: origin.read(state.__getitem__) for key, origin in origins.items()})


# ----------------------------------------------------------------------------------------------------- exports


def check_export(
    module: nn.Module, spec: ModelSpec, folder: Path, feeds: dict[str, np.ndarray] | None = None
) -> dict[str, set[str]]:
    """Export, whole and cut by rate, and compare with the module at shapes that were never seen.

    Returns:
        The weights that each part of the cut graph reads, by the part's name.
    """
    graph = trace(module, spec)
    parts = split(graph, spec)
    bind_weights([graph, *(part.model for part in parts.values())], TorchModuleSource(module), folder / "w.safetensors")
    save_graph(graph, folder / "whole.onnx")
    check_graph(folder / "whole.onnx", spec)
    for part_name, part in parts.items():
        save_graph(part.model, folder / f"{part_name}.onnx")
        check_graph(folder / f"{part_name}.onnx", part.spec)
    session = ort.InferenceSession(folder / "whole.onnx", providers=["CPUExecutionProvider"])
    feeds = random_feeds(spec, unseen(spec)) if feeds is None else feeds
    bound = spec.check_feeds(feeds)
    assert all(size != spec.dim(name).default for name, size in bound.items())
    outputs = dict(zip([tensor.name for tensor in spec.outputs], session.run(None, feeds), strict=True))
    spec.check_outputs(outputs, bound)
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).numpy()
    got = outputs[spec.outputs[0].name]
    assert np.abs(expected).max() > 1e-3
    assert np.abs(got - expected).max() <= EXPORTED * np.abs(expected).max()

    # Cut by rate: the same batch, then one of other samples, each at a timestep of its own.
    options = {"intra_op_threads": 0, "spinning": False}
    signatures = {part_name: part.spec for part_name, part in parts.items()}
    network = HoistedNetwork(spec, signatures, lambda part_name: BACKEND.load(folder / f"{part_name}.onnx", options))
    for order in ([*range(bound["batch"])], [1, 0, 0]):
        batch = {
            tensor.name: feeds[tensor.name][order] if tensor.batched else feeds[tensor.name] for tensor in spec.inputs
        }
        of_parts, of_whole = network(batch)[spec.outputs[0].name], session.run(None, batch)[0]
        assert np.abs(of_parts - of_whole).max() <= 1e-5 * np.abs(of_whole).max()
    stored = set(module.state_dict())
    return {name: stored & set(part.model.graph.initializers) for name, part in parts.items()}
