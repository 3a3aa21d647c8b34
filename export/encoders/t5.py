"""T5's encoder (Raffel et al. 2019, arXiv:1910.10683), version 1.1, mT5 (arXiv:2010.11934) and umT5 (arXiv:2304.09151).

RMS norms, no biases, unscaled scores, and positions that enter only as a learned bias of the scores by distance,
shared by all blocks (umT5: one a block). PixArt, SD3 and FLUX read T5 v1.1 XXL. Module and parameter names are those
of transformers' ``T5EncoderModel``.

Shape legend: B batch, L tokens, D channels of a token, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lehr.export.checkpoints.config import NotOurs, Options
from lehr.export.encoders._layers import ACTIVATIONS, RMSNorm, attend, check_activation, padding_bias, split_heads
from lehr.export.encoders.outputs import LAST, TextOutput, text_stage
from lehr.runtime.stage import StageSpec

FAMILY = "t5_encoder"
LONGEST = 512  # tokens that released models were trained on

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one T5 encoder; the defaults are T5 v1.1 XXL's.

    Attributes:
        d_kv: channels of a head; heads need not fill the width.
        gated: two inner projections, one of which gates the other (version 1.1).
        bias_every_block: umT5's position biases.
        num_buckets, max_distance: distances up to a quarter of the buckets have one each, longer ones share, and from
            ``max_distance`` on there is one for all.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    depth: int = 24
    num_heads: int = 64
    activation: str = "gelu_new"
    gated: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    bias_every_block: bool = False

    def __post_init__(self) -> None:
        if self.num_buckets < 4 or self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets {self.num_buckets} must be a multiple of 4 and max_distance {self.max_distance} more "
                "than a quarter of it"
            )
        check_activation(self.activation)


def from_config(config: Mapping[str, Any]) -> Params:
    """transformers' ``config.json`` of a ``T5EncoderModel``, ``MT5EncoderModel`` or ``UMT5EncoderModel``.

    Raises:
        NotOurs: another architecture.
    """
    o = Options(config)
    kind = o.take("model_type", "t5")
    if kind not in ("t5", "mt5", "umt5"):
        raise NotOurs(f"model_type {kind!r} is no T5 encoder")
    said = o.take("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    activation = said.removeprefix("gated-")
    try:
        return Params(
            vocab_size=o.take("vocab_size", 32128 if kind == "t5" else 250112),
            d_model=o.take("d_model", 512),
            d_kv=o.take("d_kv", 64),
            d_ff=o.take("d_ff", 2048 if kind == "t5" else 1024),
            depth=o.take("num_layers", 6 if kind == "t5" else 8),
            num_heads=o.take("num_heads", 8 if kind == "t5" else 6),
            # "gated-gelu" means the tanh form, as transformers keeps it for T5's sake.
            activation="gelu_new" if said == "gated-gelu" else activation,
            gated=said.startswith("gated-"),
            num_buckets=o.take("relative_attention_num_buckets", 32),
            max_distance=o.take("relative_attention_max_distance", 128),
            norm_eps=o.take("layer_norm_epsilon", 1e-6),
            bias_every_block=kind == "umt5",
        )
    except ValueError as e:
        raise NotOurs(str(e)) from e


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """The number of the bias for a key ``distance`` tokens after the query (before it where negative).

    >>> [bucket(d, 32, 128) for d in (-200, -8, -1, 0, 1, 7, 8, 127, 500)]
    [15, 8, 1, 0, 17, 23, 24, 31, 31]
    """
    half = num_buckets // 2  # of the buckets for each direction
    exact, size = half // 2, abs(distance)
    start = half if distance > 0 else 0
    if size < exact:
        return start + size
    # In float32 and truncated, as the release does it: at 16 tokens the exact quotient is a whole number.
    ratio = np.log(np.float32(size / exact)) / np.float32(math.log(max_distance / exact))
    return start + min(exact + int(ratio * np.float32(half - exact)), half - 1)


# -------------------------------------------------------------------------------------------------- layers


class Attention(nn.Module):
    def __init__(self, p: Params, *, biased: bool) -> None:
        super().__init__()
        self.head_dim, inner = p.d_kv, p.num_heads * p.d_kv
        self.q, self.k, self.v = (nn.Linear(p.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, p.d_model, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(p.num_buckets, p.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(part(x), self.head_dim) for part in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, bias, scale=1.0))


class SelfAttentionLayer(nn.Module):
    def __init__(self, p: Params, *, biased: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(p, biased=biased)
        self.layer_norm = RMSNorm(p.d_model, p.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class FeedForward(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[p.activation], p.gated
        if p.gated:
            self.wi_0, self.wi_1 = (nn.Linear(p.d_model, p.d_ff, bias=False) for _ in range(2))
        else:
            self.wi = nn.Linear(p.d_model, p.d_ff, bias=False)
        self.wo = nn.Linear(p.d_ff, p.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.wo(self.activation(self.wi_0(x)) * self.wi_1(x))
        return self.wo(self.activation(self.wi(x)))


class FeedForwardLayer(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(p)
        self.layer_norm = RMSNorm(p.d_model, p.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, p: Params, *, biased: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([SelfAttentionLayer(p, biased=biased), FeedForwardLayer(p)])


class Stack(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(p, biased=p.bias_every_block or i == 0) for i in range(p.depth))
        self.final_layer_norm = RMSNorm(p.d_model, p.norm_eps)


# --------------------------------------------------------------------------------------------------- model


class T5Encoder(nn.Module):
    """Text features of ids.

    Args:
        params: the architecture.
        outputs: ``last_hidden_state``, the only one there is.
    """

    def __init__(self, params: Params, outputs: Sequence[str]) -> None:
        super().__init__()
        p = self.params = params
        self.outputs = tuple(outputs)
        self.shared = nn.Embedding(p.vocab_size, p.d_model)
        self.encoder = Stack(p)
        reach = range(-p.max_distance, p.max_distance + 1)
        self.buckets = [bucket(distance, p.num_buckets, p.max_distance) for distance in reach]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids and attention_mask (B, L) int64, the mask 1 for text and 0 for padding -> (B, L, D)."""
        x = self.shared(input_ids)
        mask = padding_bias(attention_mask, like=x)  # (B, 1, L, L)
        distances = self._distances(input_ids.shape[1], input_ids.device)
        bias = mask
        for block in self.encoder.block:
            attention, feed_forward = block.layer  # type: ignore[misc]
            if hasattr(attention.SelfAttention, "relative_attention_bias"):
                bias = mask + self._positions(attention.SelfAttention.relative_attention_bias.weight, distances)
            x = feed_forward(attention(x, bias))
        return self.encoder.final_layer_norm(x)

    def _distances(self, length: int, device: torch.device) -> Tensor:
        """(L, L): from each query to each key, cut to the range that has buckets, counted from its low end."""
        position, far = torch.arange(length, device=device), self.params.max_distance
        return (position[None, :] - position[:, None]).clamp(-far, far) + far

    def _positions(self, weight: Tensor, distances: Tensor) -> Tensor:
        """weight (buckets, heads) -> (1, heads, L, L)."""
        by_distance = weight[torch.tensor(self.buckets, device=weight.device)]
        return by_distance[distances].permute(2, 0, 1)[None]


# --------------------------------------------------------------------------------------------------- stage


def outputs_of(p: Params, output: TextOutput, layers: Sequence[int] = ()) -> tuple[str, ...]:
    """The names of what a pipeline asks for; ``layers`` can only be refused.

    Raises:
        NotOurs: this family does not have it.
    """
    if output is not TextOutput.LAST_HIDDEN_STATE:
        raise NotOurs(f"T5 of depth {p.depth} has no {output.value} {tuple(layers)} here, only {LAST}")
    return (LAST,)


def stage_spec(name: str, p: Params, *, outputs: Sequence[str], max_length: int | None = None) -> StageSpec:
    """Inputs and outputs of a stage with this encoder; prompts are padded to ``max_length``, None for 512."""
    return text_stage(
        name,
        FAMILY,
        outputs=[(output, ("batch", "tokens", p.d_model)) for output in outputs],
        max_length=LONGEST if max_length is None else max_length,
        longest=LONGEST,
        masked=True,
    )
