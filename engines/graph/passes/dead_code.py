"""Dead code: what no output of the graph needs."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


def remove_dead_code(model: ir.Model) -> ir.passes.PassResult:
    """Remove nodes, weights and constants that nothing uses; unneeded inputs stay, since they are the signature."""
    passes = ir.passes.Sequential(common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass())
    return passes(model)
