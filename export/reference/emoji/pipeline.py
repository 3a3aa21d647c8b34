"""The shipped emoji model as a whole pipeline: what ``lehr export emoji`` puts around its denoiser.

Everything comes from the package, ``reference/weights``: ``emoji.safetensors`` is the denoiser, ``emoji-text`` and
``emoji-vae`` are its stages, ``emoji-tokenizer.json`` is its vocabulary; ``emoji-NOTICE.txt`` says whose art it learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lehr.engines.graph.tensor_file import SafetensorsFile
from lehr.export.autoencoders.folder import KL
from lehr.export.autoencoders.kl import KLDecoder, KLEncoder
from lehr.export.autoencoders.stages import Half
from lehr.export.checkpoints.mapped import MappedSource
from lehr.export.checkpoints.rules import Origin
from lehr.export.encoders.outputs import text_stage
from lehr.export.pipelines.source import PipelineSource
from lehr.export.reference.emoji import vae
from lehr.export.reference.emoji.text_encoder import Params, TextEncoder
from lehr.export.source import Source
from lehr.export.stages import StageSource
from lehr.runtime.errors import InvalidInput
from lehr.runtime.pipeline_spec import LatentSpec, PipelineSpec, TokenizerSpec
from lehr.runtime.stage import STAGES
from lehr.runtime.tokenizer import Tokenizer

NAME = "emoji"
ORIGIN = "trained weights shipped with lehr"
TEXT, PAD_ID = "text_encoder", 0
GOLDEN_PROMPTS = (
    "a red heart",
    "waving hand: dark skin tone, in a picture with many more words than most captions have",
)


def read(denoiser: Source, *, structure_only: bool) -> PipelineSource:
    """The pipeline around the shipped denoiser.

    Args:
        denoiser: preset ``emoji``.
        structure_only: no weights are kept.

    Raises:
        InvalidInput: the package lacks a part of the model.
    """
    latent = LatentSpec(channels=vae.CHANNELS, factor=vae.PARAMS.factor, scaling_factor=1.0)
    autoencoder = None if structure_only else SafetensorsFile(_shipped("emoji-vae.safetensors"))
    text = None if structure_only else SafetensorsFile(_shipped("emoji-text.safetensors"))

    def half(kind: Callable[..., nn.Module]) -> Half:
        module = _hollow(kind, vae.PARAMS)
        # Both halves stand in one file, and a stage's weights must be its own.
        own = {name: Origin(parts=((name,),)) for name in module.state_dict()}
        return Half(
            module=module,
            weights=None if autoencoder is None else MappedSource(autoencoder, own),
            origin=ORIGIN,
            family=KL,
            latent=latent,
            channels=3,
            size=denoiser.spec.sample_shape(1)[-1],
        )

    vocabulary = tokenizer_json()
    words = TokenizerSpec(
        file=f"{STAGES}/{TEXT}/tokenizer.json", max_length=Params().longest, pad_id=PAD_ID, pad_to_max=True
    )
    encoder = StageSource(
        spec=text_stage(
            TEXT,
            "emoji_text",
            outputs=(
                ("last_hidden_state", ("batch", "tokens", Params().hidden_size)),
                ("text_embeds", ("batch", Params().hidden_size)),
            ),
            max_length=words.max_length,
            longest=words.max_length,
            masked=True,
        ),
        module=_hollow(TextEncoder, Params()),
        weights=text,
        origin=ORIGIN,
        feeds=lambda _: prompts(words, vocabulary),
    )
    return PipelineSource(
        denoiser=denoiser,
        stages=(encoder, half(KLDecoder).decoder(), half(KLEncoder).encoder()),
        tokenizers={TEXT: vocabulary},
        spec=PipelineSpec(family=NAME, class_name="emoji", tokenizers={TEXT: words}, latent=latent),
    )


def prompts(spec: TokenizerSpec, vocabulary: bytes) -> dict[str, npt.NDArray[np.int64]]:
    """A short prompt and a long one, as the text encoder is fed them."""
    tokens = Tokenizer(spec, vocabulary)(GOLDEN_PROMPTS)
    return {"input_ids": tokens.ids, "attention_mask": tokens.mask}


def tokenizer_json() -> bytes:
    """The shipped tokenizer, without the truncation that training saved in it: the bundle says the length itself."""
    data = json.loads(_shipped("emoji-tokenizer.json").read_bytes())
    return json.dumps(data | {"padding": None, "truncation": None}, ensure_ascii=False).encode()


def _hollow(kind: Callable[..., nn.Module], params: object) -> nn.Module:
    with torch.device("meta"):
        return kind(params).eval()


def _shipped(name: str) -> Path:
    path = Path(str(files("lehr.export.reference").joinpath("weights", name)))
    if not path.is_file():
        raise InvalidInput(f"this installation of lehr lacks {name}, a part of its emoji model. Install lehr again.")
    return path
