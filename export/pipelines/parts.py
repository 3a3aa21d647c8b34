"""What a user names beside the source: other files with parts of the pipeline, for single files and replacements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lehr.runtime.errors import InvalidInput, UnknownName


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Paths as given on the command line.

    Attributes:
        text_encoders: "PATH" or "STAGE=PATH"; without a name they go to the pipeline's encoders in order.
        tokenizers: the same of tokenizers, by the name of their encoder's stage.
        vae: a folder or file with the autoencoder.
    """

    text_encoders: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    vae: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.text_encoders or self.tokenizers or self.vae is not None)


def assign(given: Sequence[str], stages: Sequence[str], option: str) -> Mapping[str, Path]:
    """The path of each stage that was named, or whose turn it is.

    Args:
        given: see :class:`Parts`.
        stages: that take one, in order; those that need one most come first.
        option: the command line's name of it, for errors.

    Raises:
        InvalidInput: a stage that the pipeline does not have, one named twice, more paths than stages, or a path
            that does not exist.
    """
    found: dict[str, Path] = {}
    unnamed: list[Path] = []
    for entry in given:
        name, named, path = entry.partition("=")
        if not named or "/" in name:
            unnamed.append(_existing(Path(entry), option))
            continue
        if name not in stages:
            raise InvalidInput(f"{option}: {UnknownName('stage', name, stages)}")
        if name in found:
            raise InvalidInput(f"{option} names {name} twice; give it once.")
        found[name] = _existing(Path(path), option)
    free = [stage for stage in stages if stage not in found]
    if len(unnamed) > len(free):
        raise InvalidInput(
            f"{option} is given {len(given)} times, and the pipeline has {len(stages)}: {', '.join(stages) or 'none'}."
        )
    return found | dict(zip(free, unnamed, strict=False))


def _existing(path: Path, option: str) -> Path:
    if not path.exists():
        raise InvalidInput(f"{option}: {path} does not exist. Check the path.")
    return path
