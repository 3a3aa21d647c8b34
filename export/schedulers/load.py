"""A diffusers scheduler from a folder or a ``scheduler_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import diffusers.schedulers

from lehr.export.schedulers.refusals import quiet
from lehr.runtime.errors import InvalidInput, MissingExtra, UnknownName

_NAME = "scheduler_config.json"
_MAX_BYTES = 16 * 2**20  # a configuration with trained betas for 1e6 timesteps


def load_scheduler(source: str | Path) -> Any:
    """The scheduler of a diffusers pipeline folder, a scheduler folder, or a configuration file.

    Raises:
        InvalidInput: there is no such file, or it is not the configuration of a scheduler.
        MissingExtra: the scheduler needs a package that is not installed.
        UnknownName: diffusers has no scheduler of that class.
    """
    path = _find(Path(source))
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidInput(f"{path} has {path.stat().st_size} bytes, which is no scheduler configuration.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"{path} is no JSON: {e}") from e
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise InvalidInput(f"{path} does not name a scheduler; expected an object with a '_class_name'.")
    known = [known for known in dir(diffusers.schedulers) if known.endswith("Scheduler")]
    if name not in known:
        raise UnknownName("scheduler", name, known)
    kind = getattr(diffusers.schedulers, name)
    try:
        with quiet():
            return kind.from_config(config)
    except ImportError as e:
        raise MissingExtra("torchsde" if "torchsde" in str(e) else "scipy", "diffusers") from e
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as e:
        raise InvalidInput(f"{path} is not a configuration that {name} takes: {e}") from e


def _find(source: Path) -> Path:
    candidates = [source] if source.is_file() else [source / _NAME, source / "scheduler" / _NAME]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InvalidInput(
        f"found no scheduler in {source}: expected {' or '.join(str(c) for c in candidates)}. "
        "Give a diffusers folder or a scheduler_config.json."
    )
