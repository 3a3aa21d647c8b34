"""Rewrites of ONNX graphs, one a file. Each takes a model, changes it in place, and says whether it did.

None of them reads a weight: initialisers may be unbound (they have a shape and no data), lie in a file, or be made
when they are written (``ir.LazyTensor``). Only constants that are embedded in the graph count as constants.
"""
