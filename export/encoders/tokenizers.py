"""A folder's tokenizer as one ``tokenizer.json``, the file that the ``tokenizers`` library reads on a device.

Folders that hold it keep it as it is; what older releases hold instead (``vocab.json`` and ``merges.txt``,
``spiece.model``, ``vocab.txt``) transformers converts with its own code. Padding and truncation are taken out of the
file: a :class:`lehr.runtime.pipeline_spec.TokenizerSpec` says them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lehr.export.checkpoints.config import read_json
from lehr.runtime.errors import InvalidInput, MissingExtra
from lehr.runtime.pipeline_spec import TokenizerSpec
from lehr.runtime.stage import STAGES

NAME, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
SOURCES = ("vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt")
MAX_BYTES = 2**26  # what the runtime reads at most; the largest in use have 40 MB
_UNBOUNDED = 10**6  # transformers writes 1e30 for "no limit"

_PADDING = {  # of tokenizer classes whose configuration does not say it
    "CLIPTokenizer": "<|endoftext|>",
    "T5Tokenizer": "<pad>",
    "BertTokenizer": "[PAD]",
    "Qwen2Tokenizer": "<|endoftext|>",
}


def tokenizer_json(folder: Path) -> bytes:
    """The tokenizer of ``folder``, special tokens included, without padding and truncation.

    Args:
        folder: what transformers' tokenizers write with ``save_pretrained``, of any version.

    Raises:
        InvalidInput: there is no tokenizer, a damaged one, or one that transformers cannot convert.
        MissingExtra: it must be converted, and transformers or sentencepiece is not installed.
    """
    file = folder / NAME
    if file.is_file():
        raw = _bounded(file)
    elif any((folder / name).is_file() for name in SOURCES):
        raw = _converted(folder)
    else:
        raise InvalidInput(f"{folder} holds no tokenizer. Expected {NAME}, or one of {', '.join(SOURCES)}.")
    data = _parsed(raw, file)
    if data.get("padding") is None and data.get("truncation") is None:
        return raw
    return json.dumps(data | {"padding": None, "truncation": None}, ensure_ascii=False).encode()


def tokenizer_spec(
    folder: Path, stage: str, *, max_length: int | None = None, pad_to_max: bool = True
) -> TokenizerSpec:
    """How prompts for the text encoder ``stage`` become ids.

    Args:
        folder: the tokenizer's.
        stage: name of the encoder's stage, in whose folder the file is going to stand.
        max_length: tokens, special ones included; None for what the tokenizer itself says.
        pad_to_max: see :class:`TokenizerSpec`.

    Raises:
        InvalidInput: no tokenizer; one without a token to pad with or without a longest prompt; one that pads on the
            left.
        MissingExtra: as :func:`tokenizer_json`.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("padding_side", "right") != "right":
        raise InvalidInput(f"{folder / CONFIG} pads on the {config['padding_side']}. Expected padding on the right.")
    limit = config.get("model_max_length")
    if max_length is None:
        if not isinstance(limit, (int, float)) or not 1 <= limit <= _UNBOUNDED:
            raise InvalidInput(
                f"{folder / CONFIG} names no longest prompt (model_max_length {limit!r}). Give max_length."
            )
        max_length = int(limit)
    token = _pad_token(folder, config)
    data = _parsed(tokenizer_json(folder), folder / NAME)
    found = dict(_ids(data))
    if token not in found:
        raise InvalidInput(f"{folder} pads with {token!r}, which is no token of its tokenizer. Download it again.")
    return TokenizerSpec(
        file=f"{STAGES}/{stage}/{NAME}", max_length=max_length, pad_id=found[token], pad_to_max=pad_to_max
    )


# --------------------------------------------------------------------------------------------------- reading


def _bounded(file: Path) -> bytes:
    if file.stat().st_size > MAX_BYTES:
        raise InvalidInput(f"{file} has {file.stat().st_size} bytes, a tokenizer at most {MAX_BYTES}.")
    return file.read_bytes()


def _parsed(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"{file} is no readable tokenizer ({e}). Download it again.") from e
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise InvalidInput(f"{file} describes no model. Expected what the tokenizers library writes.")
    return data


def _ids(data: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """Every token with its id: those of the model, then those added to it."""
    vocab = data["model"].get("vocab", {})
    if isinstance(vocab, dict):  # BPE, WordPiece
        yield from vocab.items()
    else:  # Unigram: pieces with their scores, in the order of their ids
        yield from ((piece, number) for number, (piece, _) in enumerate(vocab))
    for token in data.get("added_tokens") or ():
        yield token["content"], token["id"]


def _pad_token(folder: Path, config: Mapping[str, Any]) -> str:
    special = read_json(folder / SPECIAL) if (folder / SPECIAL).is_file() else {}
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    for said in (config.get("pad_token"), special.get("pad_token"), _PADDING.get(kind)):
        token = said.get("content") if isinstance(said, Mapping) else said  # an AddedToken in full, or its text
        if isinstance(token, str):
            return token
    raise InvalidInput(f"{folder} names no token to pad with. Expected pad_token in {CONFIG} or {SPECIAL}.")


# ------------------------------------------------------------------------------------------------ converting


def _converted(folder: Path) -> bytes:
    for library in ("transformers", "sentencepiece"):
        needed = library == "transformers" or any(folder.glob("*.model"))
        if needed and not _installed(library):
            raise MissingExtra(library, "diffusers")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text: str = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InvalidInput(f"{folder}: transformers cannot convert the tokenizer: {reason} Download it again.") from e
    return text.encode()


def _installed(library: str) -> bool:
    from importlib.util import find_spec

    return library in sys.modules or find_spec(library) is not None
