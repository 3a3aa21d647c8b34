"""The manifest: equal content gives equal bytes, and nothing that is not a manifest gets through."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.jsonlike import MAX_DEPTH, decode_json, encode_json
from lehr.runtime.manifest import SCHEMA_VERSION, WITHOUT_STAGES, FileEntry, GraphEntry, Manifest
from lehr.runtime.paths import VP
from lehr.runtime.prediction import EPSILON
from lehr.runtime.spec import ModelSpec, TensorSpec, Varies

SHAPE = ("batch", 1, 8, 8)
SPEC = ModelSpec(
    name="tiny",
    inputs=(
        TensorSpec(name="sample", shape=SHAPE, varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
    ),
    outputs=(TensorSpec(name="epsilon", shape=SHAPE, varies=Varies.SAMPLE),),
    path=VP(),
    prediction=EPSILON,
)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "model": SPEC,
        "graphs": {
            "step": GraphEntry(
                file="model/step.onnx",
                weights="model/w.safetensors",
                opset=20,
                parameters=5,
                nodes=7,
                weight_bytes=4,
                flops=2,
                signature=SPEC.signature,
            )
        },
        "files": {
            "model/w.safetensors": FileEntry(sha256="b" * 64, bytes=12),
            "model/step.onnx": FileEntry(sha256="a" * 64, bytes=0),
        },
        "source": "dit-tiny",
        "versions": {"torch": "2.13.0", "lehr": "0.1.0"},
        "command": ("lehr", "export", "dit-tiny"),
        "golden_tier": "steps",
        "parity": {"cpu--fp32--onnxruntime-1.31.1": {"passed": True, "levels": [0, 1.5, None]}},
    }
    return Manifest(**{**fields, **changes})


def damaged(where: tuple[Any, ...], value: Any) -> Any:
    """The JSON of a good manifest with one place set to ``value``, or deleted if ``value`` is ``...``."""
    data = decode_json(encode_json(manifest().to_json(), "manifest"))
    place = data
    for key in where[:-1]:
        place = place[key]
    if value is ...:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return data


def test_a_manifest_survives_the_way_through_json() -> None:
    text = encode_json(manifest().to_json(), "manifest")
    again = Manifest.from_json(decode_json(text))
    assert again == manifest()
    assert encode_json(again.to_json(), "manifest") == text


def test_equal_manifests_give_equal_bytes_whatever_the_order_of_their_fields() -> None:
    files = manifest().files
    other = manifest(files=dict(reversed(list(files.items()))), versions={"lehr": "0.1.0", "torch": "2.13.0"})
    assert encode_json(other.to_json(), "manifest") == encode_json(manifest().to_json(), "manifest")


def test_a_structure_only_graph_has_no_weights() -> None:
    graph = GraphEntry(
        file="model/step.onnx",
        weights=None,
        opset=18,
        parameters=0,
        nodes=1,
        weight_bytes=0,
        flops=2,
        signature=SPEC.signature,
    )
    again = manifest(graphs={"step": graph})
    assert Manifest.from_json(again.to_json()).graphs["step"].weights is None


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, WITHOUT_STAGES - 1])
def test_another_schema_is_refused_with_what_to_do(version: int) -> None:
    advice = "upgrade" if version > SCHEMA_VERSION else "lehr export"
    # Nothing else of another schema may be looked at: it need not have any of today's fields.
    with pytest.raises(BundleError, match=f"schema version {version}.*{advice}"):
        Manifest.from_json({"schema_version": version})


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("schema_version",), "1", "schema_version"),
        (("schema_version",), True, "schema_version"),
        (("schema_version",), ..., "schema_version"),
        (("model",), None, "model"),
        (("model", "inputs"), ..., "model lacks 'inputs'"),
        (("model", "path", "kind"), "warp", "warp"),
        (("model", "path"), [], "model"),
        (("model", "notes"), [1], "model"),
        (("model", "dims", 0, "multiple"), "x", "model"),
        (("graphs", "step", "file"), 3, "graphs.step.file"),
        (("graphs", "step", "file"), "../x", "graphs.step"),
        (("graphs", "step", "file"), "model/other.onnx", "not listed"),
        (("graphs", "step", "opset"), True, "graphs.step.opset"),
        (("graphs", "step", "nodes"), -1, "graphs.step"),
        (("graphs", "step", "extra"), 1, "extra"),
        (("files",), [], "files"),
        (("files", "model/step.onnx"), "a" * 64, "files.model/step.onnx"),
        (("files", "model/step.onnx", "sha256"), "A" * 64, "sha256"),
        (("files", "model/step.onnx", "sha256"), "a" * 65, "sha256"),
        (("files", "model/step.onnx", "bytes"), -1, "bytes"),
        (("files", "model/step.onnx", "bytes"), 1.0, "bytes"),
        (("files", "../../etc/passwd"), {"sha256": "a" * 64, "bytes": 1}, "etc/passwd"),
        (("files", "/etc/passwd"), {"sha256": "a" * 64, "bytes": 1}, "etc/passwd"),
        (("files", "model/step.onnx/x"), {"sha256": "a" * 64, "bytes": 1}, "folder too"),
        (("source",), 1, "source"),
        (("versions", "torch"), 2, "versions.torch"),
        (("command",), "lehr export", "command"),
        (("command", 1), None, r"command\[1\]"),
        (("golden_tier",), "most", "golden_tier"),
        (("parity",), [], "parity"),
        (("parity",), ..., "parity"),
        (("made_at",), "today", "made_at"),
    ],
)
def test_a_damaged_field_is_refused_by_name(where: tuple[Any, ...], value: Any, named: str) -> None:
    with pytest.raises(BundleError, match=named):
        Manifest.from_json(damaged(where, value))


PLACES: list[tuple[Any, ...]] = []


def _collect(value: Any, where: tuple[Any, ...]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        PLACES.append((*where, key))
        _collect(item, (*where, key))


_collect(decode_json(encode_json(manifest().to_json(), "manifest")), ())

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(where=st.sampled_from(PLACES), value=JSON | st.just(...))
def test_whatever_stands_in_a_field_the_answer_is_a_manifest_or_a_bundle_error(
    where: tuple[Any, ...], value: Any
) -> None:
    data = damaged(where, value)
    before = copy.deepcopy(data)
    try:
        read = Manifest.from_json(data)
    except BundleError as e:
        read, message = None, str(e)
    else:
        message = ""
        assert Manifest.from_json(decode_json(encode_json(read.to_json(), "manifest"))) == read
    assert read is not None or 0 < len(message) < 2000
    assert data == before


@given(JSON)
def test_json_that_is_no_manifest_is_a_bundle_error(data: Any) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(data)


# ----------------------------------------------------------------------------------------------- JSON itself


@given(JSON)
def test_json_is_read_back_as_it_was_written(value: Any) -> None:
    text = encode_json(value, "it")
    assert decode_json(text) == value
    assert json.loads(text) == value
    assert text.endswith(b"\n")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff", b"NaN", b"[Infinity]", b"1e999", b"[" * 100_000, b'{"a":' * (MAX_DEPTH + 2),
        b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), b"9" * 5000, b"99999999999999999999", b"{} {}",
    ],
)  # fmt: skip
def test_text_that_is_no_json_or_could_hurt_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_json(text)


def test_what_json_cannot_hold_is_refused_where_it_stands() -> None:
    with pytest.raises(InvalidInput, match=r"parity\.cpu\[1\] is inf"):
        encode_json({"cpu": [1, float("inf")]}, "parity")
    with pytest.raises(InvalidInput, match=r"parity\.cpu is a builtins\.set"):
        encode_json({"cpu": {1}}, "parity")
    with pytest.raises(InvalidInput, match="keys must be strings"):
        encode_json({1: 2}, "parity")
