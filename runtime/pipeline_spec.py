"""How the stages of a bundle make a picture, as data: what diffusers' ``model_index.json`` and its pipeline class say.

The conventions that differ between families (which text encoder feeds what, how latents are packed) are code, one
file a family in :mod:`lehr.runtime.pipelines`; everything that a configuration can change is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lehr.runtime.errors import InvalidInput
from lehr.runtime.names import name_problem

MAX_TOKENS = 1 << 16  # of one prompt; a manifest that asks for more is refused before anything is allocated


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """How one text encoder's prompt becomes ids.

    Attributes:
        file: the ``tokenizer.json`` in the bundle, such as "stages/text_encoder/tokenizer.json"; it adds the special
            tokens itself.
        max_length: tokens, special ones included; what is beyond is cut, with a warning.
        pad_id: fills up to ``max_length``.
        pad_to_max: False leaves the ids as long as they are (one length for a batch of prompts).
    """

    file: str
    max_length: int
    pad_id: int
    pad_to_max: bool = True

    def __post_init__(self) -> None:
        if problem := name_problem(self.file):
            raise InvalidInput(f"{self.file!r} cannot be a file in a bundle: {problem}")
        if not 1 <= self.max_length <= MAX_TOKENS or self.pad_id < 0:
            raise InvalidInput(f"a tokenizer needs max_length from 1 to {MAX_TOKENS} and pad_id >= 0, got {self}")

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "pad_to_max": self.pad_to_max,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Between the denoiser's latent and the decoder's: ``decoder input = latent / scaling_factor + shift_factor``.

    Attributes:
        channels: of the decoder's input (FLUX's denoiser sees them packed).
        factor: pixels along one side of a latent cell.
        scaling_factor, shift_factor: the autoencoder's.
    """

    channels: int
    factor: int
    scaling_factor: float
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.scaling_factor) and math.isfinite(self.shift_factor)
        if min(self.channels, self.factor) < 1 or not finite or self.scaling_factor == 0:
            raise InvalidInput(f"a latent needs channels and factor >= 1 and finite scales, got {self}")

    def to_json(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "factor": self.factor,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpec:
    """A pipeline that a bundle holds all stages of.

    Attributes:
        family: file in ``lehr.runtime.pipelines``: "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3",
            "flux", "pixart_alpha", "latent_consistency", "dit", …
        class_name: the diffusers class it was read from, for people.
        tokenizers: by the name of the text encoder's stage.
        latent: None for a denoiser of pixels.
        options: what a family's file reads besides, such as {"force_zeros_for_empty_prompt": True}; plain numbers,
            strings and booleans.
    """

    family: str
    class_name: str
    tokenizers: Mapping[str, TokenizerSpec] = field(default_factory=dict)
    latent: LatentSpec | None = None
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.family.isidentifier():
            raise InvalidInput(f"pipeline family {self.family!r} must be a plain word")
        for name, value in self.options.items():
            if not isinstance(value, (bool, int, float, str)):
                raise InvalidInput(f"pipeline option {name!r} is {value!r}, expected a number, a string or a boolean")

    def to_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "class_name": self.class_name,
            "tokenizers": {name: tokenizer.to_json() for name, tokenizer in self.tokenizers.items()},
            "latent": None if self.latent is None else self.latent.to_json(),
            "options": dict(self.options),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PipelineSpec:
        """Rebuild; raises InvalidInput, KeyError, TypeError or ValueError for data of another shape."""
        return cls(
            family=str(data["family"]),
            class_name=str(data["class_name"]),
            tokenizers={str(name): TokenizerSpec(**item) for name, item in data["tokenizers"].items()},
            latent=None if data["latent"] is None else LatentSpec(**data["latent"]),
            options={str(name): value for name, value in data["options"].items()},
        )
