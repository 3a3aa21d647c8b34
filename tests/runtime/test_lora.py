"""LoRAs put into a loaded engine against the same ones merged at export, and taken out again."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.engines.build import build
from lehr.engines.graph.tensor_file import SafetensorsFile, TensorInfo, write_safetensors
from lehr.engines.target import target
from lehr.export.adapters import Adapters
from lehr.export.checkpoints.lora_merge import MergedSource
from lehr.export.checkpoints.lora_targets import bundle_targets, read_lora, write_adapter
from lehr.export.package import Options, export
from lehr.runtime import lora_engine
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, IncompatibleEngine, InvalidInput
from lehr.runtime.golden import Tier
from lehr.runtime.lora import Adapter, Applied, Update, merged, read_adapter, read_applied
from lehr.runtime.lora_onnx import _blocked, _blocked_outputs, initializers
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.recipe import recipe
from lehr.runtime.refit import FILES, refit

SCALE = 0.5
REQUEST = Request(num=2, class_labels=[3, 8], num_inference_steps=3)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_safetensors(path, [(key, TensorInfo(a.dtype, a.shape), lambda a=a: a) for key, a in tensors.items()])
    return path


@pytest.fixture(scope="module")
def published(dit_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of every matrix of digits-dit, under the authors' names: convolution, prompt, schedule and step."""
    weights = SafetensorsFile(dit_bundle / "model/weights.safetensors")
    tensors = {}
    for k, name in enumerate(name for name in weights.names() if len(weights.info(name).shape) > 1):
        rows, *behind = weights.info(name).shape
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.lora_A.weight"] = normal(4, *behind, seed=2 * k) / np.float32(np.sqrt(np.prod(behind)))
        tensors[f"{layer}.lora_B.weight"] = normal(rows, 4, *[1] * (len(behind) - 1), seed=2 * k + 1) / np.float32(4)
    return save(tmp_path_factory.mktemp("lora") / "style.safetensors", tensors)


@pytest.fixture(scope="module")
def converted(dit_bundle: Path, published: Path) -> Path:
    adapter, absent = read_lora(published, bundle_targets(Bundle.open(dit_bundle)))
    assert not absent
    path = published.with_name("style.lora.safetensors")
    write_adapter(adapter, path)
    return path


def test_a_lora_in_a_loaded_engine_equals_the_one_merged_at_export(
    dit_bundle: Path, published: Path, converted: Path, tmp_path: Path
) -> None:
    base = Pipeline.open(dit_bundle)(REQUEST)
    adapted = Pipeline.open(dit_bundle, loras=read_applied([f"{converted}:{SCALE}"]))(REQUEST)
    merged_bundle = tmp_path / "merged.lehr"
    options = Options(tier=Tier.NONE, adapters=Adapters(loras=(f"{published}:{SCALE}",)))
    export("digits-dit", merged_bundle, options, progress=lambda text: None)
    build(merged_bundle, target("cpu"), recipe("fp32"), library="onnxruntime")
    expected = Pipeline.open(merged_bundle)(REQUEST)
    assert np.abs(expected - base).max() > 0.1  # it changes the pictures
    assert 20 * np.log10(np.linalg.norm(expected) / max(np.linalg.norm(expected - adapted), 1e-30)) > 100
    pipeline = Pipeline.open(dit_bundle)
    pipeline.use_loras(read_applied([f"{converted}:{SCALE}"]))
    assert np.array_equal(pipeline(REQUEST), adapted)
    pipeline.use_loras()
    assert np.array_equal(pipeline(REQUEST), base)  # and leaves nothing behind


def test_two_loras_add_up_and_the_opposite_takes_one_away(dit_bundle: Path, converted: Path) -> None:
    base = Pipeline.open(dit_bundle)(REQUEST)
    texts = [f"{converted}:{SCALE}", f"{converted}:{-SCALE}"]
    again = Pipeline.open(dit_bundle, loras=read_applied(texts))(REQUEST)
    assert np.abs(again - base).max() < 1e-3 * np.abs(base).max()
    once = Pipeline.open(dit_bundle, loras=read_applied([f"{converted}:{SCALE}"]))(REQUEST)
    twice = Pipeline.open(dit_bundle, loras=read_applied([f"{converted}:{SCALE / 2}"] * 2))(REQUEST)
    assert np.abs(once - twice).max() < 1e-3 * np.abs(base).max()


# -------------------------------------------------------------------------------------------- adapters and weights


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.floats(-2, 2), st.integers(0, 2**16))
def test_an_update_adds_its_product_to_its_rows_alone(
    rows: int, rank: int, start: int, scale: float, seed: int
) -> None:
    weight, up, down = normal(rows + start + 1, 2, 3, seed=seed), normal(rows, rank, seed=1), normal(rank, 6, seed=2)
    after = merged(weight, [(Update(up=up, down=down, start=start, scale=0.5), scale)], "w")
    expected = weight.astype(np.float64).reshape(len(weight), 6)
    expected[start : start + rows] += scale * 0.5 * (up.astype(np.float64) @ down)
    assert after.dtype == np.float32
    np.testing.assert_allclose(after.reshape(len(weight), 6), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(after[:start], weight[:start])
    assert np.array_equal(after[start + rows :], weight[start + rows :])


@pytest.mark.parametrize(("rows", "columns", "start"), [(4, 7, 0), (4, 6, 3), (7, 6, 0)])
def test_an_update_of_another_size_is_refused(rows: int, columns: int, start: int) -> None:
    update = Update(up=normal(rows, 2, seed=0), down=normal(2, columns, seed=1), start=start)
    with pytest.raises(InvalidInput, match="another model"):
        merged(normal(6, 6, seed=2), [(update, 1.0)], "w")


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_weight_changes_in_an_engine_as_it_does_at_export(kind: type, tmp_path: Path) -> None:
    weight = normal(8, 6, seed=0).astype(kind)
    file = save(tmp_path / "weights.safetensors", {"a.weight": weight})
    update = Update(up=normal(8, 2, seed=1), down=normal(2, 6, seed=2), scale=0.5)
    applied = [Applied(adapter=Adapter(name="x", changes={"denoiser": {"a.weight": (update,)}}), scale=0.7)]
    found = lora_engine.changed(file, applied, "denoiser")["a.weight"]
    exported = MergedSource(SafetensorsFile(file), {"a.weight": [(update, 0.7)]}).read("a.weight")
    assert found.after.tobytes() == np.asarray(exported).tobytes()
    assert found.before.tobytes() == weight.tobytes()
    assert not lora_engine.changed(file, applied, "text_encoder")


def test_an_adapter_of_another_bundle_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "weights.safetensors", {"a.weight": normal(4, 4, seed=0)})
    update = Update(up=normal(4, 2, seed=1), down=normal(2, 4, seed=2))
    applied = [Applied(adapter=Adapter(name="x", changes={"denoiser": {"b.weight": (update,)}}))]
    with pytest.raises(InvalidInput, match=r"b\.weight"):
        lora_engine.changed(file, applied, "denoiser")


def test_a_published_file_must_be_converted_first(published: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="lehr lora"):
        read_adapter(published)
    with pytest.raises(InvalidInput, match="does not exist"):
        read_adapter(tmp_path / "nothing.lora.safetensors")
    (tmp_path / "torn.lora.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(InvalidInput, match="no adapter"):
        read_adapter(tmp_path / "torn.lora.safetensors")


# ----------------------------------------------------------------------------------------------- ONNX's own format


def graph_of(path: Path, weights: dict[str, np.ndarray], *, beside: tuple[str, ...] = ()) -> Path:
    """An ONNX file with these initialisers; those of ``beside`` in a file of their own."""
    values = [ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in weights.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    if beside:
        rows = [
            (name, TensorInfo(weights[name].dtype, weights[name].shape), lambda n=name: weights[n]) for name in beside
        ]
        places = write_safetensors(path.with_name("w.safetensors"), rows)
        for name in beside:
            graph.initializers[name].const_value = ir.ExternalTensor(
                location="w.safetensors",
                offset=places[name].offset,
                length=places[name].length,
                dtype=ir.DataType.from_numpy(weights[name].dtype),
                shape=ir.Shape(weights[name].shape),
                name=name,
                base_dir=path.parent,
            )
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def test_initialisers_are_read_as_onnx_reads_them(tmp_path: Path) -> None:
    weights = {
        "float": normal(3, 4, seed=0),
        "half": normal(5, seed=1).astype(np.float16),
        "brain": normal(2, 2, 3, seed=2).astype(ml_dtypes.bfloat16),
        "double": normal(2, seed=3).astype(np.float64),
        "scalar": np.array(1.5, dtype=np.float32),
        "beside": normal(7, 2, seed=4),
    }
    found = initializers(graph_of(tmp_path / "g.onnx", weights | {"sizes": np.array([1, 2])}, beside=("beside",)))
    assert set(found) == set(weights)
    for name, array in weights.items():
        assert found[name].shape == array.shape
        assert found[name].read().tobytes() == array.tobytes()


@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_damaged_graph_is_an_error_that_says_so(junk: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = graph_of(Path(folder) / "g.onnx", {"a": normal(3, 4, seed=0)})
        path.write_bytes(path.read_bytes()[:cut] + junk)
        try:
            for found in initializers(path).values():
                found.read()
        except BundleError as e:
            assert "lehr build" in str(e)  # noqa: PT017  # what a damaged file gives may also be a graph


def test_weights_outside_of_the_engine_are_refused(tmp_path: Path) -> None:
    path = graph_of(tmp_path / "g.onnx", {"a": normal(3, 4, seed=0)}, beside=("a",))
    path.write_bytes(path.read_bytes().replace(b"w.safetensors", b"../afetensors"))
    with pytest.raises(BundleError, match="afetensors"):
        initializers(path)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize(("out", "inner"), [(16, 32), (24, 16), (20, 3)])
def test_blocked_filters_hold_every_value_where_convolutions_look_for_it(block: int, out: int, inner: int) -> None:
    weight, height, width = normal(out, inner, 2, 3, seed=0), 2, 3
    wide_out, wide_in = -(-out // block) * block, -(-inner // block) * block
    both = _blocked(weight, (wide_out, wide_in), block).reshape(
        wide_out // block, wide_in // block, height, width, block, block
    )
    first = _blocked_outputs(weight, (wide_out, inner), block).reshape(wide_out // block, inner, height, width, block)
    for o, i in ((0, 0), (out - 1, inner - 1), (out // 2, inner // 3)):
        assert np.array_equal(both[o // block, i // block, :, :, i % block, o % block], weight[o, i])
        assert np.array_equal(first[o // block, i, :, :, o % block], weight[o, i])


# ------------------------------------------------------------------------------------------- what cannot be changed


def _two(tmp_path: Path, plan: dict[str, np.ndarray], stored: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of :func:`lora_engine.with_loras` for an engine that holds ``plan`` of what is ``stored``."""
    weights = save(tmp_path / "weights.safetensors", stored)
    return {
        "graph": graph_of(tmp_path / "graph.onnx", stored),
        "plan": graph_of(tmp_path / "plan.onnx", plan),
        "weights": weights,
        "rebuild": "lehr build m.lehr",
    }


def _applied(name: str = "a.weight") -> list[Applied]:
    update = Update(up=normal(4, 2, seed=1), down=normal(2, 4, seed=2))
    return [Applied(adapter=Adapter(name="x", changes={"denoiser": {name: (update,)}}))]


@pytest.mark.parametrize("library", ["openvino", "aotinductor", "tensorrt"])
def test_a_library_that_compiles_weights_in_names_the_way_round(library: str, tmp_path: Path) -> None:
    weight = {"a.weight": normal(4, 4, seed=0)}
    with pytest.raises(IncompatibleEngine, match=r"lehr export SOURCE --lora .* then lehr build m\.lehr"):
        lora_engine.with_loras({}, _applied(), "denoiser", library=library, **_two(tmp_path, weight, weight))


def test_a_weight_that_the_engine_folded_is_named(tmp_path: Path) -> None:
    weight = {"a.weight": normal(4, 4, seed=0)}
    paths = _two(tmp_path, {"b": normal(4, 4, seed=9)}, weight)
    with pytest.raises(IncompatibleEngine, match=r"'a\.weight'"):
        lora_engine.with_loras({}, _applied(), "denoiser", library="onnxruntime", **paths)


def test_equal_weights_are_told_apart_by_name_or_not_at_all(tmp_path: Path) -> None:
    same = normal(4, 4, seed=0)
    stored = {"a.weight": same, "b.weight": same}
    paths = _two(tmp_path, {"a/Transpose": np.ascontiguousarray(same.T), "b/Transpose": same.T.copy()}, stored)
    options = lora_engine.with_loras({}, _applied(), "denoiser", library="onnxruntime", **paths)
    assert set(options[lora_engine.OVERLAY]) == {"a/Transpose"}
    paths = _two(tmp_path, {"x": same, "y": same}, stored)
    with pytest.raises(IncompatibleEngine, match=r"'a\.weight'"):
        lora_engine.with_loras({}, _applied(), "denoiser", library="onnxruntime", **paths)


def test_half_an_engine_in_half_precision_is_rounded_after_the_sum(tmp_path: Path) -> None:
    weight = normal(4, 4, seed=0)
    paths = _two(tmp_path, {"a.float16": weight.T.astype(np.float16).copy()}, {"a.weight": weight})
    options = lora_engine.with_loras({}, _applied(), "denoiser", library="onnxruntime", **paths)
    kind, values = options[lora_engine.OVERLAY]["a.float16"]
    update = _applied()[0].adapter.of("denoiser")["a.weight"][0]
    assert kind == "float16"
    assert np.array_equal(values, (weight + update.up @ update.down).T.astype(np.float16))


class _Refitting:
    """As much of an engine library as a refit needs; keeps what it is given."""

    class DataType:
        FLOAT, HALF = "float", "half"

    def __init__(self) -> None:
        self.given: dict[str, np.ndarray] = {}

    def Weights(self, kind: str, pointer: int, size: int) -> np.ndarray:  # the library's name
        dtype = np.dtype(np.float16 if kind == "half" else np.float32)
        return np.frombuffer(ctypes.string_at(pointer, size * dtype.itemsize), dtype)

    def Refitter(self, engine: object, logger: object) -> _Refitting:
        return self

    def get_all_weights(self) -> list[str]:
        return ["a.weight.float16", "b.weight"]

    def set_named_weights(self, name: str, values: np.ndarray) -> bool:
        self.given[name] = values
        return True

    def get_missing_weights(self) -> list[str]:
        return []

    def refit_cuda_engine(self) -> bool:
        return True


def test_a_plan_without_weights_is_refitted_with_changed_ones(tmp_path: Path) -> None:
    stored = {"a.weight": normal(4, 4, seed=0), "b.weight": normal(3, seed=1)}
    paths = _two(tmp_path, stored, stored)
    rows = {
        "a.weight.float16": {"in": "stored", "key": "a.weight", "dtype": "float16"},
        "b.weight": {"in": "stored", "key": "b.weight", "dtype": "float32"},
    }
    options = {"refit": {"tensors": rows, FILES: {"stored": paths["weights"]}}}
    adapted = lora_engine.with_loras(options, _applied(), "denoiser", library="tensorrt", **paths)
    library, log = _Refitting(), SimpleNamespace(logger=None, said=lambda: "")
    refit(library, None, log, adapted["refit"], paths["plan"])
    update = _applied()[0].adapter.of("denoiser")["a.weight"][0]
    expected = (stored["a.weight"] + update.up @ update.down).astype(np.float16)
    assert np.array_equal(library.given["a.weight.float16"], expected.reshape(-1))
    assert np.array_equal(library.given["b.weight"], stored["b.weight"])
    refit(library, None, log, options["refit"], paths["plan"])
    assert np.array_equal(library.given["a.weight.float16"], stored["a.weight"].astype(np.float16).reshape(-1))
