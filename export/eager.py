"""Eager PyTorch as a :class:`~lehr.runtime.denoiser.Denoiser`: the reference side of parity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from lehr.export.dims import Traceable
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import ExportFailed
from lehr.runtime.spec import ModelSpec, Varies

Array = npt.NDArray[Any]


def eager(module: nn.Module, spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Denoiser:
    """Wrap ``module``, which must already have ``dtype``; floats are cast on the way in and out.

    Inputs are float32 arrays and outputs float32 (float64 for a float64 module) whatever the module computes in,
    so that formats differ in the network alone.
    """
    return Denoiser(spec, lambda feeds: evaluate(module, spec, feeds, dtype=dtype, device=device))


def evaluate(
    module: nn.Module,
    spec: Traceable,
    feeds: Mapping[str, Array],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Array]:
    """Call ``module``, of that dtype and on that device, with host arrays; what comes back is on the host as well."""
    # A timestep is a scalar of the schedule, not a value of the network: 999.0 has no bf16.
    scalars = {tensor.name for tensor in spec.inputs if tensor.varies is Varies.TIMESTEP}
    tensors = {}
    for name, value in feeds.items():
        tensor = torch.from_numpy(value).to(device)
        cast = tensor.is_floating_point() and (name not in scalars or dtype is torch.float64)
        tensors[name] = tensor.to(dtype) if cast else tensor
    with torch.inference_mode():
        returned = module(**tensors)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    if len(outputs) != len(spec.outputs):
        raise ExportFailed(f"the module returns {len(outputs)} tensors, its spec declares {len(spec.outputs)}.")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return {
        tensor.name: value.to(wide if value.is_floating_point() else value.dtype).cpu().numpy()
        for tensor, value in zip(spec.outputs, outputs, strict=True)
    }
