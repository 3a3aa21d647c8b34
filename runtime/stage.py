"""What a stage beside the denoiser takes and returns: a text encoder, a decoder, a ControlNet.

A stage is one graph with an engine of its own for every target and recipe. It stands in the bundle as the denoiser
does, under ``stages/<name>/``: ``model.onnx``, ``weights.safetensors``, ``golden.npz`` and ``engines/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.names import name_problem
from lehr.runtime.spec import BATCH, Dim, GraphSpec, TensorSpec, bind_shape, undeclared

STAGES = "stages"  # the folder of all stages in a bundle


class StageKind(str, Enum):
    """What a stage does for the picture."""

    TEXT_ENCODER = "text_encoder"  # input_ids and attention_mask -> features, once per prompt
    IMAGE_ENCODER = "image_encoder"  # picture -> features that condition the denoiser
    LATENT_ENCODER = "latent_encoder"  # picture -> latent, for img2img and inpainting
    LATENT_DECODER = "latent_decoder"  # latent -> picture
    CONTROL = "control"  # a ControlNet: at every evaluation, picture and x_t -> residuals that the step graph takes


# Whole pictures are large: an engine of these takes so many at once, and more are taken in turns.
_PICTURES = frozenset({StageKind.IMAGE_ENCODER, StageKind.LATENT_ENCODER, StageKind.LATENT_DECODER})
PICTURES_AT_ONCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """A stage's contract.

    Attributes:
        name: diffusers' name of the component ("text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder",
            "controlnet"), a plain word; the stage's folder.
        kind: what it does.
        family: architecture, such as "clip_text", "t5_encoder", "autoencoder_kl", "autoencoder_tiny".
        inputs, outputs: by the names that diffusers or transformers gives them, batch first.
        dims: the sizes that may differ between calls.
        notes: facts for people.
    """

    name: str
    kind: StageKind
    family: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...] = (BATCH,)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or name_problem(self.name):
            raise InvalidInput(f"stage name {self.name!r} must be a plain word, such as 'text_encoder'")
        if not self.inputs or not self.outputs:
            raise InvalidInput(f"stage {self.name!r} needs at least one input and one output")
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise InvalidInput(f"stage {self.name!r}: tensor names must differ, got {names}")
        declared = {dim.name for dim in self.dims}
        if unknown := undeclared(self.inputs, declared):
            raise InvalidInput(f"stage {self.name!r}: shapes use {unknown}, dims declare {sorted(declared)}")

    @property
    def signature(self) -> GraphSpec:
        return GraphSpec(inputs=self.inputs, outputs=self.outputs)

    @property
    def max_batch(self) -> int | None:
        """Rows that one call of the engine takes; None where nothing but memory limits them."""
        return PICTURES_AT_ONCE if self.kind in _PICTURES else None

    @property
    def folder(self) -> str:
        """Where the stage stands in its bundle."""
        return f"{STAGES}/{self.name}"

    def dim(self, name: str) -> Dim:
        return next(dim for dim in self.dims if dim.name == name)

    def default_sizes(self, **sizes: int) -> dict[str, int]:
        """Every dimension's default, with those in ``sizes`` replaced."""
        return {dim.name: dim.default for dim in self.dims} | sizes

    def check_feeds(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
        """Hold feeds against the spec; return the dimensions they bind.

        Raises:
            InvalidInput: a missing or unknown input, a wrong dtype or rank, a size that breaks a rule.
        """
        expected = {tensor.name: tensor for tensor in self.inputs}
        if set(feeds) != set(expected):
            raise InvalidInput(f"{self.name}: inputs {sorted(feeds)}, expected {sorted(expected)}.")
        bound: dict[str, int] = {}
        for name, tensor in expected.items():
            bind_shape(tensor, feeds[name], self.dims, bound)
        return bound

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind.value,
            "family": self.family,
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "dims": [
                {"name": d.name, "default": d.default, "min": d.min, "max": d.max, "multiple": d.multiple}
                for d in self.dims
            ],
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageSpec:
        """Rebuild a spec; raises InvalidInput, KeyError, TypeError or ValueError for data of another shape."""
        return cls(
            name=str(data["name"]),
            kind=StageKind(data["kind"]),
            family=str(data["family"]),
            inputs=tuple(TensorSpec.from_json(item) for item in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(item) for item in data["outputs"]),
            dims=tuple(Dim(**item) for item in data["dims"]),
            notes={str(k): str(v) for k, v in data["notes"].items()},
        )
