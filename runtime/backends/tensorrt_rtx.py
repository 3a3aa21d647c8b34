"""TensorRT-RTX on an NVIDIA RTX GPU (https://docs.nvidia.com/deeplearning/tensorrt-rtx), without PyTorch.

The interface is TensorRT's (:mod:`lehr.runtime.backends.tensorrt`). Kernels are compiled for the GPU when an engine is
prepared for its shapes, so the first evaluation of each shape takes seconds longer.
"""

from __future__ import annotations

from lehr.runtime.backends.tensorrt import TensorRtBackend

BACKEND = TensorRtBackend("tensorrt_rtx", "TensorRT-RTX", "trt-rtx")
