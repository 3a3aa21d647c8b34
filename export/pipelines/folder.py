"""A diffusers pipeline that ``save_pretrained`` wrote: a folder with ``model_index.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lehr.export.autoencoders.folder import Autoencoder, open_autoencoder, read_folder
from lehr.export.checkpoints.config import read_json
from lehr.export.checkpoints.conventions import COMPONENTS, INDEX
from lehr.export.checkpoints.files import Pickles, open_file
from lehr.export.encoders.folder import known_encoder_source, text_encoder_source
from lehr.export.encoders.maps import Known
from lehr.export.encoders.tokenizers import tokenizer_json, tokenizer_spec
from lehr.export.pipelines.families import CLASSES, Kind, TextPart, known_encoders, refine
from lehr.export.pipelines.parts import Parts, assign
from lehr.export.pipelines.source import Found, PipelineSource, Text, assemble, latent_size
from lehr.export.source import Source
from lehr.runtime.errors import InvalidInput
from lehr.runtime.pipelines.flow_schedule import flow_options

_BESIDE = {*COMPONENTS, "scheduler", "feature_extractor", "safety_checker", "image_processor", "watermark"}
_FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")  # plain values of the index


def components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the components that ``model_index.json`` says are there."""
    return tuple(
        name
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    )


def is_whole(folder: Path) -> bool:
    """Whether a pipeline's folder says that it has more than a denoiser and its scheduler."""
    return any(name not in _BESIDE for name in components(read_json(folder / INDEX)))


def read(folder: Path, denoiser: Source, parts: Parts, *, structure_only: bool, pickles: Pickles) -> PipelineSource:
    """Read every part of a pipeline's folder but the denoiser.

    Args:
        folder: with ``model_index.json``.
        denoiser: read already.
        parts: files that stand in for components of the folder.
        structure_only: no weights are kept.
        pickles: whether pickled weights are read.

    Raises:
        InvalidInput: a class that is not known here, a component that is missing, damaged, or of another pipeline.
        MissingExtra: a tokenizer must be converted, and transformers is not installed.
    """
    index = read_json(folder / INDEX)
    kind = refine(kind_of(folder, index), denoiser.spec)
    there = components(index)
    stages = [part.stage for part in kind.text]
    encoders = assign(parts.text_encoders, stages, "--text-encoder")
    tokenizers = assign(parts.tokenizers, stages, "--tokenizer")
    text = {}
    for part in kind.text:
        if part.stage not in encoders and part.stage not in there and not part.required:
            continue
        encoder = encoders.get(part.stage) or _component(folder, part.stage)
        tokenizer = tokenizers.get(part.stage) or _component(folder, part.tokenizer)
        known = known_encoders(kind, denoiser.spec).get(part.stage)
        text[part.stage] = read_text(part, encoder, tokenizer, known=known, pickles=pickles)
    if kind.text and not text:
        raise InvalidInput(f"{folder} names no text encoder. Expected {' or '.join(stages)}; download it again.")
    used = {"vae", *COMPONENTS, "scheduler", *text, *(part.tokenizer for part in kind.text)}
    found = Found(
        denoiser=denoiser,
        kind=kind,
        class_name=str(index["_class_name"]),
        text=text,
        autoencoder=_autoencoder(folder, denoiser, kind, parts, pickles),
        options=_options(folder, index, kind),
        left_out=[name for name in there if name not in used],
    )
    return assemble(found, structure_only=structure_only)


def kind_of(folder: Path, index: Mapping[str, Any]) -> Kind:
    """The family of a pipeline; raises InvalidInput for a class that cannot be exported whole."""
    name = str(index.get("_class_name"))
    if name not in CLASSES:
        raise InvalidInput(
            f"{folder} is a {name}, whose parts beside the denoiser are not known here; known: "
            f"{', '.join(sorted(CLASSES))}. Export its denoiser alone with --denoiser-only."
        )
    return CLASSES[name]


def read_text(part: TextPart, encoder: Path, tokenizer: Path, *, known: Known | None, pickles: Pickles) -> Text:
    """One text encoder, of a folder or out of a file with a known one, and its tokenizer.

    Args:
        part: what the pipeline takes from it.
        encoder: a folder, or a file of the authors'.
        tokenizer: the tokenizer's folder.
        known: which encoder a file holds.
        pickles: whether pickled weights are read.

    Raises:
        InvalidInput: either is missing, damaged or of another kind.
        MissingExtra: the tokenizer must be converted, and transformers is not installed.
    """
    spec = tokenizer_spec(tokenizer, part.stage, max_length=part.max_length)
    length = spec.max_length
    if encoder.is_dir():
        source = text_encoder_source(encoder, part.stage, output=part.output, max_length=length, pickles=pickles)
    elif known is not None:
        file = open_file(encoder, pickles)
        source = known_encoder_source(file, known, part.stage, output=part.output, max_length=length)
    else:
        raise InvalidInput(f"{encoder} does not say what {part.stage} is. Name a folder with its config.json.")
    return Text(encoder=source, tokenizer=tokenizer_json(tokenizer), spec=spec)


def _component(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise InvalidInput(
            f"{folder} lacks {name}/, which its pipeline needs. Download the whole pipeline again, or export the "
            "denoiser alone with --denoiser-only."
        )
    return folder / name


def _autoencoder(folder: Path, denoiser: Source, kind: Kind, parts: Parts, pickles: Pickles) -> Autoencoder:
    size = latent_size(denoiser.spec)
    if parts.vae is None:
        return read_folder(_component(folder, "vae"), size=size, pickles=pickles)
    own = read_folder(folder / "vae", size=size, pickles=pickles).latent if (folder / "vae").is_dir() else kind.latent
    return open_autoencoder(parts.vae, own, size=size, pickles=pickles)


def _options(folder: Path, index: Mapping[str, Any], kind: Kind) -> dict[str, bool | int | float | str]:
    options = {name: index[name] for name in _FLAGS if isinstance(index.get(name), bool)}
    if isinstance(index.get("id2label"), Mapping):
        options["id2label"] = json.dumps(index["id2label"], ensure_ascii=False)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        try:
            options |= flow_options(read_json(scheduler), family=kind.family)
        except (TypeError, ValueError) as e:
            raise InvalidInput(f"{scheduler} is not what diffusers writes: {e}. Download it again.") from e
    return options
