"""Prompts through a pipeline's text encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError
from lehr.runtime.pipeline_spec import PipelineSpec
from lehr.runtime.stages import StageSet
from lehr.runtime.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a text encoder made of texts, a row a text.

    Attributes:
        outputs: by the names of the stage's spec.
        mask: (N, L) int64, 1 for a token and 0 for filling.
    """

    outputs: Mapping[str, Array]
    mask: Array

    def __getitem__(self, name: str) -> Array:
        if name not in self.outputs:
            raise BundleError(
                f"a text encoder returns {sorted(self.outputs)}, the pipeline needs {name!r}. Export the model again."
            )
        return self.outputs[name]

    def split(self, first: int) -> tuple[Encoded, Encoded]:
        """The first rows, and the others."""
        return self._rows(slice(first)), self._rows(slice(first, None))

    def _rows(self, rows: slice) -> Encoded:
        return Encoded(outputs={name: value[rows] for name, value in self.outputs.items()}, mask=self.mask[rows])


class TextEncoders:
    """Calls the text encoders of one pipeline, one text at a time, each text once.

    One at a time, a text's features cannot depend on what it is drawn beside.

    Args:
        spec: the pipeline's.
        stages: its stages.
        read: the content of a file of the bundle, for tokenizers.
        warn: told what of a prompt is cut off.
    """

    def __init__(self, spec: PipelineSpec, stages: StageSet, read: Callable[[str], bytes], warn: Warn) -> None:
        self._spec, self._stages, self._read, self._warn = spec, stages, read, warn
        self._tokenizers: dict[str, Tokenizer] = {}
        self._told: set[str] = set()

    def has(self, stage: str) -> bool:
        """Whether the pipeline has this encoder."""
        return stage in self._stages.names()

    def __call__(self, stage: str, texts: Sequence[str], *, masked: bool = False) -> Encoded:
        """Features of ``texts``, a row each.

        Args:
            stage: such as "text_encoder_2".
            texts: any number, at least one.
            masked: whether the encoder is told which tokens are filling; else it takes all as text.

        Raises:
            BundleError: the bundle has no such encoder or no tokenizer for it.
        """
        if stage not in self._spec.tokenizers or not self.has(stage):
            raise BundleError(
                f"the pipeline has no {stage!r} with a tokenizer, which it needs. Export the model again."
            )
        different = list(dict.fromkeys(texts))
        tokens = self._tokenizer(stage)(different)
        for text, cut in zip(different, tokens.cut, strict=True):
            self._tell(stage, text, cut)
        made: list[Mapping[str, Array]] = []
        with self._stages.using(stage) as runner:
            takes_mask = any(tensor.name == "attention_mask" for tensor in runner.spec.inputs)
            for row in range(len(different)):
                feeds = {"input_ids": tokens.ids[row : row + 1]}
                if takes_mask:
                    mask = tokens.mask[row : row + 1]
                    feeds["attention_mask"] = mask if masked else np.ones_like(mask)
                made.append(runner(feeds))
        rows = [different.index(text) for text in texts]
        outputs = {name: np.concatenate([one[name] for one in made])[rows] for name in made[0]}
        return Encoded(outputs=outputs, mask=tokens.mask[rows])

    def _tokenizer(self, stage: str) -> Tokenizer:
        if stage not in self._tokenizers:
            spec = self._spec.tokenizers[stage]
            self._tokenizers[stage] = Tokenizer(spec, self._read(spec.file))
        return self._tokenizers[stage]

    def _tell(self, stage: str, text: str, cut: str) -> None:
        """Once a text, though two encoders with the same limit cut the same."""
        if not cut or (message := self._cut(stage, cut)) in self._told:
            return
        self._told.add(message)
        self._warn(message)

    def _cut(self, stage: str, cut: str) -> str:
        limit = self._spec.tokenizers[stage].max_length
        return f"the prompt is longer than {limit} tokens, all that {stage} takes; this was cut off: {cut!r}"
