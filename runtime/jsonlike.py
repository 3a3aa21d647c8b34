"""JSON for files that must be equal byte by byte when their content is, and that may come from a stranger.

Written: sorted keys, one space of indent, a final newline, no NaN or infinity (they are not JSON). Read: bounded
by the caller, the same values refused, and nesting limited so that no input can exhaust the stack.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from lehr.runtime.errors import InvalidInput

MAX_DEPTH = 64


def encode_json(value: Any, what: str) -> bytes:
    """Write ``value`` deterministically.

    Raises:
        InvalidInput: something in ``value`` is no JSON; the message says where. ``what`` names the whole.
    """
    _check(value, what, 0)
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def decode_json(data: bytes) -> Any:
    """Read JSON text; raises ValueError, with a sentence, for anything that :func:`encode_json` cannot write."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        _check(value, "the JSON", 0)
    except RecursionError as e:
        raise ValueError(f"the JSON is nested deeper than {MAX_DEPTH} levels") from e
    except InvalidInput as e:
        raise ValueError(str(e)) from e
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"the JSON holds {text}, which is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the JSON holds the number {text[:40]}, which is too large")
    return value


def _check(value: Any, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidInput(f"{where[:200]}… is nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, (bool, str)):
        return
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidInput(f"{where} does not fit in 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidInput(f"{where} is {value}; JSON has no such number, so leave it out or use null")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"{where} has the key {key!r}; keys must be strings")
            _check(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", depth + 1)
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise InvalidInput(f"{where} is a {kind}; JSON takes None, bool, int, float, str, list and dict")
