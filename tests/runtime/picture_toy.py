"""A pipeline of arithmetic: a word tokenizer, a text encoder, a denoiser and an autoencoder, without any library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lehr.runtime.denoiser import Denoiser
from lehr.runtime.hoisted import Residency
from lehr.runtime.paths import VP
from lehr.runtime.pipeline_spec import LatentSpec, PipelineSpec, TokenizerSpec
from lehr.runtime.prediction import EPSILON
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, Sampling, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec
from lehr.runtime.text_to_image import TextToImage

WORDS = ("[pad]", "[begin]", "[end]", "[unk]", "a", "red", "blue", "fox", "sea")
LENGTH, WIDTH, FACTOR, CHANNELS = 8, 6, 4, 4
FILE = "stages/text_encoder/tokenizer.json"
TOKENIZER = TokenizerSpec(file=FILE, max_length=LENGTH, pad_id=0)
LATENT = LatentSpec(channels=CHANNELS, factor=FACTOR, scaling_factor=0.5, shift_factor=0.1)


def tokenizer_json() -> bytes:
    """Words between a beginning and an end, as the tokenizers library stores it."""
    special = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[begin]", "[end]")]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [special[0], text, special[1]],
                "pair": [special[0], text, special[1]],
                "special_tokens": {
                    name: {"id": name, "ids": [WORDS.index(name)], "tokens": [name]} for name in ("[begin]", "[end]")
                },
            },
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: i for i, word in enumerate(WORDS)},
                "unk_token": "[unk]",
            },
        }
    ).encode()


SIDE = {"default": 8, "min": 2, "max": 32, "multiple": 2}
MODEL = ModelSpec(
    name="toy",
    inputs=(
        TensorSpec(name="sample", shape=("batch", CHANNELS, "height", "width"), varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        TensorSpec(name="encoder_hidden_states", shape=("batch", LENGTH, WIDTH), varies=Varies.PROMPT),
    ),
    outputs=(TensorSpec(name="output", shape=("batch", CHANNELS, "height", "width"), varies=Varies.SAMPLE),),
    dims=(BATCH, Dim(name="height", **SIDE), Dim(name="width", **SIDE)),
    path=VP(),
    prediction=EPSILON,
    sampling=Sampling(num_inference_steps=3),
)


def evaluate(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A share of the sample plus what the text says, each row by itself."""
    text = feeds["encoder_hidden_states"].mean(axis=1)[:, :CHANNELS, None, None]
    return {"output": (0.9 * feeds["sample"] + 0.2 * text).astype(np.float32)}


def _stage(name: str, kind: StageKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> StageSpec:
    sizes = [Dim(name=dim, default=8) for dim in ("height", "width")] if kind is not StageKind.TEXT_ENCODER else []
    tensors = [
        tuple(
            TensorSpec(
                name=key,
                shape=("batch", *shape),
                dtype=DType.INT64 if key in ("input_ids", "attention_mask") else DType.FLOAT32,
                varies=Varies.PROMPT,
            )
            for key, shape in group.items()
        )
        for group in (inputs, outputs)
    ]
    return StageSpec(name=name, kind=kind, family="toy", inputs=tensors[0], outputs=tensors[1], dims=(BATCH, *sizes))


def text_encoder(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    features = np.sin(ids[..., None] * (1 + np.arange(WIDTH))) * mask[..., None]
    return {"last_hidden_state": features.astype(np.float32)}


def decoder(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    latent = feeds["latent_sample"][:, :3]
    return {"sample": latent.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)}


def encoder(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    n, c, h, w = feeds["sample"].shape
    mean = feeds["sample"].reshape(n, c, h // FACTOR, FACTOR, w // FACTOR, FACTOR).mean(axis=(3, 5))
    mean = np.concatenate([mean, mean[:, :1]], axis=1)
    return {"mean": mean, "std": np.full_like(mean, 0.125)}


Function = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
PIXELS = (3, "height", "width")
CELLS = (CHANNELS, "height", "width")
LARGER = (f"{FACTOR}*height", f"{FACTOR}*width")
SMALLER = (CHANNELS, f"height/{FACTOR}", f"width/{FACTOR}")
ALL: dict[str, tuple[StageSpec, Function]] = {
    "text_encoder": (
        _stage(
            "text_encoder",
            StageKind.TEXT_ENCODER,
            {"input_ids": (LENGTH,), "attention_mask": (LENGTH,)},
            {"last_hidden_state": (LENGTH, WIDTH)},
        ),
        text_encoder,
    ),
    "vae_decoder": (
        _stage("vae_decoder", StageKind.LATENT_DECODER, {"latent_sample": CELLS}, {"sample": (3, *LARGER)}),
        decoder,
    ),
    "vae_encoder": (
        _stage("vae_encoder", StageKind.LATENT_ENCODER, {"sample": PIXELS}, {"mean": SMALLER, "std": SMALLER}),
        encoder,
    ),
}


@dataclass
class ToyStages:
    """Stages by name, and a diary of what was opened, called and closed."""

    functions: dict[str, tuple[StageSpec, Function]] = field(default_factory=lambda: dict(ALL))
    diary: list[str] = field(default_factory=list)
    feeds: list[dict[str, np.ndarray]] = field(default_factory=list)

    def names(self) -> tuple[str, ...]:
        return tuple(self.functions)

    def spec(self, name: str) -> StageSpec:
        return self.functions[name][0]

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        self.diary.append(f"open {name}")
        yield _Runner(self, name)
        self.diary.append(f"close {name}")


@dataclass
class _Runner:
    stages: ToyStages
    name: str

    @property
    def spec(self) -> StageSpec:
        return self.stages.spec(self.name)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.spec.check_feeds(feeds)
        self.stages.feeds.append(dict(feeds))
        return self.stages.functions[self.name][1](feeds)


def toy(
    *,
    model: ModelSpec = MODEL,
    stages: ToyStages | None = None,
    family: str = "stable_diffusion",
    latent: LatentSpec | None = LATENT,
    options: dict[str, Any] | None = None,
    network: Function = evaluate,
    residency: Residency = Residency.AUTO,
    warn: Callable[[str], None] | None = None,
) -> TextToImage:
    """The pipeline, its denoiser's evaluations in the stages' diary."""
    found = stages or ToyStages()

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found.diary.append("denoise")
        return network(feeds)

    def opened() -> Denoiser:
        found.diary.append("open denoiser")
        return Denoiser(model, run)

    tokenizers = {"text_encoder": TOKENIZER} if "text_encoder" in found.names() else {}
    return TextToImage(
        model,
        PipelineSpec(family=family, class_name="Toy", tokenizers=tokenizers, latent=latent, options=options or {}),
        found,
        open_denoiser=opened,
        read={FILE: tokenizer_json()}.__getitem__,
        residency=residency,
        warn=warn,
    )
