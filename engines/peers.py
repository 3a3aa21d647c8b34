"""What others would do with the same model, for ``lehr bench --peers``: an ONNX file, loaded plainly.

Run as ``python -m lehr.engines.peers LIBRARY GRAPH.onnx INPUTS.npz``, where LIBRARY is ``onnxruntime``,
``openvino-f32`` or ``openvino`` (whose default is bf16 where the processor has it). The process imports the library and
numpy, and speaks the protocol of :mod:`lehr.runtime.timing`. Options are the libraries' defaults, as a peer's user
would have them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import MissingExtra, UnknownName
from lehr.runtime.host import peak_rss_mb
from lehr.runtime.timing import Feeds, serve

Array = npt.NDArray[Any]
Load = Callable[[Path], Callable[[Feeds], Array]]


def _onnxruntime(graph: Path) -> Callable[[Feeds], Array]:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as e:
        raise MissingExtra("onnxruntime", "cpu") from e
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return lambda feeds: np.asarray(session.run(None, {name: feeds[name] for name in names})[0])


def _openvino(configuration: Mapping[str, Any]) -> Load:
    def load(graph: Path) -> Callable[[Feeds], Array]:
        try:
            import openvino as ov
        except ModuleNotFoundError as e:
            raise MissingExtra("openvino", "openvino") from e
        compiled = ov.Core().compile_model(graph, "CPU", dict(configuration))
        request = compiled.create_infer_request()
        names, first = [port.get_any_name() for port in compiled.inputs], compiled.outputs[0]

        def evaluate(feeds: Feeds) -> Array:
            return np.array(request.infer({name: feeds[name] for name in names}, share_inputs=True)[first])

        return evaluate

    return load


LIBRARIES: dict[str, Load] = {
    "onnxruntime": _onnxruntime,
    "openvino-f32": _openvino({"INFERENCE_PRECISION_HINT": "f32"}),
    "openvino": _openvino({}),
}


def main(library: str, graph: str, inputs: str) -> None:
    """Time one graph with one library."""
    if library not in LIBRARIES:
        raise UnknownName("engine library", library, LIBRARIES)
    base = peak_rss_mb()
    serve(LIBRARIES[library](Path(graph)), Path(inputs), base_mb=base)


if __name__ == "__main__":
    main(*sys.argv[1:])
