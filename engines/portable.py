"""A bundle's portable graphs as a denoiser: fp32 in ONNX Runtime, whatever engines there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lehr.engines.onnxruntime_cpu import lowered
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

    Group norms of a file run in pieces, as they do in engines: ONNX Runtime 1.31 spells the operator out with the
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

    given, folder = (graph, weights) if isinstance(graph, bytes) else (lowered(graph)[0], graph.parent)
    options = session_options({"intra_op_threads": threads, "spinning": False})
    # In the graph's order a tensor is measured as soon as it is there; ONNX Runtime's default order keeps all of them.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return OnnxRuntimeSession(ort.InferenceSession(given, options, providers=[PROVIDER]))
    except FAILURES as e:
        raise RunFailed(f"ONNX Runtime cannot run the portable graph in {folder}: {e}") from e
