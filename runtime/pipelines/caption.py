"""Captions as PixArt was trained on: without links, markup, file names and article numbers.

The rules are those of DeepFloyd's IF (StabilityAI 2023), which diffusers' PixArt pipelines apply twice by default when
``bs4`` and ``ftfy`` are installed. Here the standard library does both parts. What ftfy does beyond
:func:`_tidied`, above all the repair of text decoded in the wrong encoding, is left out.
"""

from __future__ import annotations

import html
import re
import unicodedata
import urllib.parse
from html.entities import html5
from html.parser import HTMLParser

Rules = tuple[tuple[re.Pattern[str], str], ...]

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_LINKS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)
_WORDS = _rules(
    (r"@[\w\d]+\b", ""),  # names of users
    *((f"[{block}]+", "") for block in ("\u31c0-\u31ef", "\u31f0-\u31ff", "\u3200-\u32ff", "\u3300-\u33ff")),
    *((f"[{block}]+", "") for block in ("\u3400-\u4dbf", "\u4dc0-\u4dff", "\u4e00-\u9fff")),
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_NUMBERS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # sizes, with a Latin or a Cyrillic x
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINTS = re.compile("[-_]")
_MAX_JOINTS = 3  # "this-is-my-cute-cat" is taken apart, "black-and-white" is not


def clean(caption: str) -> str:
    """The caption as the text encoder is to see it.

    >>> clean("  A Photo of a CAT, see https://example.com/cat.png ")
    'a photo of a cat, see'
    """
    return _once(_once(caption))


def _once(caption: str) -> str:
    caption = _applied(_LINKS, urllib.parse.unquote_plus(caption).strip().lower())
    caption = _applied(_WORDS, _without_markup(caption))
    if len(_JOINTS.findall(caption)) > _MAX_JOINTS:
        caption = _JOINTS.sub(" ", caption)
    caption = html.unescape(html.unescape(_tidied(caption)))
    return _applied(_NUMBERS, caption).strip()


def _applied(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


class _Text(HTMLParser):
    """Gathers what stands between tags, but for scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.found: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style", "template")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "template") and self._hidden > 0

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.found.append(data)


def _without_markup(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.found)


# -------------------------------------------------------------------------------------------------- characters

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        **{
            ligature: unicodedata.normalize("NFKC", ligature)
            for ligature in "\ufb00\ufb01\ufb02\ufb03\ufb04\ufb05\ufb06"
        },
        **{chr(wide): unicodedata.normalize("NFKC", chr(wide)) for wide in (*range(0xFF01, 0xFFF0), 0x3000)},
        **dict.fromkeys("\u2028\u2029\u0085\r", "\n"),
    }
)
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


def _tidied(text: str) -> str:
    """Straight quotes, no ligatures, characters of ordinary width, plain line breaks, no controls, composed."""
    return unicodedata.normalize("NFC", _CONTROLS.sub("", text.replace("\r\n", "\n").translate(_CHARACTERS)))
