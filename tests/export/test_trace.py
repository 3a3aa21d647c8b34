"""Modules traced to ONNX: what ONNX Runtime computes against eager PyTorch, and what is refused and how."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.engines.graph.check import check_graph
from lehr.engines.graph.weights import TIED, UNUSED, bind_weights, node_count, parameter_count, save_graph
from lehr.export.backbones import adm, dit
from lehr.export.trace import trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.denoiser import synthetic_conditions
from lehr.runtime.errors import ExportFailed, InvalidInput
from lehr.runtime.paths import VP
from lehr.runtime.prediction import EPSILON
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies

EXACT = 1e-4  # relative to the largest output; float32 sums in another order
SOURCES = Path(__file__).resolve().parents[2] / "src"

# ----------------------------------------------------------------------------------------------------- modules


def randomise(module: nn.Module) -> nn.Module:
    """Weights of unit gain, those included that training starts at zero."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            gain = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * gain)
    return module.eval()


def picture_spec(
    *conditions: TensorSpec, multiple: int = 1, low: int | None = None, dims: tuple[Dim, ...] = (), **changes: Any
) -> ModelSpec:
    """(B, 3, height, width) in and out, traced at 16."""
    side: dict[str, Any] = {"default": 16, "min": low or multiple, "max": 64, "multiple": multiple}
    size = ("batch", 3, "height", "width")
    made: dict[str, Any] = {
        "name": "toy",
        "inputs": (
            TensorSpec(name="sample", shape=size, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            *conditions,
        ),
        "outputs": (TensorSpec(name="output", shape=size, varies=Varies.SAMPLE),),
        "dims": (BATCH, Dim(name="height", **side), Dim(name="width", **side), *dims),
        "path": VP(),
        "prediction": EPSILON,
    }
    return ModelSpec(**{**made, **changes})


TINY_DIT = dit.Params(in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=True)
TINY_ADM = adm.Params(
    in_channels=2,
    out_channels=2,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsampling=(2,),
    num_head_channels=32,
    num_classes=6,
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    module: nn.Module
    spec: ModelSpec
    graph: ir.Model
    folder: Path
    session: ort.InferenceSession

    def error(self, batch: int, **sizes: int) -> float:
        """Largest difference from eager, relative to the largest output, at sizes of the caller's choice."""
        feeds = random_feeds(self.spec, batch, **sizes)
        found = dict(zip([o.name for o in self.spec.outputs], self.session.run(None, feeds), strict=True))
        self.spec.check_outputs(found, self.spec.check_feeds(feeds))
        with torch.no_grad():
            expected = self.module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        outputs = [expected] if isinstance(expected, Tensor) else expected
        pairs = zip(found.values(), (output.numpy() for output in outputs), strict=True)
        return max(float(abs(ours - eager).max() / abs(eager).max()) for ours, eager in pairs)


def random_feeds(spec: ModelSpec, batch: int, **sizes: int) -> dict[str, Any]:
    rng, bound = np.random.default_rng(batch), spec.default_sizes(batch=batch, **sizes)
    feeds: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = tensor.sizes(bound)
        if tensor.dtype is DType.INT64:
            feeds[tensor.name] = rng.integers(0, spec.num_classes or 3, shape)
        else:
            scale = 1000 * rng.random(shape) if tensor is spec.timestep else rng.standard_normal(shape)
            feeds[tensor.name] = scale.astype(tensor.dtype.numpy)
    return feeds


def export(module: nn.Module, spec: ModelSpec, folder: Path, **options: Any) -> Exported:
    graph = trace(module, spec, **options)
    bind_weights(graph, TorchModuleSource(module), folder / "weights.safetensors")
    save_graph(graph, folder / "step.onnx")
    check_graph(folder / "step.onnx", spec)
    session = ort.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])
    return Exported(module=module, spec=spec, graph=graph, folder=folder, session=session)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    spec = dit.spec("tiny-dit", TINY_DIT, size=8, path=VP(), prediction=EPSILON)
    return export(randomise(dit.DiT(TINY_DIT)), spec, tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    spec = adm.spec("tiny-adm", TINY_ADM, size=8, classes=5, path=VP(), prediction=EPSILON)
    return export(randomise(adm.ADM(TINY_ADM)), spec, tmp_path_factory.mktemp("adm"))


@pytest.fixture(params=["transformer", "unet"])
def backbone(request: pytest.FixtureRequest) -> Exported:
    made: Exported = request.getfixturevalue(request.param)
    return made


# ----------------------------------------------------------------------------------------------- against eager


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_backbone_computes_the_same_at_batches_it_was_not_traced_at(backbone: Exported, batch: int) -> None:
    assert backbone.error(batch) < EXACT


@pytest.mark.parametrize(("height", "width"), [(12, 8), (4, 20), (32, 16), (8, 2)])
def test_a_backbone_computes_the_same_at_sizes_it_was_not_traced_at(
    backbone: Exported, height: int, width: int
) -> None:
    assert backbone.error(2, height=height, width=width) < EXACT


def test_operators_stay_whole(backbone: Exported) -> None:
    found = {node.op_type for node in backbone.graph.graph}
    assert found >= {"Attention", "Gemm", "GroupNormalization" if backbone.spec.family == "adm" else "Gelu"}
    assert not found & {"Softmax", "Erf", "InstanceNormalization", "SequenceAt", "Identity", "Dropout"}


def test_weights_bear_the_names_of_the_state_dict(backbone: Exported) -> None:
    weights = {
        name: tuple(value.shape.numpy())
        for name, value in backbone.graph.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert weights == {name: tuple(value.shape) for name, value in backbone.module.state_dict().items()}
    assert parameter_count(backbone.graph) == sum(p.numel() for p in backbone.module.parameters())


def test_nodes_are_named_after_modules_and_sizes_after_dimensions(backbone: Exported) -> None:
    names = {node.name for node in backbone.graph.graph}
    expected = "blocks.1.attn/Attention" if backbone.spec.family == "dit" else "middle_block.1/Attention"
    assert expected in names
    assert len(names) == node_count(backbone.graph)
    sizes = {
        str(size)
        for node in backbone.graph.graph
        for output in node.outputs
        for size in output.shape or ()
        if not isinstance(size, int)
    }
    half = "height*width/4"
    assert {"batch", half} <= sizes
    allowed = {"batch", "height", "width"}
    assert all(set(ir.SymbolicDim(size).free_symbols()) <= allowed for size in sizes)


def test_every_intermediate_tensor_has_a_shape_and_a_type(backbone: Exported) -> None:
    for node in backbone.graph.graph:
        for output in node.outputs:
            assert output.dtype is not None
            assert output.shape is not None
            assert all(isinstance(size, int) or size.value is not None for size in output.shape), node.name


def test_a_saved_graph_holds_no_path_of_this_machine_and_none_of_the_weights(backbone: Exported) -> None:
    data = (backbone.folder / "step.onnx").read_bytes()
    assert len(data) < 300_000
    for text in (b".py", b"line ", str(SOURCES.parent).encode(), str(backbone.folder).encode(), b"pkg.torch"):
        assert text not in data, text


def test_the_graph_depends_on_the_architecture_alone(transformer: Exported, tmp_path: Path) -> None:
    """Traced from real float32 weights, and from the meta device in half precision."""
    with torch.device("meta"):
        hollow = dit.DiT(TINY_DIT).half()
    save_graph(trace(hollow, transformer.spec), tmp_path / "step.onnx")
    assert (tmp_path / "step.onnx").read_bytes() == (transformer.folder / "step.onnx").read_bytes()


def test_older_operator_sets_compute_the_same(tmp_path: Path) -> None:
    exported = export(randomise(Captioned()), picture_spec(TEXT, dims=(LENGTH,)), tmp_path, opset=18)
    assert exported.graph.opset_imports == {"": 18}
    assert "Softmax" in {node.op_type for node in exported.graph.graph}
    assert exported.error(3, height=12) < EXACT


@pytest.mark.parametrize("opset", [17, 24])
def test_an_operator_set_outside_the_range_is_refused(opset: int) -> None:
    with pytest.raises(InvalidInput, match=f"18 to 23, got {opset}"):
        trace(Toy(), picture_spec(), opset=opset)


# ------------------------------------------------------------------------------------------------- the same graph


def proto(graph: ir.Model, folder: Path) -> bytes:
    save_graph(graph, folder / "step.onnx")
    return (folder / "step.onnx").read_bytes()


def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    """Python orders sets of strings differently in each process; no byte may depend on that."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_trace import Shared, picture_spec, proto, trace\n"
        "sys.stdout.buffer.write(proto(trace(Shared(), picture_spec()), Path(sys.argv[2])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "PYTHONHASHSEED": "1"}  # ours is another
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=600)
    assert done.stdout == proto(trace(Shared(), picture_spec()), tmp_path)


def test_tracing_leaves_the_module_as_it_was() -> None:
    module = Shared().train()
    before = {name: (id(value), value.clone()) for name, value in module.state_dict(keep_vars=True).items()}
    trace(module, picture_spec())
    assert module.training
    for name, value in module.state_dict(keep_vars=True).items():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])


def test_dit_xl_2_is_traced_without_its_weights(tmp_path: Path) -> None:
    """675M parameters, 2.7 GB of weights, of which 1.2 GB would not hold half."""
    code = (
        "import sys, torch; from pathlib import Path; from lehr.runtime.host import peak_rss_mb\n"
        "from lehr.export.backbones import preset; from lehr.export.trace import trace\n"
        "from lehr.engines.graph.weights import parameter_count, save_graph\n"
        "chosen = preset('dit-xl-2')\n"
        "with torch.device('meta'): module = chosen.module()\n"
        "graph = trace(module, chosen.spec); save_graph(graph, Path(sys.argv[1]))\n"
        "print(parameter_count(graph), round(peak_rss_mb()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-c", code, str(tmp_path / "step.onnx")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    parameters, megabytes = map(int, done.stdout.split())
    assert parameters == 674_834_720
    assert megabytes < 1200
    assert (tmp_path / "step.onnx").stat().st_size < 1e6


# --------------------------------------------------------------------------------------------- users' own modules


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) * timestep[:, None, None, None]


class Labelled(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(sample, timestep) + self.table(class_labels)[:, :, None, None]


class Captioned(Toy):
    """Cross-attention to (B, L, D), in a packed ``nn.MultiheadAttention``; dropout that evaluation leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True, dropout=0.5)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text, b, c = encoder_hidden_states, sample.shape[0], sample.shape[1]
        tokens = self.enter(sample.flatten(2).transpose(1, 2))
        seen, _ = self.attention(tokens, text, text, need_weights=False)
        return super().forward(sample, timestep) + self.leave(seen).transpose(1, 2).reshape(b, c, *sample.shape[2:])


class Constants(Toy):
    """Values that no state dict holds: a buffer, an attribute, and one made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 300)[None, :3, None, None], persistent=False)
        self.register_buffer("kept", torch.full((3, 1, 1), 5.0))
        self.register_buffer("counter", torch.tensor(7))
        self.attribute = torch.tensor([3.0, 2.0, 1.0])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        made = torch.tensor([0.5, 0.25, 0.125])
        constants = self.table + self.kept + (self.attribute * made)[:, None, None] + self.counter
        return super().forward(sample, timestep) + constants


class Shared(Toy):
    """Two layers with one weight, and one layer that the output does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.second(self.first(sample.movedim(1, -1)).sin()).movedim(-1, 1)
        return super().forward(x, timestep)


class Two(Toy):
    def forward(self, timestep: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(sample, timestep), sample.mean(dim=(2, 3))


class Halving(Toy):
    """A U-Net in a nutshell: sizes must be multiples of 4."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        small = F.avg_pool2d(F.avg_pool2d(super().forward(sample, timestep), 2), 2)
        return sample + F.interpolate(F.interpolate(small, scale_factor=2), scale_factor=2)


LABELS = TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
TEXT = TensorSpec(name="encoder_hidden_states", shape=("batch", "length", 6), varies=Varies.PROMPT)
LENGTH = Dim(name="length", default=7, max=77)
MEANS = TensorSpec(name="means", shape=("batch", 3), varies=Varies.SAMPLE)


@pytest.mark.parametrize(
    ("make", "spec", "sizes"),
    [
        (Labelled, picture_spec(LABELS, num_classes=4), {}),
        (Captioned, picture_spec(TEXT, dims=(LENGTH,)), {"length": 1}),
        (Captioned, picture_spec(TEXT, dims=(LENGTH,)), {"length": 77}),
        (Constants, picture_spec(), {}),
        (Shared, picture_spec(), {}),
        (Two, picture_spec(outputs=(*picture_spec().outputs, MEANS)), {}),
        (Halving, picture_spec(multiple=4), {"width": 60}),
    ],
)
def test_a_users_module_computes_the_same(
    make: Callable[[], nn.Module], spec: ModelSpec, sizes: dict[str, int], tmp_path: Path
) -> None:
    exported = export(randomise(make()), spec, tmp_path)
    for batch in (1, 5):
        assert exported.error(batch, height=8, **sizes) < EXACT


def test_a_floating_condition_of_a_released_spec_gets_feeds_from_it() -> None:
    conditions = synthetic_conditions(picture_spec(TEXT, dims=(LENGTH,)), 3, seed=0)
    assert conditions["encoder_hidden_states"].shape == (3, 7, 6)


def test_buffers_of_the_state_dict_are_weights_and_others_are_embedded(tmp_path: Path) -> None:
    graph = trace(Constants(), picture_spec())
    unbound = {name for name, value in graph.graph.initializers.items() if value.const_value is None}
    assert unbound == {"conv.weight", "conv.bias", "kept", "counter"}
    embedded = np.concatenate(
        [v.const_value.numpy().ravel() for v in graph.graph.initializers.values() if v.const_value is not None]
    )
    np.testing.assert_allclose(np.linspace(-1, 1, 300)[:3], [x for x in embedded if x < 0], rtol=1e-6)


def test_the_graph_notes_shared_and_idle_weights() -> None:
    graph = trace(Shared(), picture_spec())
    assert graph.metadata_props[UNUSED] == '["idle.weight", "idle.bias"]'
    assert graph.metadata_props[TIED] == '{"first.weight": "second.weight"}'
    assert {"first.weight", "idle.weight"}.isdisjoint(graph.graph.initializers)


def test_an_input_that_forward_ignores_stays_in_the_signature(tmp_path: Path) -> None:
    class Still(Toy):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.conv(sample)

    assert export(Still(), picture_spec(), tmp_path).error(3, width=5) < EXACT


# ------------------------------------------------------------------------------------------------ what is refused


class ReadsValues(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) if sample.mean() > 0 else sample


class FixedTable(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample + torch.ones(1, 1, 16, 1)


class FixedResult(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.ones(1, 3, 16, 16) * super().forward(sample, timestep).mean(dim=(2, 3), keepdim=True)


class FixedBatch(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample).reshape(2, 3, sample.shape[2], sample.shape[3])


class Square(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) + sample.mT


class OtherPathWhenLarge(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) if sample.shape[2] > 20 else sample


class OtherPathAtOneSize(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) if sample.shape[3] == 24 else sample


class Rare(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.special.airy_ai(sample)


class Fails(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        raise KeyError("no such thing")


class OtherNames(Toy):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


class AnyNames(Toy):
    def forward(self, **inputs: Tensor) -> Tensor:
        return self.conv(inputs["sample"])


class Named(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"output": sample}


class Nothing(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> None:  # type: ignore[override]
        return None


class Half(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample.half()


class Counts(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.calls.add_(1)
        return sample + self.calls


class Random(Toy):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample + torch.randn_like(sample)


class Lazy(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.LazyLinear(3)


class Uncopiable(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.events = (event for event in ())


REFUSED: list[tuple[type[nn.Module], dict[str, Any], list[str]]] = [
    (ReadsValues, {}, ["decides on the values", "test_trace.py", "sample.mean() > 0", "torch.where"]),
    (FixedTable, {}, ["'height' of input 'sample' cannot stay dynamic", "constant (16)", "height = 16"]),
    (FixedTable, {"multiple": 2}, ["'height' of input 'sample' cannot stay dynamic", "constant (16)"]),
    (FixedResult, {}, ["output 'output' has shape (batch, 3, 16, 16)", "'height', 'width'"]),
    (FixedBatch, {}, ["'batch' of input 'sample' cannot stay dynamic", "constant (2)"]),
    (Square, {}, ["'width' of input 'sample' cannot stay dynamic", "must always be equal"]),
    (Square, {"multiple": 2}, ["'width' of input 'sample' cannot be chosen freely"]),
    (Halving, {"low": 2}, ["'height' of input 'sample' cannot stay dynamic"]),
    (Halving, {"multiple": 2}, ["'height' of input 'sample' cannot be 14", "4*(height//4)", "multiple"]),
    (OtherPathWhenLarge, {}, ["'height' of input 'sample'", "height <= 20"]),
    (OtherPathWhenLarge, {"multiple": 2}, ["'height' of input 'sample' cannot be 22", "height <= 20"]),
    (OtherPathAtOneSize, {"multiple": 2}, ["'width' of input 'sample' cannot be 24", "Ne(width, 24)"]),
    (Rare, {}, ["cannot be written as ONNX", "airy_ai"]),
    (Fails, {}, ["KeyError: 'no such thing'", "test_trace.py", "sample (2, 3, 16, 16)"]),
    (OtherNames, {}, ["forward(x:", "['sample', 'timestep']", "missing a required argument"]),
    (AnyNames, {}, ["**inputs", "as a parameter"]),
    (Named, {}, ["returns dict of 1 values", "['output']"]),
    (Two, {}, ["returns tuple of 2 values", "['output']"]),
    (Nothing, {}, ["'output' is no tensor"]),
    (Half, {}, ["torch.float16", "float32"]),
    (Counts, {}, ["changes its buffer 'calls'"]),
    (Random, {}, ["draws random numbers (RandomNormalLike)"]),
    (Lazy, {}, ["'late.weight' has no shape yet"]),
    (Uncopiable, {}, ["cannot be copied", "generator"]),
]


@pytest.mark.parametrize(
    ("module", "options", "said"),
    REFUSED,
    ids=[f"{module.__name__}-{'-'.join(map(str, options.values()))}" for module, options, _ in REFUSED],
)
def test_a_module_that_cannot_be_served_is_refused_with_the_reason(
    module: type[nn.Module], options: dict[str, Any], said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportFailed) as caught:
        trace(module(), picture_spec(**options))
    message = str(caught.value)
    assert message.startswith("toy: ")
    assert [text for text in said if text not in message] == [], message
    assert len(message) < 700
    assert "\n" not in message
    assert capfd.readouterr() == ("", ""), "PyTorch's own reports are in the cause of the error"
