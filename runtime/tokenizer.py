"""Prompts as token ids, by the ``tokenizers`` library and the ``tokenizer.json`` that a bundle holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import BundleError, MissingExtra
from lehr.runtime.pipeline_spec import TokenizerSpec

if TYPE_CHECKING:
    import tokenizers

MAX_BYTES = 1 << 26  # of a tokenizer.json; those of a quarter of a million tokens have 17 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a text encoder is fed.

    Attributes:
        ids: (N, L) int64, filled up on the right.
        mask: (N, L) int64, 1 for a token and 0 for filling.
        cut: the end of each text that did not fit, "" for one that did.
    """

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    cut: tuple[str, ...]


class Tokenizer:
    """One text encoder's tokenizer: texts in, ids of equal length out.

    Args:
        spec: how long texts may be and how they are filled up.
        data: content of a ``tokenizer.json``.

    Raises:
        BundleError: ``data`` is no tokenizer.
        MissingExtra: the ``tokenizers`` library is not installed.
    """

    def __init__(self, spec: TokenizerSpec, data: bytes) -> None:
        self.spec = spec
        self._whole, self._cutting = _load(spec, data), _load(spec, data)
        self._whole.no_truncation()
        self._cutting.enable_truncation(spec.max_length)
        for tokenizer in (self._whole, self._cutting):
            tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids of ``texts``; the special tokens around a text that is cut stay."""
        found, cut = [], []
        for text in texts:
            encoding, rest = self._whole.encode(text), ""
            if len(encoding.ids) > self.spec.max_length:
                encoding = self._cutting.encode(text)
                rest = text[_end(encoding) :].strip()
            found.append(encoding.ids)
            cut.append(rest)
        length = self.spec.max_length if self.spec.pad_to_max else max((len(ids) for ids in found), default=0)
        ids = np.full((len(found), length), self.spec.pad_id, dtype=np.int64)
        mask = np.zeros((len(found), length), dtype=np.int64)
        for row, one in enumerate(found):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        return Tokens(ids=ids, mask=mask, cut=tuple(cut))


def _end(encoding: Any) -> int:
    """Where the last token that stands for text ends, counted in characters."""
    marked = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    ends = [end for (_, end), special in marked if not special]
    return max(ends, default=0)


def _load(spec: TokenizerSpec, data: bytes) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ModuleNotFoundError as e:
        raise MissingExtra("tokenizers", "text") from e
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as e:  # the library raises nothing narrower
        raise BundleError(f"{spec.file} is no tokenizer that can be read ({e}). Export the model again.") from e
