"""SOURCE of ``lehr export`` as a whole pipeline, where it is one."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from lehr.engines.graph.tensor_file import INDEX_SUFFIX
from lehr.export.checkpoints.conventions import INDEX
from lehr.export.checkpoints.files import PICKLES, Pickles, open_file
from lehr.export.pipelines import folder as folders
from lehr.export.pipelines import single_file
from lehr.export.pipelines.parts import Parts
from lehr.export.pipelines.source import PipelineSource
from lehr.export.reference.emoji import pipeline as emoji
from lehr.export.source import Route, Source
from lehr.runtime.errors import InvalidInput


class Extent(Enum):
    """How much of a source is exported."""

    WHOLE = "whole"  # all that it holds
    DENOISER = "denoiser"


def read_pipeline(
    source: str,
    denoiser: Source,
    *,
    parts: Parts | None = None,
    structure_only: bool = False,
    pickles: Pickles = Pickles.REFUSED,
) -> PipelineSource | None:
    """The pipeline around a denoiser; None where the source holds the denoiser alone.

    A folder is a pipeline where its ``model_index.json`` names more components than a denoiser and its scheduler, a
    single file where it holds a text encoder and an autoencoder, and any file where ``parts`` names the rest. The
    preset ``emoji`` is shipped as one.

    Args:
        source: as :func:`lehr.export.source.resolve` takes it.
        denoiser: what that function made of it.
        parts: files with what the source does not hold, or that replace what it holds.
        structure_only: no weights are kept.
        pickles: whether pickled weights are read.

    Raises:
        InvalidInput: a class of pipelines that is not known, a part that is missing, damaged or of another pipeline,
            or parts beside a source that is neither a file nor a pipeline's folder.
        MissingExtra: a tokenizer must be converted, and transformers is not installed.
    """
    parts, path = parts or Parts(), Path(source)
    if not parts and denoiser.route is Route.PRESET and source == emoji.NAME:
        return emoji.read(denoiser, structure_only=structure_only)
    if (path / INDEX).is_file():
        if not parts and not folders.is_whole(path):
            return None
        return folders.read(path, denoiser, parts, structure_only=structure_only, pickles=pickles)
    if path.is_file() and path.name.endswith((".safetensors", INDEX_SUFFIX, *PICKLES)):
        if not parts and not single_file.is_whole(open_file(path, pickles)):
            return None
        return single_file.read(path, denoiser, parts, structure_only=structure_only, pickles=pickles)
    if parts:
        raise InvalidInput(
            f"--text-encoder, --tokenizer and --vae complete a file or a pipeline's folder with {INDEX}; {source} is "
            "neither. Leave them out."
        )
    return None
