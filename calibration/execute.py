"""Step graphs in memory, run by ONNX Runtime as they are written: what a candidate computes, before there is an engine.

Quantise and dequantise nodes are executed one by one and not fused into integer kernels, so the numbers are the
graph's own on every processor, and formats run that a library has no kernels for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from lehr.engines.graph.lowering.restored import restore_weights
from lehr.engines.graph.passes.decompose_norms import decompose_norms
from lehr.engines.onnxruntime_cpu import IN_PIECES
from lehr.engines.portable import portable_session
from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.hoisted import STEP, Load

Array = npt.NDArray[Any]


class Session(Protocol):
    """What runs a step graph."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...


@dataclass(frozen=True, slots=True)
class Written:
    """A graph as bytes; writing it is when weights are rounded, so it is done once.

    Attributes:
        text: the ONNX file's content.
        folder: where external weights lie, if there are any.
    """

    text: bytes
    folder: Path | None

    @classmethod
    def of(cls, model: ir.Model) -> Written:
        """The bytes of a graph, its weights in E2M1, which ONNX Runtime cannot read, restored, its norms in pieces."""
        readable = model.clone()
        restore_weights(readable, [ir.DataType.FLOAT4E2M1])
        decompose_norms(readable, IN_PIECES)
        return cls(ir.to_proto(readable).SerializeToString(deterministic=True), folder_of(readable))

    def digest(self) -> bytes:
        """Of all that the graph computes: its structure, and the bytes of its weights.

        External weights count as where they lie (file name, offset, length); whoever compares adds the file's own.
        """
        return hashlib.sha256(ort.__version__.encode() + self.text).digest()


class OrtGraph:
    """An ONNX graph in memory, its external weights where they lie.

    Args:
        model: the graph.
        threads: 0 is one a core.

    Raises:
        RunFailed: ONNX Runtime refuses the graph.
    """

    def __init__(self, model: ir.Model | Written, *, threads: int = 0) -> None:
        written = model if isinstance(model, Written) else Written.of(model)
        options = session_options({"intra_op_threads": threads, "spinning": False})
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if written.folder is not None:
            folder = str(written.folder)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            session = ort.InferenceSession(
                written.text,
                options,
                providers=[PROVIDER],
                disabled_optimizers=["ReluQuantRewrite"],  # takes the zero of fp8 for the least number, drops Relus
            )
        except FAILURES as e:
            raise RunFailed(f"ONNX Runtime cannot run the step graph: {e}") from e
        self._session = OnnxRuntimeSession(session)

    @classmethod
    def of_bundle(cls, bundle: Bundle, *, threads: int = 0) -> OrtGraph:
        """The portable step graph; raises BundleError for structure only, or damaged files."""
        return cls(step_graph(bundle), threads=threads)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._session.run(feeds)


def step_graph(bundle: Bundle) -> ir.Model:
    """A bundle's portable step graph; raises BundleError for structure only, or damaged files."""
    entry = bundle.manifest.graphs[STEP]
    if entry.weights is None:
        raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only.")
    bundle.path(entry.weights)
    return ir.load(bundle.path(entry.file))


def hoisted_sessions(bundle: Bundle, step: Any, *, threads: int = 0) -> Load:
    """Loads the portable prompt and schedule graphs by name; ``step(feeds)`` is what runs the step graph."""

    class Step:
        def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            return dict(step(feeds))

    def load(name: str) -> Session:
        if name == STEP:
            return Step()
        entry = bundle.manifest.graphs[name]
        if entry.weights is not None:
            bundle.path(entry.weights)
        return portable_session(bundle.path(entry.file), threads=threads)

    return load


def inlined(model: ir.Model) -> ir.Model:
    """The model with its weights in memory, changed in place."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name)
    return model


def folder_of(model: ir.Model) -> Path | None:
    """Where the files of a graph's external weights lie; None if it has none."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            return Path(value.const_value.base_dir)
    return None
