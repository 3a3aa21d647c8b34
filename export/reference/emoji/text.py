"""Captions as tokens: a byte-pair tokenizer (Sennrich et al. 2016, arXiv:1508.07909).

Shape legend: B batch, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

PAD, BOS, EOS, UNKNOWN = "[PAD]", "[BOS]", "[EOS]", "[UNK]"  # ids 0 … 3


def train_tokenizer(texts: Iterable[str], path: Path, vocabulary: int, longest: int) -> Tokenizer:
    """Learn ``vocabulary`` tokens from ``texts``; write ``tokenizer.json`` to ``path``."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace("_", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS, UNKNOWN],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    tokenizer.enable_truncation(longest)
    tokenizer.save(str(path))
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``."""
    return Tokenizer.from_file(str(path))


def tokens(tokenizer: Tokenizer, prompts: list[str], multiple: int = 8) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each (B, M) int64; M is the longest prompt's length rounded up to ``multiple``."""
    encoded = [one.ids for one in tokenizer.encode_batch(prompts)]
    length = -(-max(map(len, encoded)) // multiple) * multiple
    ids = torch.zeros(len(encoded), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(encoded):
        ids[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    return ids, mask
