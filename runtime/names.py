"""Names of files inside a bundle: relative, slash-separated, the same on every system, unable to lead out of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MANIFEST_NAME = "manifest.json"
RESERVED_PREFIX = ".lehr-"  # temporaries, the lock and a commit in progress; never a listed file

MAX_NAME = 512  # characters
MAX_PART = 255  # bytes of one part; what ext4, APFS and NTFS take


def name_problem(name: object) -> str | None:
    """Say why ``name`` may not be a file in a bundle, or return None if it may.

    >>> name_problem("model/step.onnx") is None
    True
    >>> name_problem("../../etc/passwd")
    "a part is '..'"
    """
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}, not a string"
    if not 1 <= len(name) <= MAX_NAME:
        return f"it has {len(name)} characters, allowed are 1 to {MAX_NAME}"
    for character in name:
        if character in "\\:":
            return f"it holds {character!r}; parts are separated by '/' and there are no drives"
        code = ord(character)
        if code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000:  # a lone surrogate has no UTF-8
            return f"it holds the control character U+{code:04X}"
    if name == MANIFEST_NAME:
        return "that name is the manifest's own"
    for part in name.split("/"):
        if not part:
            return "a part is empty, or it starts or ends with '/'"
        if part in (".", ".."):
            return f"a part is {part!r}"
        if part.startswith(RESERVED_PREFIX):
            return f"a part starts with {RESERVED_PREFIX!r}, which is kept for temporaries"
        if len(part.encode()) > MAX_PART:
            return f"a part is longer than {MAX_PART} bytes"
    return None


def folders_of(name: str) -> Iterator[str]:
    """Every folder above ``name`` inside the bundle, outermost first.

    >>> list(folders_of("engines/cpu/plan"))
    ['engines', 'engines/cpu']
    """
    parts = name.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def nested_name(names: Iterable[str]) -> tuple[str, str] | None:
    """A pair (folder, name) where one name would have to be a file and a folder at once, or None."""
    known = set(names)
    for name in sorted(known):
        for folder in folders_of(name):
            if folder in known:
                return folder, name
    return None
