"""A diffusers ``config.json`` as one of our architectures, or the reason why it is none.

Each reader takes the options that our ``Params`` have and demands of all others the one value our backbone stands
for. An option nobody here knows is a reason, too: a configuration is believed in full or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lehr.runtime.errors import InvalidInput

T = TypeVar("T")

NAME = "config.json"
_MAX_BYTES = 2**20
_ANY = object()  # an option that changes nothing at inference

_OLD_CLASS = "Transformer2DModel"  # what DiT and PixArt were before each had a class of its own
_SPLIT = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}  # by norm_type
_UNUSED_THERE = ("double_self_attention", "num_vector_embeds", "only_cross_attention", "use_linear_projection")


class NotOurs(InvalidInput):
    """The configuration is of an architecture that our backbones do not have; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a configuration says. ``size`` is the usual height and width of the sample; None where it says nothing."""

    family: str
    params: Any
    size: int | None


@dataclass(slots=True)
class Options:
    """The options of one configuration; ``finish`` refuses those that nobody read and that are not neutral."""

    config: Mapping[str, Any]
    _read: set[str] = field(default_factory=set)

    def take(self, name: str, default: T) -> T:
        """The option's value, of the type of ``default``; diffusers' default where it is not given."""
        self._read.add(name)
        value = self.config.get(name, default)
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            raise NotOurs(f"{name} is {value!r}")
        return value

    def maybe(self, name: str, default: int | None) -> int | None:
        """An option that is a positive integer or nothing."""
        self._read.add(name)
        value = self.config.get(name, default)
        if value is not None and (type(value) is not int or value < 1):
            raise NotOurs(f"{name} is {value!r}")
        return value

    def raw(self, name: str, default: Any) -> Any:
        """An option of several possible types."""
        self._read.add(name)
        return self.config.get(name, default)

    def finish(self, neutral: Mapping[str, Any]) -> None:
        """Hold what is left against the values our backbone stands for.

        Raises:
            NotOurs: another value, or an option that is not known.
        """
        for name, value in self.config.items():
            if name.startswith("_") or name in self._read:
                continue
            if name not in neutral:
                raise NotOurs(f"{name} is {value!r}, an option that is not known here")
            allowed = neutral[name]
            if allowed is not _ANY and value not in (allowed if isinstance(allowed, list) else [allowed]):
                raise NotOurs(f"{name} is {value!r}")


def anything() -> object:
    """The mark of an option that changes nothing at inference."""
    return _ANY


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json`` with the name of its class.

    Raises:
        InvalidInput: there is none, or it is not what diffusers writes.
    """
    config = read_json(folder / NAME)
    if not isinstance(config.get("_class_name"), str):
        raise InvalidInput(f"{folder / NAME} names no class. Expected '_class_name', as save_pretrained writes it.")
    return _renamed(config)


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """Published DiT and PixArt folders under the class that diffusers reads them with today."""
    kind = _SPLIT.get(str(config.get("norm_type"))) if config["_class_name"] == _OLD_CLASS else None
    if kind is None:
        return config
    off = {name for name in _UNUSED_THERE if not config.get(name)}
    if config.get("cross_attention_dim") is None:
        off.add("cross_attention_dim")
    return {name: value for name, value in config.items() if name not in off} | {"_class_name": kind}


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a file; raises InvalidInput for anything else."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidInput(f"{path} has {path.stat().st_size} bytes, a configuration at most {_MAX_BYTES}.")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidInput(f"{path} is no readable configuration ({e}). Expected JSON.") from e
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} holds a JSON {type(data).__name__}, expected an object.")
    return data


def sample_size(options: Options) -> int | None:
    """``sample_size``, of a square."""
    value = options.raw("sample_size", None)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if value is not None and (type(value) is not int or value < 1):
        raise NotOurs(f"sample_size is {value!r}")
    return value


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The backbone that computes what diffusers' module of this configuration does.

    Raises:
        NotOurs: there is none.
    """
    from lehr.export.checkpoints import config_transformers, config_unets

    readers: dict[str, Callable[[Options], Architecture]] = {**config_unets.READERS, **config_transformers.READERS}
    name = config["_class_name"]
    if name not in readers:
        raise NotOurs(f"{name} is none of {', '.join(sorted(readers))}")
    try:
        return readers[name](Options(config))
    except (ArithmeticError, IndexError, TypeError, ValueError) as e:  # Params refuse what they cannot be
        raise NotOurs(str(e)) from e
