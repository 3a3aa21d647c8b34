"""The ONNX graph as data, for every stage above: its weights, its checks, and one rewrite per file."""
