"""Weights in: checkpoints of other projects, read by name into our backbones."""
