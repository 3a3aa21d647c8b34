"""The runtime: samples from a bundle with numpy and one engine library. It knows no PyTorch and no ONNX.

Names below are imported when first used, so that ``import lehr.runtime`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.errors import LehrError
    from lehr.runtime.loop import Step, sample
    from lehr.runtime.paths import EDM, VP, LinearFlow
    from lehr.runtime.pipeline import Pipeline, Request
    from lehr.runtime.prediction import Prediction, PredictionKind
    from lehr.runtime.solver_table import SolverTable
    from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies
    from lehr.runtime.text_to_image import PictureRequest, TextToImage

_HOMES = {
    "bundle": ("Bundle",),
    "errors": ("LehrError",),
    "loop": ("Step", "sample"),
    "paths": ("EDM", "VP", "LinearFlow"),
    "pipeline": ("Pipeline", "Request"),
    "prediction": ("Prediction", "PredictionKind"),
    "solver_table": ("SolverTable",),
    "spec": ("BATCH", "DType", "Dim", "ModelSpec", "Sampling", "TensorSpec", "Varies"),
    "text_to_image": ("PictureRequest", "TextToImage"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BATCH",
    "EDM",
    "VP",
    "Bundle",
    "DType",
    "Dim",
    "LehrError",
    "LinearFlow",
    "ModelSpec",
    "PictureRequest",
    "Pipeline",
    "Prediction",
    "PredictionKind",
    "Request",
    "Sampling",
    "SolverTable",
    "Step",
    "TensorSpec",
    "TextToImage",
    "Varies",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
