"""A whole pipeline in eager PyTorch, driven by the runtime's own pipeline code: the reference side of pictures."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from lehr.export.eager import eager
from lehr.export.pipelines.source import PipelineSource
from lehr.export.stages import EagerStages
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.text_to_image import TextToImage


def eager_text_to_image(
    found: PipelineSource,
    tables: Mapping[int, SolverTable] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> TextToImage:
    """What the bundle of ``found`` will draw, by PyTorch.

    Args:
        found: a pipeline about to be exported, with weights.
        tables: of the denoiser's own scheduler, by number of steps.
        dtype: that all parts compute in.
        device: that they compute on.
    """
    denoiser = found.denoiser

    def opened() -> Denoiser:
        module = copy.deepcopy(denoiser.runnable()).to(device, dtype)  # the source's own keeps its digits
        return eager(module.eval(), denoiser.spec, dtype=dtype, device=device)

    tokenizers = {spec.file: found.tokenizers[stage] for stage, spec in found.spec.tokenizers.items()}
    return TextToImage(
        denoiser.spec,
        found.spec,
        EagerStages(found.stages, dtype=dtype, device=device),
        open_denoiser=opened,
        tables=tables,
        read=tokenizers.__getitem__,
    )
