"""A bundle's portable graphs as a denoiser: fp32 in ONNX Runtime, whatever engines there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from lehr.engines.onnxruntime_cpu import IN_PIECES, lowered
from lehr.runtime.backends import Session
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.hoisted import PROMPT, SCHEDULE, STEP, Residency, hoisted_denoiser

LoadStep = Callable[[], Session]


def portable_denoiser(bundle: Bundle, load_step: LoadStep | None = None, *, threads: int = 0) -> Denoiser:
    """The model as it was exported; ``load_step`` puts something else in the step graph's place.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        BundleError: structure only, or a copy of the bundle without its graphs.
        RunFailed: ONNX Runtime refuses a graph.
    """
    graphs = bundle.manifest.graphs
    names = [name for name in (PROMPT, SCHEDULE, STEP) if name in graphs]

    def load(name: str) -> Session:
        if name == STEP and load_step is not None:
            return load_step()
        entry = graphs[name]
        if entry.weights is None:
            raise BundleError(
                f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only."
            )
        bundle.path(entry.weights)  # checks the hash: the library reads the file by itself
        return portable_session(bundle.path(entry.file), threads=threads)

    signatures = {name: graphs[name].signature for name in names}
    return hoisted_denoiser(bundle.manifest.model, signatures, load, residency=Residency.ALL)


def portable_session(graph: Path | bytes, weights: Path | None = None, *, threads: int = 0) -> Session:
    """A portable graph in ONNX Runtime, without an engine of it.

    Group norms run in pieces, as they do in engines: ONNX Runtime 1.31 spells the operator out with the
    variance as the mean of squares less the square of the mean, which loses all its digits where the mean of a group
    is far from zero.

    Args:
        graph: its file, or a copy with more outputs.
        weights: the folder of its weights file; that of ``graph`` unless that is a copy.
        threads: 0 is one a core.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        RunFailed: it refuses the graph.
    """
    from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options

    import onnxruntime as ort  # isort: skip

    given, folder = (lowered(graph)[0], graph.parent) if isinstance(graph, Path) else (_in_pieces(graph), weights)
    options = session_options({"intra_op_threads": threads, "spinning": False})
    # In the graph's order a tensor is measured as soon as it is there; ONNX Runtime's default order keeps all of them.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return OnnxRuntimeSession(ort.InferenceSession(given, options, providers=[PROVIDER]))
    except FAILURES as e:
        raise RunFailed(f"ONNX Runtime cannot run the portable graph in {folder}: {e}") from e


def _in_pieces(text: bytes) -> bytes:
    """A copy of a graph with its group norms in pieces; every tensor that it hands out bears its old name."""
    if not any(name.encode() in text for name in IN_PIECES) or importlib.util.find_spec("onnx_ir") is None:
        return text
    import onnx
    import onnx_ir as ir

    from lehr.engines.graph.passes.decompose_norms import decompose_norms

    model = ir.from_proto(onnx.load_from_string(text))
    decompose_norms(model, IN_PIECES)
    made: bytes = ir.to_proto(model).SerializeToString()
    return made
