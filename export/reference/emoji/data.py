"""Twitter's emoji (Twemoji, CC-BY 4.0) with the names and tags of emojibase (MIT), checked by hash.

``npm pack emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0`` writes the two archives that :func:`load` reads;
nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lehr.runtime.errors import InvalidInput

PICTURES = "emoji-datasource-twitter-16.0.0.tgz"
NAMES = "emojibase-data-17.0.0.tgz"
SHA256 = {
    PICTURES: "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    NAMES: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
SHORTCODES = ("emojibase", "joypixels", "github", "iamcal")  # sets of other names in the archive
FLAGS = 9  # emojibase's number of the group
ONE_TONE, TWO_TONES, FLAG = 0.2, 0.05, 0.5  # sampling weights; a picture without a skin tone has 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Emoji:
    """What is written about one picture.

    Attributes:
        hexcode: code points in lower case, joined by hyphens, without U+FE0F.
        label: the name in Unicode's common locale data.
        names: other names.
        tags: search words.
        tone: the skin tone in words ("dark skin tone"), empty for none.
        group: emojibase's number of the group, -1 for none.
        subgroup: emojibase's number of the subgroup, -1 for none.
        weight: how often training shows it, relative to a picture without a skin tone.
    """

    hexcode: str
    label: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    tone: str
    group: int
    subgroup: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """``emoji[i]`` describes ``images[i]``; images (N, 64, 64, 3) uint8, on white."""

    emoji: tuple[Emoji, ...]
    images: npt.NDArray[np.uint8]

    def index(self) -> dict[str, int]:
        """Positions by hexcode."""
        return {one.hexcode: i for i, one in enumerate(self.emoji)}


def load(folder: Path) -> Dataset:
    """Read both archives, pictures sorted by hexcode.

    Raises:
        InvalidInput: an archive is missing, or is not the one named by its hash.
    """
    described = describe(folder)
    images: dict[str, npt.NDArray[np.uint8]] = {}
    with tarfile.open(fileobj=io.BytesIO(_checked(folder, PICTURES))) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".png" and path.parent.name == "64":
                content = tar.extractfile(member)
                if content is not None:
                    images[_hexcode(path.stem)] = on_white(Image.open(io.BytesIO(content.read())))
    if missing := sorted(set(images) - set(described)):
        raise InvalidInput(f"{NAMES} names no emoji {', '.join(missing[:5])}, of which {PICTURES} has pictures")
    order = sorted(images)
    return Dataset(emoji=tuple(described[key] for key in order), images=np.stack([images[key] for key in order]))


def describe(folder: Path) -> dict[str, Emoji]:
    """The words of every emoji, by hexcode."""
    with tarfile.open(fileobj=io.BytesIO(_checked(folder, NAMES))) as tar:

        def read(name: str) -> Any:
            content = tar.extractfile(f"package/en/{name}")
            if content is None:
                raise InvalidInput(f"{NAMES} holds no en/{name}")
            return json.loads(content.read())

        entries = read("data.json")
        shortcodes = [
            {_hexcode(key): [value] if isinstance(value, str) else value for key, value in read(path).items()}
            for path in (f"shortcodes/{name}.json" for name in SHORTCODES)
        ]
    found: dict[str, Emoji] = {}
    for entry in entries:
        for one in (entry, *entry.get("skins", ())):
            hexcode, tones = _hexcode(one["hexcode"]), one.get("tone")
            other = {" ".join(code.split("_")) for table in shortcodes for code in table.get(hexcode, ())}
            weight = FLAG if one.get("group") == FLAGS else 1.0
            if tones is not None:
                weight = TWO_TONES if isinstance(tones, list) else ONE_TONE
            found[hexcode] = Emoji(
                hexcode=hexcode,
                label=one["label"],
                # Codes of variants write tones as numbers, which nobody would type.
                names=() if tones is not None else tuple(sorted(other - {one["label"]})),
                tags=tuple(entry.get("tags", ())),
                tone=_tone(one["label"]) if tones is not None else "",
                group=one.get("group", -1),
                subgroup=one.get("subgroup", -1),
                weight=weight,
            )
    return found


def on_white(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """(64, 64, 3) uint8; transparency over white."""
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture.convert("RGBA"))
    return np.asarray(ground.convert("RGB"))


def _tone(label: str) -> str:
    return ", ".join(part.strip() for part in label.split(":", 1)[1].split(",") if "skin tone" in part)


def _hexcode(text: str) -> str:
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _checked(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise InvalidInput(
            f"{path} does not exist; get it with: npm pack emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise InvalidInput(f"{path} has SHA-256 {digest}, expected {SHA256[name]}")
    return content
