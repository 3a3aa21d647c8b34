"""A bundle's portable graphs as a denoiser: fp32 in ONNX Runtime, whatever engines there are."""

from __future__ import annotations

from lehr.runtime.backends import Session
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import BundleError, RunFailed
from lehr.runtime.hoisted import PROMPT, SCHEDULE, STEP, Residency, hoisted_denoiser


def portable_denoiser(bundle: Bundle, *, threads: int = 0) -> Denoiser:
    """The model as it was exported.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        BundleError: structure only, or a copy of the bundle without its graphs.
        RunFailed: ONNX Runtime refuses a graph.
    """
    from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options

    import onnxruntime as ort  # isort: skip

    graphs = bundle.manifest.graphs
    names = [name for name in (PROMPT, SCHEDULE, STEP) if name in graphs]
    for name in names:
        if graphs[name].weights is None:
            raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it without them left out.")

    def load(name: str) -> Session:
        entry = graphs[name]
        if entry.weights is not None:
            bundle.path(entry.weights)  # checks the hash: the library reads the file by itself
        file = bundle.path(entry.file)
        try:
            options = session_options({"intra_op_threads": threads, "spinning": False})
            return OnnxRuntimeSession(ort.InferenceSession(file, options, providers=[PROVIDER]))
        except FAILURES as e:
            raise RunFailed(f"ONNX Runtime cannot run the portable graph {entry.file}: {e}") from e

    signatures = {name: graphs[name].signature for name in names}
    return hoisted_denoiser(bundle.manifest.model, signatures, load, residency=Residency.ALL)
