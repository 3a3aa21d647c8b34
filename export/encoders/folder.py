"""A text encoder's folder, or its part of a file with a whole pipeline, as a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lehr.engines.graph.tensor_file import INDEX_SUFFIX, SafetensorsFolder
from lehr.engines.graph.weights import WeightSource
from lehr.export.checkpoints.config import NAME as CONFIG
from lehr.export.checkpoints.config import NotOurs, read_json
from lehr.export.checkpoints.files import Pickles, open_component
from lehr.export.checkpoints.mapped import Layout, MappedSource, fit, mapped, shapes
from lehr.export.encoders import bert, clip_text, maps, qwen, t5
from lehr.export.encoders.maps import Known
from lehr.export.encoders.outputs import TextOutput
from lehr.export.stages import StageSource
from lehr.runtime.errors import InvalidInput
from lehr.runtime.stage import StageSpec

Array = npt.NDArray[Any]

GOLDEN_BATCH = 2
_COMPONENT = "model"  # transformers' name for the weights of one module


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One of the modules of this package."""

    from_config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, Sequence[str]], nn.Module]
    stage_spec: Callable[..., StageSpec]
    outputs_of: Callable[..., tuple[str, ...]]


FAMILIES: Mapping[str, Family] = {
    clip_text.FAMILY: Family(
        from_config=clip_text.from_config,
        build=clip_text.ClipText,
        stage_spec=clip_text.stage_spec,
        outputs_of=clip_text.outputs_of,
    ),
    t5.FAMILY: Family(
        from_config=t5.from_config, build=t5.T5Encoder, stage_spec=t5.stage_spec, outputs_of=t5.outputs_of
    ),
    bert.FAMILY: Family(
        from_config=bert.from_config, build=bert.Bert, stage_spec=bert.stage_spec, outputs_of=bert.outputs_of
    ),
    qwen.FAMILY: Family(
        from_config=qwen.from_config, build=qwen.Qwen, stage_spec=qwen.stage_spec, outputs_of=qwen.outputs_of
    ),
}

_MODEL_TYPES = {  # in a configuration -> the family
    "clip_text_model": clip_text.FAMILY,
    "t5": t5.FAMILY,
    "mt5": t5.FAMILY,
    "umt5": t5.FAMILY,
    "bert": bert.FAMILY,
    "qwen2": qwen.FAMILY,
    "qwen2_5_vl": qwen.FAMILY,
    "qwen3": qwen.FAMILY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """An encoder whose architecture is known, and where its weights are.

    Attributes:
        layouts: ways in which ``source`` may hold them.
        what: names the architecture in an error message.
        origin: which weights these are, for people.
    """

    family: str
    params: Any
    source: WeightSource
    layouts: Sequence[Layout]
    what: str
    origin: str

    def stage(self, name: str, outputs: Sequence[str], max_length: int | None = None) -> StageSource:
        """The stage ``name`` that returns ``outputs``; raises InvalidInput where the weights do not fit."""
        family, params = FAMILIES[self.family], self.params
        with torch.device("meta"):
            module = family.build(params, outputs).eval()
        wanted = shapes(module)
        layout = min(self.layouts, key=lambda layout: fit(self.source, wanted, layout).problems)
        weights: MappedSource = mapped(self.source, wanted, layout, what=self.what)
        spec = family.stage_spec(name, params, outputs=outputs, max_length=max_length)
        return StageSource(
            spec=spec,
            module=module,
            weights=weights,
            origin=self.origin,
            feeds=lambda seed: golden_feeds(spec, params, seed),
        )


def text_encoder_source(
    folder: Path,
    name: str,
    *,
    output: TextOutput,
    max_length: int | None = None,
    layers: Sequence[int] = (),
    pickles: Pickles = Pickles.REFUSED,
) -> StageSource:
    """The text encoder that transformers' ``save_pretrained`` wrote.

    Args:
        folder: the encoder's own, with a ``config.json``; or a pipeline's, whose component ``name`` it is.
        name: the stage's name, such as "text_encoder_2".
        output: what the pipeline takes from it.
        max_length: tokens that the pipeline pads a prompt to; None for the family's usual number.
        layers: the hidden layers of ``TextOutput.HIDDEN_STATES``.
        pickles: whether pickled weights are read.

    Raises:
        InvalidInput: no such folder, damaged files, an architecture or output that is not known here, or weights that
            are not the configuration's.
    """
    if layers and output is not TextOutput.HIDDEN_STATES:
        raise InvalidInput(f"{output.value} has no choice of layers, got {tuple(layers)}. Leave them out.")
    found = read_encoder(folder if (folder / CONFIG).is_file() else folder / name, pickles=pickles)
    return found.stage(name, FAMILIES[found.family].outputs_of(found.params, output, layers), max_length)


def known_encoder_source(
    source: WeightSource, known: Known, name: str, *, output: TextOutput, max_length: int | None = None
) -> StageSource:
    """A text encoder of known architecture in a file: alone, or with the rest of its pipeline.

    Raises:
        InvalidInput: the file does not hold it.
    """
    family = t5.FAMILY if known is Known.T5_XXL else clip_text.FAMILY
    params = maps.PARAMS[known]
    found = TextEncoder(
        family=family,
        params=params,
        source=next((part for prefix in maps.PREFIXES[known] if (part := maps.part_of(source, prefix))), source),
        layouts=maps.LAYOUTS[known],
        what=known.value,
        origin=f"{known.value} out of {source}",
    )
    return found.stage(name, FAMILIES[family].outputs_of(params, output), max_length)


def read_encoder(folder: Path, *, pickles: Pickles = Pickles.REFUSED) -> TextEncoder:
    """The text encoder in a folder of its own; raises what :func:`text_encoder_source` does."""
    config = read_json(folder / CONFIG)
    kind = str(config.get("model_type", ""))
    if kind not in _MODEL_TYPES:
        raise NotOurs(
            f"{folder / CONFIG}: model_type {kind!r} is no text encoder that is known here; known: "
            f"{', '.join(_MODEL_TYPES)}."
        )
    family = _MODEL_TYPES[kind]
    try:
        params = FAMILIES[family].from_config(config)
    except NotOurs as e:
        raise NotOurs(f"{folder / CONFIG}: {e}. Expected a text encoder as the pipelines of diffusers use it.") from e
    return TextEncoder(
        family=family,
        params=params,
        source=_open(folder, pickles),
        layouts=maps.FOLDERS[family],
        what=f"{folder.name}/{CONFIG}",
        origin=f"weights of {folder.name}/, read as {family}",
    )


def _open(folder: Path, pickles: Pickles) -> WeightSource:
    for file in (f"{_COMPONENT}.safetensors", f"{_COMPONENT}{INDEX_SUFFIX}"):
        if (folder / file).is_file():
            return SafetensorsFolder(folder / file)
    return open_component(folder, pickles)


def golden_feeds(spec: StageSpec, params: Any, seed: int) -> dict[str, Array]:
    """Two prompts of random tokens, of different lengths; the rest is padding, with the token that ends a prompt."""
    length = spec.dim("tokens").default
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, params.vocab_size, (GOLDEN_BATCH, length))
    mask = np.ones_like(ids)
    eos = getattr(params, "eos_token_id", params.vocab_size - 1)
    end = params.vocab_size - 1 if eos == clip_text.LEGACY_EOS else min(eos, params.vocab_size - 1)
    for row, words in enumerate((max(1, length // 4), max(1, length - 1))):
        ids[row, words:] = end
        mask[row, words + 1 :] = 0
    feeds = {"input_ids": ids, "attention_mask": mask}
    return {tensor.name: feeds[tensor.name] for tensor in spec.inputs}
