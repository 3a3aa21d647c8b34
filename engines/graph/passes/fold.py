"""Constant folding that leaves weights alone."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants as fold

MAX_INPUT, MAX_OUTPUT = 1 << 13, 1 << 16  # elements: small tables are folded, large ones stay computed


def fold_constants(model: ir.Model) -> ir.passes.PassResult:
    """Compute what depends on small embedded constants alone; a weight, in a file or not there yet, is no constant.

    The computing itself is onnxscript's. Weights are hidden from it, because it reads every tensor that it can.
    """
    hidden = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, (ir.ExternalTensor, ir.LazyTensor))
    }
    for value in hidden:
        value.const_value = None
    try:
        result = fold(model, input_size_limit=MAX_INPUT, output_size_limit=MAX_OUTPUT)
    finally:
        for value, tensor in hidden.items():
            value.const_value = tensor
    return ir.passes.PassResult(model, bool(result.modified))
