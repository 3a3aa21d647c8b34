"""Decoders and encoders as stages: their contracts, and what golden data is recorded on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lehr.engines.graph.weights import WeightSource
from lehr.export.stages import StageSource
from lehr.runtime.noise import batch_normal
from lehr.runtime.pipeline_spec import LatentSpec
from lehr.runtime.spec import BATCH, Dim, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec

Array = npt.NDArray[Any]

DECODER, ENCODER = "vae_decoder", "vae_encoder"
USUAL_SIZE = 64  # latent cells a side, where the pipeline says nothing
_GOLDEN_SIZE = 32  # latent cells a side of golden data, at most: pictures of 512 pixels would take minutes on a CPU
_LARGEST = 4  # times the usual size, as denoisers allow
_SMALLEST = 2  # latent cells; a size of 1 would be a constant to the tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """One half of an autoencoder, about to be a stage.

    Attributes:
        module: on the meta device where ``weights`` are streamed.
        channels: of its picture.
        outputs: names of what an encoder returns: mean and std, or the mean alone.
    """

    module: nn.Module
    weights: WeightSource | None
    origin: str
    family: str
    latent: LatentSpec
    channels: int
    size: int = USUAL_SIZE
    outputs: tuple[str, ...] = ("mean", "std")

    def decoder(self, name: str = DECODER) -> StageSource:
        """``latent_sample`` (B, Z, H, W), no longer scaled -> ``sample`` (B, channels, f H, f W), about [-1, 1]."""
        factor, cells = self.latent.factor, _side(self.size, 1)
        spec = StageSpec(
            name=name,
            kind=StageKind.LATENT_DECODER,
            family=self.family,
            inputs=(_tensor("latent_sample", self.latent.channels, "height", "width"),),
            outputs=(_tensor("sample", self.channels, f"height*{factor}", f"width*{factor}"),),
            dims=(BATCH, Dim(name="height", **cells), Dim(name="width", **cells)),
        )
        return self._source(spec, partial(_latents, self.latent, min(self.size, _GOLDEN_SIZE)))

    def encoder(self, name: str = ENCODER) -> StageSource:
        """``sample`` (B, channels, f H, f W) in [-1, 1] -> ``mean`` and ``std``, each (B, Z, H, W), not yet scaled."""
        factor = self.latent.factor
        pixels = _side(self.size, factor)
        cells = f"height/{factor}", f"width/{factor}"
        spec = StageSpec(
            name=name,
            kind=StageKind.LATENT_ENCODER,
            family=self.family,
            inputs=(_tensor("sample", self.channels, "height", "width"),),
            outputs=tuple(_tensor(output, self.latent.channels, *cells) for output in self.outputs),
            dims=(BATCH, Dim(name="height", **pixels), Dim(name="width", **pixels)),
        )
        return self._source(spec, partial(_pictures, self.channels, factor, min(self.size, _GOLDEN_SIZE)))

    def _source(self, spec: StageSpec, feeds: Callable[[int], dict[str, Array]]) -> StageSource:
        return StageSource(spec=spec, module=self.module, weights=self.weights, origin=self.origin, feeds=feeds)


def _tensor(name: str, channels: int, height: str, width: str) -> TensorSpec:
    return TensorSpec(name=name, shape=("batch", channels, height, width), varies=Varies.SAMPLE)


def _side(cells: int, factor: int) -> dict[str, int]:
    return {
        "default": cells * factor,
        "min": min(_SMALLEST, cells) * factor,
        "max": _LARGEST * cells * factor,
        "multiple": factor,
    }


def _latents(latent: LatentSpec, size: int, seed: int) -> dict[str, Array]:
    """What a denoiser that works would hand over: latents of unit variance, unscaled."""
    noise = batch_normal(seed, range(2), (latent.channels, size, size))
    return {"latent_sample": (noise / latent.scaling_factor + latent.shift_factor).astype(np.float32)}


def _pictures(channels: int, factor: int, size: int, seed: int) -> dict[str, Array]:
    """Patches of plain colour with grain on them, in [-1, 1]."""
    patches = batch_normal(seed, range(2), (channels, size, size)).repeat(factor, axis=2).repeat(factor, axis=3)
    grain = batch_normal(seed, range(2), patches.shape[1:], stream=1)
    return {"sample": np.clip(0.5 * patches + 0.1 * grain, -1, 1).astype(np.float32)}
