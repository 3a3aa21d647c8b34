"""Captions of the emoji, drawn anew at every step so that the model learns what is meant rather than one wording.

A caption is the label, another name, the tags in a random order or a mixture, with synonyms, dropped words and
plurals, in a template or bare. Case needs nothing: the tokenizer lowers it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from lehr.export.reference.emoji.data import FLAGS, Emoji

EMPTY_SHARE = 0.1  # captions dropped for guidance (Ho & Salimans 2022, arXiv:2207.12598)
FACES = 0  # emojibase's number of the group
YELLOW_FACES = 11  # subgroups of the faces below it are yellow discs
TEMPLATES = (
    "a picture of {}", "a drawing of {}", "an icon of {}", "an emoji of {}", "{} emoji", "the {} emoji", "{} icon",
    "the {}", "a {}", "an image of {}", "a cartoon of {}", "show me {}", "draw {}", "{} symbol", "a small {}",
)  # fmt: skip
JOINS = (" ", ", ", " and ", " with ", " of ", " for ", " in ", " on ", " to ")
HERE = Path(__file__).parent


@cache
def synonyms() -> dict[str, list[str]]:
    """Words that may stand for a word."""
    table: dict[str, list[str]] = json.loads((HERE / "synonyms.json").read_text())
    return table


def held_out() -> list[tuple[str, str]]:
    """Pairs of hexcode and prompt that training never sees."""
    return [(row["hexcode"], row["prompt"]) for row in json.loads((HERE / "held_out.json").read_text())]


def compositions() -> list[str]:
    """Prompts of pictures that are not in the data."""
    rows: list[str] = json.loads((HERE / "compositions.json").read_text())
    return rows


@cache
def forbidden() -> frozenset[str]:
    """The held-out prompts, as :func:`words` has them."""
    return frozenset(words(prompt) for _, prompt in held_out())


def words(text: str) -> str:
    """Lower case, one space between words, no punctuation and no articles: what makes two prompts the same.

    >>> words("The waving hand: dark skin tone")
    'waving hand dark skin tone'
    """
    return " ".join(word for word in re.findall(r"[\w&+#*'’.-]+", text.lower()) if word not in ("a", "an", "the"))


def draw(emoji: Emoji, rng: random.Random, *, empty_share: float = EMPTY_SHARE) -> str:
    """A training caption of ``emoji``; empty for one in ten or ``empty_share``. Never a held-out prompt."""
    if rng.random() < empty_share:
        return ""
    caption = _draw(emoji, rng)
    while words(caption) in forbidden():
        caption = _draw(emoji, rng)
    return caption


def fixed(emoji: Emoji) -> Iterator[str]:
    """The captions that need no chance: label and names, bare and in every template, and the tags in order."""
    for name in (emoji.label, *emoji.names, *emoji.tags):
        yield name
        yield from (template.format(name) for template in TEMPLATES)
    yield " ".join(emoji.tags)


def texts(all_emoji: Iterable[Emoji]) -> Iterator[str]:
    """What the tokenizer learns from: names, tags, synonyms and templates, none of the held-out prompts."""
    for emoji in all_emoji:
        yield from (emoji.label, *emoji.names, *emoji.tags)
    for word, others in synonyms().items():
        yield from (word, *others)
    yield from (template.format("") for template in TEMPLATES)
    yield "skin tone, light, medium-light, medium, medium-dark, dark, yellow, coloured, colour"


def _draw(emoji: Emoji, rng: random.Random) -> str:
    plain, *_ = emoji.label.split(":") if emoji.tone else (emoji.label,)
    kind = rng.random()
    if kind < 0.35:
        caption = emoji.label
    elif kind < 0.5 and emoji.names:
        caption = rng.choice(emoji.names)
    elif kind < 0.62 and len(emoji.tags) >= 3:
        caption = rng.choice(JOINS).join(_sample(emoji.tags, rng, 3, 6))
    else:
        parts = [plain, *_sample(emoji.tags, rng, 1, 3)]
        if rng.random() < 0.4:
            rng.shuffle(parts)
        caption = parts[0]
        for part in parts[1:]:
            caption += rng.choice(JOINS) + part
    if emoji.tone and emoji.tone not in caption:
        caption = rng.choice(("{0}: {1}", "{1} {0}", "{0} with {1}", "{0}, {1}")).format(caption, emoji.tone)
    caption = _reword(caption, rng, keep=emoji.tone)
    if emoji.group == FACES and emoji.subgroup < YELLOW_FACES and rng.random() < 0.1:
        caption = f"yellow {caption}"
    if emoji.group == FLAGS and "flag" not in caption:
        caption = f"flag of {caption}"  # a country's tags alone could mean anything
    return rng.choice(TEMPLATES).format(caption) if rng.random() < 0.5 else caption


def _reword(caption: str, rng: random.Random, keep: str) -> str:
    """Synonyms, dropped words and plurals; the words of ``keep`` stay."""
    kept, found, table = set(keep.split()), caption.split(), synonyms()
    drop = rng.random() < 0.2
    result: list[str] = []
    for word in found:
        if word not in kept:
            if word in table and rng.random() < 0.3:
                result.append(rng.choice(table[word]))
                continue
            if drop and len(found) > 2 and rng.random() < 0.2:
                continue
            if word.isalpha() and len(word) > 3 and rng.random() < 0.03:
                result.append(word[:-1] if word.endswith("s") else word + "s")
                continue
        result.append(word)
    return " ".join(result) or caption


def _sample(tags: tuple[str, ...], rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(tags, min(len(tags), rng.randint(least, most)))
