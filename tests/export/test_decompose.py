"""Rewrites at single nodes give the graph that PyTorch's own decomposition gives, or leave the work to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from lehr.engines.graph.weights import bind_weights, save_graph
from lehr.export import decompose, trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.errors import ExportFailed
from lehr.runtime.paths import VP
from lehr.runtime.prediction import EPSILON
from lehr.runtime.spec import BATCH, Dim, ModelSpec, TensorSpec, Varies

SHAPE = ("batch", 6, "height", "width")
SPEC = ModelSpec(
    name="one-operator",
    inputs=(
        TensorSpec(name="sample", shape=SHAPE, varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
    ),
    outputs=(TensorSpec(name="output", shape=SHAPE, varies=Varies.SAMPLE),),
    dims=(BATCH, *(Dim(name=name, default=8, min=4, max=32, multiple=4) for name in ("height", "width"))),
    path=VP(),
    prediction=EPSILON,
)


def _tokens_and_back(x: Tensor) -> Tensor:
    return x.flatten(2).mT.contiguous().mT.unflatten(2, x.shape[2:])


LOCAL: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda x: x.reshape(x.shape[0], 3, -1, x.shape[3]).sin().reshape(x.shape),
    "reshape of what is not contiguous": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 6).mT.reshape(x.shape),
    "flatten and unflatten": _tokens_and_back,
    "flatten from the front": lambda x: x.flatten(0, 1).cos().unflatten(0, (x.shape[0], 6)),
    "flatten of one axis": lambda x: x.flatten(2, 2).flatten(1, 1).exp(),
    "unflatten to fixed sizes": lambda x: x.unflatten(1, (2, -1)).flip(1).flatten(1, 2),
    "chunk": lambda x: torch.cat(x.chunk(4, dim=1)[::-1], dim=1),
    "conversion": lambda x: x.to(torch.float64).sin().to(torch.float32).to(torch.float32),
    "conversion at the end": lambda x: x.sin().to(torch.float32),
    "subtraction from a number": lambda x: 1 - x,
}
GLOBAL: dict[str, Callable[[Tensor], Tensor]] = {
    "mutation": lambda x: x.clone().mul_(2).add_(1),
    "scaled subtraction": lambda x: torch.rsub(x, 1, alpha=2),
    "another view": lambda x: x.movedim(1, 3).sin().movedim(3, 1),
}


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.transposed = nn.ConvTranspose2d(6, 6, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.transposed(self.function(sample)) + timestep.reshape(-1, 1, 1, 1)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What ``decompose_locally`` answered."""
    given: list[bool] = []

    def watched(program, table):
        given.append(decompose.decompose_locally(program, table))
        return given[-1]

    monkeypatch.setattr(trace, "decompose_locally", watched)
    return given


@pytest.mark.parametrize("name", [*LOCAL, *GLOBAL])
def test_an_operator_computes_what_it_does_in_pytorch_at_sizes_not_traced_at(name, answers, tmp_path) -> None:
    torch.manual_seed(0)
    module = Wrapped((LOCAL | GLOBAL)[name]).eval()
    graph = trace.trace(module, SPEC)
    assert answers == [name in LOCAL]
    bind_weights([graph], TorchModuleSource(module), tmp_path / "weights.safetensors")
    save_graph(graph, tmp_path / "step.onnx")
    session = ort.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 4, 12), (3, 16, 4)):
        sample, timestep = torch.randn(batch, 6, height, width), torch.rand(batch)
        (got,) = session.run(None, {"sample": sample.numpy(), "timestep": timestep.numpy()})
        with torch.no_grad():
            expected = module(sample, timestep).numpy()
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", LOCAL)
def test_the_graph_has_the_operators_that_pytorch_would_leave(name, monkeypatch) -> None:
    module = Wrapped(LOCAL[name]).eval()
    local = trace.trace(module, SPEC)
    monkeypatch.setattr(trace, "decompose_locally", lambda program, table: False)
    whole = trace.trace(module, SPEC)
    sizes = ("Shape", "Squeeze", "Gather", "Concat", "Mul", "Div")  # how these are computed may differ
    first, second = (
        Counter(node.op_type for node in graph.graph if node.op_type not in sizes) for graph in (local, whole)
    )
    assert first <= second  # PyTorch's way leaves copies and a second reshape here and there
    assert set(first) >= set(second) - {"Identity"}


def test_a_free_size_cannot_be_cut_into_a_number_of_chunks() -> None:
    module = Wrapped(lambda x: torch.cat(x.chunk(2, dim=2)[::-1], dim=2)).eval()
    with pytest.raises(ExportFailed, match=r"one-operator: .*SplitToSequence.*\. Slice"):
        trace.trace(module, SPEC)
