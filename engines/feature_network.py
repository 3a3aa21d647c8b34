"""Feature networks: ONNX files that turn samples, or what a sample was asked to be, into vectors.

The convention is small, so that any network fits behind it:

- an image network takes one float32 tensor (N, C, H, W), what the model draws, and returns ``features`` of (N, D) or
  (N, D, h, w), which is averaged over positions; without that name the first floating-point output counts. It may also
  return ``logits`` (N, K), whose largest is the predicted class. Metadata ``lehr.range`` says what values it wants,
  "-1,1" by default; samples are clipped to the model's own range and brought there.
- a text network takes some of the model's conditions under their own names and returns (N, D), in the space of the
  image network's features.

Latents need their decoder in front, in the same file. Nothing is resized: how a picture is shrunk changes such
distances (Parmar et al. 2022, arXiv:2104.11222), so it belongs into the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput, RunFailed

Array = npt.NDArray[Any]

FEATURES, LOGITS, RANGE = "features", "logits", "lehr.range"
BATCH = 50  # pictures at once
_FLOATING = ("tensor(float)", "tensor(float16)", "tensor(double)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Of N samples: vectors (N, D) and, where the network classifies, classes (N,)."""

    vectors: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64] | None = None


class _Network:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, file: Path) -> None:
        from lehr.runtime.backends.onnxruntime import FAILURES, PROVIDER, OnnxRuntimeSession, session_options

        import onnxruntime as ort  # isort: skip

        try:
            self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            options = session_options({"intra_op_threads": 0, "spinning": False})
            session = ort.InferenceSession(file, options, providers=[PROVIDER])
        except OSError as e:
            raise InvalidInput(f"cannot read the feature network {file}: {e.strerror or e}.") from e
        except FAILURES as e:
            raise InvalidInput(f"{file.name} is no network that ONNX Runtime runs: {e}") from e
        self.name = file.name
        self.inputs = list(session.get_inputs())
        self.outputs = list(session.get_outputs())
        self.metadata = dict(session.get_modelmeta().custom_metadata_map)
        self._session = OnnxRuntimeSession(session)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return self._session.run(feeds)
        except RunFailed as e:
            shapes = {name: value.shape for name, value in feeds.items()}
            raise InvalidInput(f"{self.name} does not take {shapes}: {e}") from e

    def _vectors(self) -> str:
        floating = [output.name for output in self.outputs if output.type in _FLOATING and output.name != LOGITS]
        if not floating:
            raise InvalidInput(f"{self.name} returns no floating-point features; its outputs: {self._names()}.")
        return FEATURES if FEATURES in floating else floating[0]

    def _names(self) -> str:
        return ", ".join(output.name for output in self.outputs)


class ImageNetwork(_Network):
    """Samples -> :class:`Features`.

    Raises:
        InvalidInput: no ONNX file that runs, or one that does not follow the convention.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        if len(self.inputs) != 1 or len(self.inputs[0].shape) != 4 or self.inputs[0].type != "tensor(float)":
            raise InvalidInput(f"{self.name} must take one float32 tensor (N, C, H, W); it takes {self.inputs}.")
        self._output = self._vectors()
        text = self.metadata.get(RANGE, "-1,1")
        try:
            low, high = (float(part) for part in text.split(","))
        except ValueError as e:
            raise InvalidInput(f"{self.name}: metadata {RANGE} is {text!r}, expected two numbers, '-1,1'.") from e
        self._range = low, high

    def __call__(self, samples: Array, value_range: tuple[float, float]) -> Features:
        """Look at (N, C, H, W) samples; raises InvalidInput where the network does not take their shape."""
        low, high = value_range
        unit = (np.clip(samples, low, high) - low) / (high - low)
        pictures = (self._range[0] + unit * (self._range[1] - self._range[0])).astype(np.float32)
        channels = self.inputs[0].shape[1]
        if channels == 3 and pictures.shape[1] == 1:
            pictures = np.repeat(pictures, 3, axis=1)
        vectors, classes = [], []
        for first in range(0, len(pictures), BATCH):
            made = self._run({self.inputs[0].name: pictures[first : first + BATCH]})
            found = made[self._output].astype(np.float64)
            vectors.append(found.mean(axis=(2, 3)) if found.ndim == 4 else found.reshape(len(found), -1))
            if LOGITS in made:
                classes.append(np.argmax(made[LOGITS], axis=1))
        return Features(
            vectors=np.concatenate(vectors), classes=np.concatenate(classes).astype(np.int64) if classes else None
        )


class TextNetwork(_Network):
    """Conditions -> vectors (N, D); raises as :class:`ImageNetwork` does."""

    def __call__(self, conditions: Mapping[str, Array]) -> npt.NDArray[np.float64]:
        """Embed what N samples were asked to be."""
        names = [tensor.name for tensor in self.inputs]
        if missing := [name for name in names if name not in conditions]:
            raise InvalidInput(
                f"{self.name} takes {', '.join(missing)}, which the model is not conditioned on; it has "
                f"{', '.join(conditions) or 'no conditions'}. Inputs must bear the names of the model's conditions."
            )
        count = len(conditions[names[0]])
        parts = [
            self._run({name: conditions[name][first : first + BATCH] for name in names})[self._vectors()]
            for first in range(0, count, BATCH)
        ]
        return np.concatenate(parts).astype(np.float64).reshape(count, -1)
