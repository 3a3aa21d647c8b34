"""Lehr turns a diffusion denoiser in PyTorch into a verified engine, and runs it without PyTorch.

Nothing is imported here: ``lehr.runtime`` needs numpy and one engine library, ``lehr.export`` needs PyTorch.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
