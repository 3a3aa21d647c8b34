"""Two small stages, a text encoder and a decoder, with the traps of large ones: a mask, and a layer beyond fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lehr.export.stages import StageSource
from lehr.export.weights import TorchModuleSource
from lehr.runtime.spec import BATCH, Dim, DType, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec

Array = npt.NDArray[Any]

BEYOND_FP16 = 2e5  # gain of the decoder's first convolution: its weights fit into fp16, its results do not
TOKENS, LENGTH, WIDTH, CHANNELS, SIZE = 50, 9, 16, 4, 8

ENCODER = StageSpec(
    name="text_encoder",
    kind=StageKind.TEXT_ENCODER,
    family="toy_text",
    inputs=(
        TensorSpec(name="input_ids", dtype=DType.INT64, shape=("batch", LENGTH), varies=Varies.PROMPT),
        TensorSpec(name="attention_mask", dtype=DType.INT64, shape=("batch", LENGTH), varies=Varies.PROMPT),
    ),
    outputs=(
        TensorSpec(name="last_hidden_state", shape=("batch", LENGTH, WIDTH), varies=Varies.PROMPT),
        TensorSpec(name="text_embeds", shape=("batch", WIDTH), varies=Varies.PROMPT),
    ),
)
DECODER = StageSpec(
    name="vae_decoder",
    kind=StageKind.LATENT_DECODER,
    family="toy_decoder",
    inputs=(TensorSpec(name="latent_sample", shape=("batch", CHANNELS, "height", "width"), varies=Varies.SAMPLE),),
    outputs=(TensorSpec(name="sample", shape=("batch", 3, "2*height", "2*width"), varies=Varies.SAMPLE),),
    dims=(BATCH, Dim(name="height", default=SIZE, min=2, max=64), Dim(name="width", default=SIZE, min=2, max=64)),
)


class TextEncoder(nn.Module):
    """One layer of masked attention; ``text_embeds`` is read at the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        mask = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(
            attention_mask == 0, torch.finfo(x.dtype).min
        )
        x = self.norm(
            x
            + functional.scaled_dot_product_attention(q, k, v, mask[:, None, None].expand(-1, -1, LENGTH, -1)).squeeze(
                1
            )
        )
        return x, self.project(x[:, 0])


class Decoder(nn.Module):
    """Twice the size; the first convolution's results leave fp16's range, and a norm brings them back."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)
        with torch.no_grad():
            self.conv_in.weight *= gain

    def forward(self, latent_sample: Tensor) -> Tensor:
        x = functional.silu(self.norm(self.conv_in(latent_sample)))
        return self.conv_out(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def encoder_feeds(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < np.array([[LENGTH], [4]])).astype(np.int64)
    return {"input_ids": random.integers(0, TOKENS, (2, LENGTH)), "attention_mask": mask}


def decoder_feeds(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {"latent_sample": random.standard_normal((2, CHANNELS, SIZE, SIZE)).astype(np.float32)}


def source(spec: StageSpec, make: Callable[[], nn.Module], feeds: Callable[[int], dict[str, Array]]) -> StageSource:
    """A stage whose module is hollow, as one that is streamed from a file is."""
    torch.manual_seed(0)
    weights = TorchModuleSource(make().eval())
    with torch.device("meta"):
        module = make().eval()
    return StageSource(spec=spec, module=module, weights=weights, origin="random weights", feeds=feeds)


def encoder() -> StageSource:
    return source(ENCODER, TextEncoder, encoder_feeds)


def decoder(gain: float = 1.0) -> StageSource:
    return source(DECODER, lambda: Decoder(gain), decoder_feeds)
