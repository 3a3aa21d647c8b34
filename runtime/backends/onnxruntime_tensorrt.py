"""ONNX Runtime with its TensorRT provider (https://onnxruntime.ai), for engines that hold nothing else than TensorRT's.

A plan is a graph of one node that holds a TensorRT engine, for the GPU and the sizes that it was built for. Loading is
ONNX Runtime's own (:mod:`lehr.runtime.backends.onnxruntime`), and so is the rule that a provider that does not load is
an error.
"""

from __future__ import annotations

from lehr.runtime.backends.onnxruntime import TENSORRT, OnnxRuntimeBackend, check_provider

NAME = "onnxruntime-tensorrt"


class OnnxRuntimeTensorRtBackend(OnnxRuntimeBackend):
    """ONNX Runtime as an engine library that has TensorRT."""

    name = NAME

    def version(self) -> str:
        """ONNX Runtime's version; raises MissingExtra, too, where it was made without TensorRT."""
        check_provider(TENSORRT)
        return super().version()


BACKEND = OnnxRuntimeTensorRtBackend()
