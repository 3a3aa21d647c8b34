"""Guidance: one file a kind. All of them are networks to the loop, so no sampler knows that it is guided."""

from __future__ import annotations

from lehr.runtime.guidance.classifier import classifier_guided
from lehr.runtime.guidance.denoised import guided
from lehr.runtime.guidance.embedding import distilled, embedded_scale, embedding_names
from lehr.runtime.guidance.plain import Evaluate, PerEvaluation, classifier_free, fed, network
from lehr.runtime.guidance.setting import Guidance, Projection

__all__ = [
    "Evaluate",
    "Guidance",
    "PerEvaluation",
    "Projection",
    "classifier_free",
    "classifier_guided",
    "distilled",
    "embedded_scale",
    "embedding_names",
    "fed",
    "guided",
    "network",
]
