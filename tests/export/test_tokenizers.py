"""Tokenizers of folders, old and new, against transformers with the call that diffusers' pipelines make."""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lehr.export.encoders import tokenizers as found
from lehr.export.encoders.tokenizers import tokenizer_json, tokenizer_spec
from lehr.runtime.errors import InvalidInput, MissingExtra
from lehr.runtime.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
spm = pytest.importorskip("sentencepiece")
logging.getLogger("transformers").setLevel(logging.ERROR)

WORDS = "a photo of the cat sitting on an old chair in London while it's raining don't red blue green picture 1 22"
TEXT = WORDS.split()
SENTENCES = [" ".join(TEXT[i:] + TEXT[:i]) for i in range(len(TEXT))] * 5
REAL = Path(os.environ.get("LEHR_REAL_ENCODER", "no-such-folder"))  # with tokenizer.json and model.onnx

# -------------------------------------------------------------------------------------------------- tokenizers


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def merges_of(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """The ``count`` most frequent pairs, one merge after the other: byte-pair encoding as first published."""
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            parts, i = [], 0
            while i < len(word):
                joined = word[i : i + 2] == best
                parts.append("".join(word[i : i + 2]) if joined else word[i])
                i += 2 if joined else 1
            merged[tuple(parts)] += times
        words = merged
    return merges


def clip_folder(folder: Path, *, pad: str = "<|endoftext|>") -> Path:
    """vocab.json and merges.txt, as folders of Stable Diffusion have them."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = Counter((*word[:-1], word[-1] + "</w>") for line in SENTENCES for word in line.lower().split())
    merges = merges_of(words, 60)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    write(folder, "vocab.json", vocabulary)
    write(folder, "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 20})
    write(folder, "special_tokens_map.json", {"pad_token": pad, "eos_token": "<|endoftext|>"})
    return folder


def t5_folder(folder: Path) -> Path:
    """spiece.model, as folders of PixArt have it."""
    folder.mkdir(parents=True)
    (folder / "lines.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 20, "pad_token": "<pad>"}
    write(folder, "tokenizer_config.json", {**config, "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0})
    return folder


def bert_folder(folder: Path) -> Path:
    """vocab.txt, as sentence encoders have it."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789',.!?"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *TEXT]
    write(
        folder, "vocab.txt", "\n".join(dict.fromkeys(token.lower() if token[0] != "[" else token for token in tokens))
    )
    write(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 20})
    return folder


def qwen_folder(folder: Path) -> Path:
    """Byte-level vocab.json and merges.txt."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = Counter(tuple(mark + word) for line in SENTENCES for mark in ("", "Ġ") for word in line.split())
    merges = merges_of(words, 60)
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges), "<|endoftext|>"])
    write(folder, "vocab.json", {token: i for i, token in enumerate(tokens)})
    write(folder, "merges.txt", "\n".join(" ".join(pair) for pair in merges) + "\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 20, "pad_token": "<|endoftext|>"}
    write(folder, "tokenizer_config.json", config)
    return folder


FOLDERS = {"clip": clip_folder, "t5": t5_folder, "bert": bert_folder, "qwen": qwen_folder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / name) for name, make in FOLDERS.items()}


def strings(count: int) -> list[str]:
    """Words, mixed case, runs of whitespace, control characters, emoji, every plane of Unicode; short and long."""
    rng = random.Random(0)
    blanks = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2028", " \t \n "]
    emoji = ["🙂", "👩‍👩‍👧", "🏳️‍🌈", "🇪🇬", "👍🏽", "☃", "❤️"]
    odd = [
        "<|endoftext|>",
        "</s>",
        "[SEP]",
        "<pad>",
        "it's",
        "DON'T",
        "e\u0301",
        "é",
        "ﬁ",
        "Ⅷ",
        "İ",
        "ß",
        "ẞ",
        "▁",
        "</w>",
    ]

    def character() -> str:
        low, high = rng.choice(
            [(0, 0x7F), (0x80, 0x24F), (0x370, 0x5FF), (0x4E00, 0x9FFF), (0xE000, 0xFFFD), (0x10000, 0x10FFFF)]
        )
        return chr(rng.randint(low, high))

    def piece() -> str:
        kind = rng.random()
        if kind < 0.45:
            return rng.choice([str.lower, str.upper, str.title, str.swapcase])(rng.choice(TEXT))
        if kind < 0.65:
            return rng.choice(blanks)
        if kind < 0.75:
            return rng.choice(emoji)
        return rng.choice(odd) if kind < 0.85 else character()

    made = [
        "",
        " ",
        "a" * 10_000,
        "".join(piece() for _ in range(3000))[:10_000],
        "\x00",
        "  cat  ",
        "".join(map(chr, range(128))),
    ]
    while len(made) < count:
        made.append("".join(piece() + rng.choice(["", " "]) for _ in range(rng.randint(0, 16))))
    return made


# ----------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("name", list(FOLDERS))
def test_ten_thousand_strings_become_the_ids_that_transformers_gives_them(name: str, folders: dict[str, Path]) -> None:
    texts = strings(10_000)
    reference = transformers.AutoTokenizer.from_pretrained(folders[name], local_files_only=True)
    expected = reference(texts, padding="max_length", max_length=20, truncation=True, return_tensors="np")
    spec = tokenizer_spec(folders[name], "text_encoder")
    assert (spec.file, spec.max_length) == ("stages/text_encoder/tokenizer.json", 20)
    tokens = Tokenizer(spec, tokenizer_json(folders[name]))(texts)
    differ = np.flatnonzero((tokens.ids != expected.input_ids).any(axis=1))
    assert not differ.size, f"{differ.size} strings differ, the first is {texts[differ[0]]!r}"
    assert np.array_equal(tokens.mask, expected.attention_mask)
    assert len({tuple(row) for row in tokens.ids}) > 5000  # not one id for all


@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_folder_that_transformers_writes_today_gives_the_same_ids(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name], local_files_only=True)
    tokenizer(["a"], padding="max_length", max_length=7, truncation=True)  # leaves its mark in the file
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    texts = strings(500)
    spec = tokenizer_spec(tmp_path, "text_encoder", max_length=20)
    again = Tokenizer(spec, tokenizer_json(tmp_path))(texts)
    before = Tokenizer(tokenizer_spec(folders[name], "text_encoder"), tokenizer_json(folders[name]))(texts)
    assert np.array_equal(again.ids, before.ids)


@pytest.mark.skipif(not (REAL / "tokenizer.json").is_file(), reason="LEHR_REAL_ENCODER names no folder with one")
def test_a_published_tokenizer_equals_the_library() -> None:
    data = tokenizer_json(REAL)
    library = tokenizers.Tokenizer.from_file(str(REAL / "tokenizer.json"))
    library.no_padding()
    library.enable_truncation(64)
    with pytest.raises(InvalidInput, match="model_max_length"):  # it has no configuration beside the file
        tokenizer_spec(REAL, "text_encoder")
    spec = found.TokenizerSpec(file="stages/text_encoder/tokenizer.json", max_length=64, pad_id=0)
    texts = strings(2000)
    ids = Tokenizer(spec, data)(texts).ids
    for text, row in zip(texts, ids, strict=True):
        expected = library.encode(text).ids
        assert row.tolist() == expected + [0] * (64 - len(expected))


# ------------------------------------------------------------------------------------------------------ settings


def test_padding_and_truncation_leave_the_file_and_nothing_else_changes(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"cat": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain = json.loads(library.to_str())
    library.enable_padding(length=9)
    library.enable_truncation(5)
    library.save(str(tmp_path / "tokenizer.json"))
    assert json.loads(tokenizer_json(tmp_path)) == plain
    raw = json.dumps(plain).encode()
    (tmp_path / "tokenizer.json").write_bytes(raw)
    assert tokenizer_json(tmp_path) == raw


@pytest.mark.parametrize(("pad", "expected"), [("<|endoftext|>", "<|endoftext|>"), ("!", "!")])
def test_the_padding_token_is_the_folders_own(pad: str, expected: str, tmp_path: Path) -> None:
    """SDXL's second tokenizer pads with "!"."""
    folder = clip_folder(tmp_path / "tokenizer_2", pad=pad)
    spec = tokenizer_spec(folder, "text_encoder_2")
    assert spec.pad_id == json.loads((folder / "vocab.json").read_text(encoding="utf-8"))[expected]
    assert spec.file == "stages/text_encoder_2/tokenizer.json"


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": "{"}, "no readable tokenizer"),
        ({"tokenizer.json": "[1]"}, "describes no model"),
        ({"tokenizer.json": '{"version": "1.0"}'}, "describes no model"),
        (
            {"spiece.model": "no protocol buffer", "tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'},
            "convert",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(files: dict[str, str], reason: str, tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(InvalidInput, match=reason):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"padding_side": "left"}, "pads on the left"),
        ({"model_max_length": 1e30}, "model_max_length"),
        ({"pad_token": "<nothing>"}, "no token of its tokenizer"),
    ],
)
def test_a_configuration_that_cannot_be_kept_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, "tokenizer_config.json", config | change)
    with pytest.raises(InvalidInput, match=reason):
        tokenizer_spec(folder, "text_encoder")


def test_a_missing_converter_is_named_with_its_extra(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "_installed", lambda library: library != "sentencepiece")
    with pytest.raises(MissingExtra, match=r"sentencepiece.*lehr\[diffusers\]"):
        tokenizer_json(folders["t5"])
    assert tokenizer_json(folders["bert"])  # needs transformers alone
