"""A pipeline whose denoiser stands in a single file, with its other parts in the same file or beside it.

Stable Diffusion 1 and 2, SDXL and some files of SD3 hold everything but the tokenizer's vocabulary; FLUX, most files of
SD3, PixArt and DiT hold the denoiser, and the other parts are named on the command line. Nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lehr.engines.graph.weights import WeightSource
from lehr.export.autoencoders.folder import Autoencoder, open_autoencoder, read_file
from lehr.export.autoencoders.maps import PREFIXES as VAE_PREFIXES
from lehr.export.checkpoints.files import Pickles, open_file
from lehr.export.encoders.maps import PREFIXES, Known
from lehr.export.encoders.tokenizers import NAME as TOKENIZER
from lehr.export.encoders.tokenizers import SOURCES
from lehr.export.pipelines.families import Kind, TextPart, known_encoders, of_denoiser, refine
from lehr.export.pipelines.folder import read_text
from lehr.export.pipelines.parts import Parts, assign
from lehr.export.pipelines.source import Found, PipelineSource, Text, assemble, latent_size
from lehr.export.source import Source
from lehr.runtime.errors import InvalidInput
from lehr.runtime.spec import ModelSpec

_CLIP = {Known.CLIP_L, Known.CLIP_L_PROJECTED, Known.OPENCLIP_H, Known.OPENCLIP_G}
_PADDED_WITH_0 = {Known.OPENCLIP_H, Known.OPENCLIP_G}  # "!" of the same vocabulary, where OpenAI's ends the text
_MERGES = "merges.txt"


def is_whole(source: WeightSource) -> bool:
    """Whether a file holds a text encoder and an autoencoder beside its denoiser."""
    prefixes = {prefix for known in Known for prefix in PREFIXES[known] if prefix}
    names = tuple(source.names())
    text = any(name.startswith(tuple(prefixes)) and _deep(name) for name in names)
    return text and any(f"{prefix}decoder.conv_in.weight" in names for prefix in VAE_PREFIXES)


def _deep(name: str) -> bool:
    """Whether a tensor is of a block: some files carry the ids of positions, and nothing else, of an encoder."""
    return any(part.isdecimal() for part in name.split(".")[2:])


def read(path: Path, denoiser: Source, parts: Parts, *, structure_only: bool, pickles: Pickles) -> PipelineSource:
    """Read what stands beside the denoiser in ``path``, and the other files named.

    Args:
        path: the file.
        denoiser: read from it already.
        parts: files with what it does not hold.
        structure_only: no weights are kept.
        pickles: whether pickled weights are read.

    Raises:
        InvalidInput: the denoiser is of no known pipeline, or a part is missing, damaged, or of another pipeline.
        MissingExtra: a tokenizer must be converted, and transformers is not installed.
    """
    spec = denoiser.spec
    kind = of_denoiser(spec)
    if kind is None:
        raise InvalidInput(
            f"{path.name} is {spec.name} ({spec.family}), which no known pipeline draws with. Export the denoiser "
            "alone with --denoiser-only."
        )
    kind = refine(kind, spec)
    source = open_file(path, pickles)
    known = known_encoders(kind, spec)
    wanted = [part for part in kind.text if part.stage in known]
    inside = [part.stage for part in wanted if _holds(source, known[part.stage])]
    stages = [part.stage for part in wanted]
    named = assign(parts.text_encoders, sorted(stages, key=lambda stage: stage in inside), "--text-encoder")
    tokenizers = _tokenizers(parts.tokenizers, wanted, known)
    text: dict[str, Text] = {}
    for part in wanted:
        if part.stage not in named and part.stage not in inside:
            if not part.required and part.stage not in tokenizers:
                continue
            raise InvalidInput(
                f"{path.name} holds no {part.stage} ({known[part.stage].value}). Name the file or folder that does: "
                f"--text-encoder {part.stage}=PATH; or export the denoiser alone with --denoiser-only."
            )
        if part.stage not in tokenizers:
            raise InvalidInput(_no_tokenizer(path, part.stage, known[part.stage]))
        encoder = named.get(part.stage, path)
        read_one = read_text(part, encoder, tokenizers[part.stage], known=known[part.stage], pickles=pickles)
        text[part.stage] = _padded(read_one, known[part.stage])
    found = Found(
        denoiser=denoiser,
        kind=kind,
        class_name=kind.class_name,
        text=text,
        autoencoder=_autoencoder(path, source, kind, spec, parts.vae, pickles),
        options=_options(kind, spec),
    )
    return assemble(found, structure_only=structure_only)


def _holds(source: WeightSource, known: Known) -> bool:
    prefixes = tuple(prefix for prefix in PREFIXES[known] if prefix)
    return any(name.startswith(prefixes) and _deep(name) for name in source.names())


def _tokenizers(given: Sequence[str], parts: Sequence[TextPart], known: Mapping[str, Known]) -> dict[str, Path]:
    """The tokenizer's folder of each stage: its own, a pipeline's, or one that several encoders share.

    All CLIP encoders have one vocabulary, so a path without a name serves all of them; the next one is T5's.
    """
    stages = [part.stage for part in parts]
    groups = [[stage for stage in stages if (known[stage] in _CLIP) is clip] for clip in (True, False)]
    leaders = [group[0] for group in groups if group]
    named = [entry for entry in given if "=" in entry.split("/")[0]]
    found = dict(assign(named, stages, "--tokenizer"))
    unnamed = assign([entry for entry in given if entry not in named], leaders, "--tokenizer")
    pipelines = [path for path in unnamed.values() if any((path / part.tokenizer).is_dir() for part in parts)]
    for group in groups:
        for stage in group:
            own = next(part.tokenizer for part in parts if part.stage == stage)
            within = next((path / own for path in pipelines if (path / own).is_dir()), None)
            path = within or unnamed.get(group[0])
            if stage not in found and path is not None:
                found[stage] = path
    return {stage: _folder(path) for stage, path in found.items()}


def _folder(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.name in (TOKENIZER, _MERGES, *SOURCES):
        return path.parent
    raise InvalidInput(f"--tokenizer: {path} is no tokenizer. Expected its folder, or one of {TOKENIZER}, {SOURCES}.")


def _no_tokenizer(path: Path, stage: str, known: Known) -> str:
    files = "tokenizer.json, or vocab.json and merges.txt" if known in _CLIP else "tokenizer.json, or spiece.model"
    return (
        f"no tokenizer for {stage} ({known.value}): a single file such as {path.name} holds no vocabulary. Name the "
        f"folder with {files}: --tokenizer {stage}=PATH; or export the denoiser alone with --denoiser-only."
    )


def _padded(text: Text, known: Known) -> Text:
    return replace(text, spec=replace(text.spec, pad_id=0)) if known in _PADDED_WITH_0 else text


def _autoencoder(
    path: Path, source: WeightSource, kind: Kind, spec: ModelSpec, vae: Path | None, pickles: Pickles
) -> Autoencoder:
    size = latent_size(spec)
    if vae is not None:
        return open_autoencoder(vae, kind.latent, size=size, pickles=pickles)
    if not any(name.startswith(VAE_PREFIXES) for name in source.names()):
        raise InvalidInput(
            f"{path.name} holds no autoencoder. Name the file or folder that does: --vae PATH; or export the denoiser "
            "alone with --denoiser-only."
        )
    return read_file(source, kind.latent, size=size)


def _options(kind: Kind, spec: ModelSpec) -> dict[str, bool | int | float | str]:
    """What ``model_index.json`` of the published pipeline says."""
    if kind.family != "stable_diffusion_xl":
        return {}
    ids = next((tensor.shape[-1] for tensor in spec.conditions if tensor.name == "time_ids"), 6)
    return {"requires_aesthetics_score": ids == 5, "force_zeros_for_empty_prompt": ids != 5}
