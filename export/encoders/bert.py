"""BERT (Devlin et al. 2018, arXiv:1810.04805) and models of its shape, such as MiniLM (arXiv:2002.10957).

Post-norm blocks over tokens, learned positions and one segment. What stands for a whole sentence differs between
models (the first token, the mean), so the features of all tokens are the output; ``pooler_output`` is BERT's own
choice. Module and parameter names are those of transformers' ``BertModel``.

Shape legend: B batch, L tokens, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lehr.export.checkpoints.config import NotOurs, Options
from lehr.export.encoders._layers import ACTIVATIONS, attend, check_activation, padding_bias, split_heads
from lehr.export.encoders.outputs import LAST, PENULTIMATE, POOLED, TextOutput, text_stage
from lehr.runtime.stage import StageSpec

FAMILY = "bert"

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one BERT; the defaults are BERT base's, uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    depth: int = 12
    num_heads: int = 12
    max_positions: int = 512
    num_segments: int = 2
    hidden_act: str = "gelu"
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        check_activation(self.hidden_act)


def from_config(config: Mapping[str, Any]) -> Params:
    """transformers' ``config.json`` of a ``BertModel``.

    Raises:
        NotOurs: another architecture.
    """
    o = Options(config)
    if o.take("model_type", "bert") != "bert" or o.take("is_decoder", False):
        raise NotOurs("the configuration is of no BERT encoder")
    if o.take("position_embedding_type", "absolute") != "absolute":
        raise NotOurs(f"position_embedding_type is {config['position_embedding_type']!r}")
    try:
        return Params(
            vocab_size=o.take("vocab_size", 30522),
            hidden_size=o.take("hidden_size", 768),
            intermediate_size=o.take("intermediate_size", 3072),
            depth=o.take("num_hidden_layers", 12),
            num_heads=o.take("num_attention_heads", 12),
            max_positions=o.take("max_position_embeddings", 512),
            num_segments=o.take("type_vocab_size", 2),
            hidden_act=o.take("hidden_act", "gelu"),
            norm_eps=o.take("layer_norm_eps", 1e-12),
        )
    except ValueError as e:
        raise NotOurs(str(e)) from e


# -------------------------------------------------------------------------------------------------- layers


class Embeddings(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(p.vocab_size, p.hidden_size)
        self.position_embeddings = nn.Embedding(p.max_positions, p.hidden_size)
        self.token_type_embeddings = nn.Embedding(p.num_segments, p.hidden_size)
        self.LayerNorm = nn.LayerNorm(p.hidden_size, eps=p.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        segment = self.token_type_embeddings.weight[0]  # a prompt is one segment
        return self.LayerNorm(self.word_embeddings(input_ids) + segment + self.position_embeddings(positions))


class SelfAttention(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.head_dim = p.hidden_size // p.num_heads
        self.query, self.key, self.value = (nn.Linear(p.hidden_size, p.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(part(x), self.head_dim) for part in (self.query, self.key, self.value))
        return attend(q, k, v, bias)


class AddAndNorm(nn.Module):
    """Project ``x``, add what went in before, normalise."""

    def __init__(self, dim: int, p: Params) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, p.hidden_size)
        self.LayerNorm = nn.LayerNorm(p.hidden_size, eps=p.norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.self = SelfAttention(p)
        self.output = AddAndNorm(p.hidden_size, p)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.output(self.self(x, bias), x)


class Intermediate(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[p.hidden_act]
        self.dense = nn.Linear(p.hidden_size, p.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class Block(nn.Module):
    """Post-norm transformer block over (B, L, D)."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.attention = Attention(p)
        self.intermediate = Intermediate(p)
        self.output = AddAndNorm(p.intermediate_size, p)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention(x, bias)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(p) for _ in range(p.depth))


class Pooler(nn.Module):
    """The first token's features, projected, through tanh."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.dense = nn.Linear(p.hidden_size, p.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


# --------------------------------------------------------------------------------------------------- model


class Bert(nn.Module):
    """Text features of ids.

    Args:
        params: the architecture.
        outputs: names out of :mod:`lehr.export.encoders.outputs`, in the order in which ``forward`` returns them.
    """

    def __init__(self, params: Params, outputs: Sequence[str]) -> None:
        super().__init__()
        self.params, self.outputs = params, tuple(outputs)
        self.embeddings = Embeddings(params)
        self.encoder = Encoder(params)
        if POOLED in self.outputs:  # many releases come without
            self.pooler = Pooler(params)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """input_ids and attention_mask (B, L) int64, the mask 1 for text and 0 for padding -> the chosen outputs."""
        x = self.embeddings(input_ids)
        bias = padding_bias(attention_mask, like=x)
        found: dict[str, Tensor] = {}
        for layer in self.encoder.layer:
            found[PENULTIMATE] = x
            x = layer(x, bias)
        found[LAST] = x
        if POOLED in self.outputs:
            found[POOLED] = self.pooler(x)
        return tuple(found[name] for name in self.outputs)


# --------------------------------------------------------------------------------------------------- stage


def outputs_of(p: Params, output: TextOutput, layers: Sequence[int] = ()) -> tuple[str, ...]:
    """The names of what a pipeline asks for; ``layers`` can only be refused.

    Raises:
        NotOurs: this family does not have it.
    """
    if output is TextOutput.HIDDEN_STATES:
        raise NotOurs(
            f"BERT of depth {p.depth} has no features of chosen layers {tuple(layers)} here, only the last two"
        )
    return (output.value,)


def stage_spec(name: str, p: Params, *, outputs: Sequence[str], max_length: int | None = None) -> StageSpec:
    """Inputs and outputs of a stage with this encoder; prompts are padded to ``max_length``, None for all positions."""
    whole: tuple[int | str, ...] = ("batch", p.hidden_size)
    return text_stage(
        name,
        FAMILY,
        outputs=[(o, whole if o == POOLED else ("batch", "tokens", p.hidden_size)) for o in outputs],
        max_length=p.max_positions if max_length is None else max_length,
        longest=p.max_positions,
        masked=True,
    )
