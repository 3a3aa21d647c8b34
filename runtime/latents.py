"""Between pictures and a denoiser's latents: the autoencoder's stages, their scale, tiles, and masks.

Shape legend: as in :mod:`lehr.runtime.text_to_image`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError, InvalidInput, RunFailed
from lehr.runtime.noise import standard_normal
from lehr.runtime.picture_request import PictureRequest
from lehr.runtime.pipeline_spec import PipelineSpec
from lehr.runtime.pipelines.family import Family, latent_of
from lehr.runtime.spec import ModelSpec
from lehr.runtime.stages import StageFunction, StageSet
from lehr.runtime.tiling import tile_size, tiled

Array = npt.NDArray[Any]

DECODER, ENCODER = "vae_decoder", "vae_encoder"
# Streams of noise beyond any loop's: of the init picture, of its kept part, and from there on of pictures that steer.
ENCODED, MASKED, STEERED = 1 << 32, (1 << 32) + 1, (1 << 32) + 2
_REDRAWN = 0.5  # a mask's value from which on a pixel is redrawn


class Coder:
    """Encodes and decodes with a pipeline's stages, one picture at a time.

    Args:
        spec: of the pipeline.
        model: the denoiser's spec.
        stages: of the pipeline.
        family: of the pipeline.
    """

    def __init__(self, spec: PipelineSpec, model: ModelSpec, stages: StageSet, family: Family) -> None:
        self._spec, self._model, self._stages, self._family = spec, model, stages, family

    # -------------------------------------------------------------------------------------------- to pictures

    def decode(self, latents: Array, tile: int | None, *, sparing: bool) -> Array:
        """(N, C, h, w) -> (N, 3, H, W) in [0, 1].

        Args:
            latents: as the denoiser draws them.
            tile: cells along the side of a tile; None decides by size, 0 is whole.
            sparing: whether memory counts more than time.

        Raises:
            BundleError: the pipeline has no decoder.
            RunFailed: the decoder returned values that are not finite.
        """
        if self._spec.latent is None:
            low, high = self._model.value_range
            return _unit((latents - low) / (high - low))
        latent = self._spec.latent
        inner = (latents / np.float32(latent.scaling_factor) + np.float32(latent.shift_factor)).astype(np.float32)
        side = tile_size(inner.shape[2], inner.shape[3], tile, sparing=sparing)
        if DECODER not in self._stages.names():
            raise BundleError(
                f"the bundle has no stage {DECODER!r}, which turns latents into pictures. Export it again."
            )
        with self._stages.using(DECODER) as decoder:

            def whole(part: Array) -> Array:
                return _only(decoder, np.ascontiguousarray(part))

            pictures = [
                whole(one) if side is None else tiled(whole, one, tile=side, factor=latent.factor)
                for one in np.split(inner, len(inner))
            ]
        drawn = np.concatenate(pictures)
        if not np.all(np.isfinite(drawn)):
            raise RunFailed(
                "the decoder returned values that are not finite; its recipe overflows on this model. Use fp32 or bf16 "
                f"for it (--stage-recipe {DECODER}=fp32)."
            )
        return _unit(drawn / 2 + np.float32(0.5))

    # --------------------------------------------------------------------------------------------- to latents

    def encode(
        self, request: PictureRequest, picture: Array, height: int, width: int, *, stream: int = ENCODED
    ) -> Array:
        """Pictures in [0, 1] as latents (N, C, h, w), sampled from the encoder's distribution with the request's seed.

        Args:
            request: for the number of pictures and their seeds.
            picture: (3, H, W) or (N, 3, H, W).
            height: in pixels.
            width: in pixels.
            stream: of the noise.

        Raises:
            InvalidInput: a picture of another shape, or values outside [0, 1].
            BundleError: the pipeline has no encoder.
        """
        channels = 3 if self._spec.latent is not None else self._model.sample_shape(1)[1]
        pictures = _pictures(picture, request.count, (channels, height, width))
        if self._spec.latent is None:
            low, high = self._model.value_range
            return np.asarray(low + (high - low) * pictures, dtype=np.float32)
        if ENCODER not in self._stages.names():
            raise BundleError(
                f"the bundle has no stage {ENCODER!r}, which img2img and inpainting need. Export the pipeline again "
                "with its autoencoder."
            )
        latent, encoded = latent_of(self._spec), []
        with self._stages.using(ENCODER) as encoder:
            for k, one in enumerate(pictures):
                if k == 0 or not np.array_equal(one, pictures[k - 1]):
                    feed = np.ascontiguousarray(one[None] * 2 - np.float32(1))
                    outputs = encoder({encoder.spec.inputs[0].name: feed})
                    # The encoder of a tiny autoencoder gives one latent instead of a distribution.
                    mean, std = outputs["mean"], outputs.get("std", np.float32(0))
                seed, index = (request.seeds[k], 0) if request.seeds else (request.seed, k)
                encoded.append(mean + std * standard_normal(seed, index, mean.shape[1:], stream=stream))
        inner: Array = np.concatenate(encoded)
        scaled: Array = (inner - np.float32(latent.shift_factor)) * np.float32(latent.scaling_factor)
        return scaled.astype(np.float32)

    def cells(self, mask: Array, num: int, height: int, width: int) -> Array:
        """A mask of pixels as one of latent cells, (N, 1, h, w) of 0 and 1: each cell takes its first pixel's value.

        Raises:
            InvalidInput: a mask of another shape, or values outside [0, 1].
        """
        array = np.asarray(mask, dtype=np.float32)
        array = array.reshape(-1, *array.shape[-2:]) if array.ndim in (2, 3) else array[:, 0]
        if array.shape[1:] != (height, width) or len(array) not in (1, num):
            raise InvalidInput(
                f"the mask has shape {np.shape(mask)}, expected ({height}, {width}), the picture's size, or one for "
                f"each of {num} pictures. Resize it first."
            )
        if not np.all((array >= 0) & (array <= 1)):
            raise InvalidInput("the mask holds values outside [0, 1]; 1 is redrawn, 0 is kept.")
        factor = self._family.factor
        found = (array[:, None, ::factor, ::factor] >= _REDRAWN).astype(np.float32)
        return np.broadcast_to(found, (num, *found.shape[1:]))

    def masked(self, request: PictureRequest, picture: Array, mask: Array, height: int, width: int) -> Array:
        """What an inpainting network joins to its sample: the mask of cells, and the picture's kept part as a latent.

        Args:
            request: with the mask of pixels.
            picture: as :meth:`encode` takes it.
            mask: of cells, from :meth:`cells`.
            height: in pixels.
            width: in pixels.

        Returns:
            (N, 1 + C, h, w).
        """
        pixels = np.asarray(request.mask, dtype=np.float32)
        pixels = pixels.reshape(-1, 1, *pixels.shape[-2:])
        pictures = _pictures(picture, request.count, (3, height, width))
        # Redrawn pixels are grey, the middle of the encoder's range.
        kept = np.where(pixels < _REDRAWN, pictures, np.float32(0.5))
        return np.concatenate([mask, self.encode(request, kept, height, width, stream=MASKED)], axis=1)


def _only(stage: StageFunction, value: Array) -> Array:
    """What a stage of one input and one output makes of ``value``."""
    outputs = stage({stage.spec.inputs[0].name: value})
    return outputs[stage.spec.outputs[0].name]


def _unit(values: Array) -> Array:
    return np.clip(values, 0, 1).astype(np.float32)


def _pictures(given: Array, num: int, shape: tuple[int, ...]) -> Array:
    array = np.asarray(given, dtype=np.float32)
    if array.shape not in (shape, (1, *shape), (num, *shape)):
        raise InvalidInput(
            f"the picture to start from has shape {array.shape}, expected {shape} or one for each of {num} pictures. "
            "Resize it first, or name its size (--height, --width)."
        )
    if not np.all((array >= 0) & (array <= 1)):
        raise InvalidInput("the picture to start from holds values outside [0, 1].")
    return np.broadcast_to(array, (num, *shape))
