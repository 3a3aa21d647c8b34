"""Engines: targets, builders, and the ONNX graph as data. No torch here, and no onnx in what a device needs."""
