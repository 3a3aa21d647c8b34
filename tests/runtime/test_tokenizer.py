"""Prompts as ids, against transformers' tokenizers called as diffusers' pipelines call them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_toy import FILE, TOKENIZER, WORDS, tokenizer_json

from lehr.runtime.errors import BundleError, InvalidInput, MissingExtra
from lehr.runtime.pipeline_spec import TokenizerSpec
from lehr.runtime.tokenizer import Tokenizer

pytest.importorskip("tokenizers")

KINDS = {"clip": 77, "clip, other padding": 77, "t5": 20}


@pytest.fixture(scope="module")
def both():
    """(ours, transformers') by kind."""
    tiny = pytest.importorskip("tiny_pipelines", exc_type=ImportError)
    theirs = {
        "clip": tiny.clip_tokenizer(),
        "clip, other padding": tiny.clip_tokenizer(pad_token="!"),
        "t5": tiny.t5_tokenizer(20),
    }
    ours = {
        kind: Tokenizer(
            TokenizerSpec(file=FILE, max_length=KINDS[kind], pad_id=one.pad_token_id),
            one.backend_tokenizer.to_str().encode(),
        )
        for kind, one in theirs.items()
    }
    return {kind: (ours[kind], theirs[kind]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(
    texts=st.lists(st.text(max_size=60) | st.text(alphabet="a cat,red house! \n", max_size=200), min_size=1, max_size=3)
)
def test_ids_and_masks_are_those_that_diffusers_feeds(both, kind, texts):
    ours, theirs = both[kind]
    found = ours(texts)
    expected = theirs(texts, padding="max_length", max_length=KINDS[kind], truncation=True, return_tensors="np")
    assert np.array_equal(found.ids, expected.input_ids)
    if kind == "t5":  # CLIP's mask is never fed
        assert np.array_equal(found.mask, expected.attention_mask)


def test_a_text_that_is_too_long_keeps_its_special_tokens_and_tells_what_is_cut():
    found = Tokenizer(TOKENIZER, tokenizer_json())(["a red fox a red fox a red fox", "Blue  sea"])
    words = [[WORDS[i] for i in row] for row in found.ids]
    assert words[0] == ["[begin]", "a", "red", "fox", "a", "red", "fox", "[end]"]
    assert words[1] == ["[begin]", "blue", "sea", "[end]"] + ["[pad]"] * 4
    assert found.cut == ("a red fox", "")
    assert found.mask.tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    assert found.ids.dtype == found.mask.dtype == np.int64


def test_without_filling_up_ids_are_as_long_as_the_longest_text():
    spec = TokenizerSpec(file=FILE, max_length=8, pad_id=0, pad_to_max=False)
    tokenizer = Tokenizer(spec, tokenizer_json())
    assert tokenizer(["a fox", "sea"]).ids.shape == (2, 4)
    assert tokenizer([""]).ids.shape == (1, 2)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_named(data):
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer(TOKENIZER, data)


def test_the_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"lehr\[text\]"):
        Tokenizer(TOKENIZER, tokenizer_json())


@pytest.mark.parametrize("length", [0, 1 << 40])
def test_a_length_that_holds_nothing_or_all_memory_is_refused(length):
    with pytest.raises(InvalidInput, match="max_length"):
        TokenizerSpec(file=FILE, max_length=length, pad_id=0)
