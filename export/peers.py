"""PyTorch's own ways to run a denoiser, for ``lehr bench --peers``.

Run as ``python -m lehr.export.peers KIND SOURCE INPUTS.npz [GRAPH.onnx]``. KIND is ``eager-fp32``, ``eager-bf16``,
``compile-fp32`` or ``compile-bf16`` and speaks the protocol of :mod:`lehr.runtime.timing`; with ``onnx`` the process
writes to GRAPH.onnx what plain ``torch.onnx.export`` makes of the module, with the same dynamic dimensions, and ends.
SOURCE is what ``lehr export`` takes, with ``--seed`` 0.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lehr.export.dims import dynamic_shapes
from lehr.export.eager import eager
from lehr.export.source import Source, resolve
from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.host import peak_rss_mb
from lehr.runtime.timing import Feeds, read_inputs, serve

Array = npt.NDArray[Any]

TIMED: dict[str, tuple[torch.dtype, bool]] = {  # kind -> what it computes in, and whether it is compiled
    "eager-fp32": (torch.float32, False),
    "eager-bf16": (torch.bfloat16, False),
    "compile-fp32": (torch.float32, True),
    "compile-bf16": (torch.bfloat16, True),
}
WRITES_ONNX = "onnx"
OPSET = 18  # torch.onnx.export's own default


def evaluation(source: Source, dtype: torch.dtype, *, compiled: bool = False) -> Callable[[Feeds], Array]:
    """One evaluation of a source's module, float32 on the way in and out.

    Args:
        source: with weights.
        dtype: of weights and arithmetic; the timestep stays float32.
        compiled: through ``torch.compile``, which compiles for the sizes of the first call.
    """
    module = source.runnable().eval().to(dtype)
    spec = source.spec
    denoiser = eager(torch.compile(module, dynamic=False) if compiled else module, spec, dtype=dtype)  # type: ignore[arg-type]

    def evaluate(feeds: Feeds) -> Array:
        conditions = {tensor.name: feeds[tensor.name] for tensor in spec.conditions}
        return denoiser.with_variance(feeds[spec.sample.name], float(feeds[spec.timestep.name][0]), conditions)

    return evaluate


def write_onnx(source: Source, feeds: Feeds, path: Path) -> None:
    """What a user of plain ``torch.onnx.export`` gets: one graph, PyTorch's own translation and optimisation."""
    module = source.runnable().eval().float()
    # PyTorch 2.13 pairs shapes with inputs by their place in forward's signature.
    order = [name for name in inspect.signature(module.forward).parameters if name in feeds]
    inputs = {name: torch.from_numpy(np.array(feeds[name])) for name in order}
    shapes = dynamic_shapes(source.spec)
    with torch.no_grad():
        made = torch.onnx.export(
            module,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={name: shapes[name] for name in order},
            opset_version=OPSET,
        )
    if made is None:
        raise TypeError("torch.onnx.export(dynamo=True) returned no program")
    made.save(path, external_data=True)


def main(kind: str, text: str, inputs: str, graph: str | None = None) -> None:
    """Time one way, or write the graph."""
    if kind not in (*TIMED, WRITES_ONNX):
        raise UnknownName("way to run a module", kind, (*TIMED, WRITES_ONNX))
    base = peak_rss_mb()
    source = resolve(text, preset=None, seed=0, structure_only=False)
    if kind == WRITES_ONNX:
        if graph is None:
            raise InvalidInput("writing a graph needs its path: onnx SOURCE INPUTS.npz GRAPH.onnx")
        write_onnx(source, read_inputs(Path(inputs)), Path(graph))
        return
    dtype, compiled = TIMED[kind]
    serve(evaluation(source, dtype, compiled=compiled), Path(inputs), base_mb=base)


if __name__ == "__main__":
    main(*sys.argv[1:])
