"""Qwen 2 and 3 (arXiv:2407.10671, arXiv:2505.09388): language models whose hidden layers serve as text features.

RMS norms, rotary positions, grouped-query attention, SwiGLU; Qwen 2 has biases on queries, keys and values, Qwen 3
normalises queries and keys instead. Pipelines take the features of chosen layers, so blocks after the last of these
do not run. Module and parameter names are those of transformers' ``Qwen3Model``.

Shape legend: B batch, L tokens, D channels of a token, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.checkpoints.config import NotOurs, Options
from lehr.export.encoders._layers import RMSNorm, attend, causal_bias, padding_bias, split_heads
from lehr.export.encoders.outputs import HIDDEN, LAST, PENULTIMATE, TextOutput, text_stage
from lehr.runtime.stage import StageSpec

FAMILY = "qwen"
_KINDS = {"qwen2": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3": "qwen3"}

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one Qwen; the defaults are Qwen3-4B's.

    Attributes:
        num_kv_heads: each serves ``num_heads / num_kv_heads`` queries.
        qkv_bias: Qwen 2.
        qk_norm: Qwen 3.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    depth: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    max_positions: int = 40960
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}, head_dim "
                f"{self.head_dim} even"
            )


def from_config(config: Mapping[str, Any]) -> Params:
    """transformers' ``config.json`` of a Qwen 2 or 3; the text part of a Qwen 2.5 VL.

    Raises:
        NotOurs: another architecture.
    """
    kind = str(config.get("model_type", ""))
    if kind not in _KINDS:
        raise NotOurs(f"model_type {kind!r} is none of {', '.join(_KINDS)}")
    o = Options({**config, **config.get("text_config", {})})  # before and since transformers 4.52
    rope = {**(o.raw("rope_scaling", None) or {}), **(o.raw("rope_parameters", None) or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    # Sections of a picture's positions: for text alone all three are equal.
    if scaling not in ("default", "mrope"):
        raise NotOurs(f"rotary positions of the kind {scaling!r}")
    if o.take("use_sliding_window", False) or o.take("hidden_act", "silu") != "silu":
        raise NotOurs("a sliding window, or another activation than silu")
    heads, hidden, three = o.take("num_attention_heads", 32), o.take("hidden_size", 4096), _KINDS[kind] == "qwen3"
    if three and o.take("attention_bias", False):
        raise NotOurs("attention_bias is True")
    try:
        return Params(
            vocab_size=o.take("vocab_size", 151936),
            hidden_size=hidden,
            intermediate_size=o.take("intermediate_size", 22016),
            depth=o.take("num_hidden_layers", 32),
            num_heads=heads,
            num_kv_heads=o.maybe("num_key_value_heads", 32) or heads,
            head_dim=o.maybe("head_dim", 128 if three else None) or hidden // heads,
            max_positions=o.take("max_position_embeddings", 32768),
            rope_theta=float(rope.get("rope_theta", o.raw("rope_theta", 1e4))),
            norm_eps=o.take("rms_norm_eps", 1e-6),
            qkv_bias=not three,
            qk_norm=three,
        )
    except ValueError as e:
        raise NotOurs(str(e)) from e


# -------------------------------------------------------------------------------------------------- layers


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of (B, heads, L, d) by the angles whose cosines and sines are (L, d/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.head_dim, self.groups = p.head_dim, p.num_heads // p.num_kv_heads
        queries, keys = p.num_heads * p.head_dim, p.num_kv_heads * p.head_dim
        self.q_proj = nn.Linear(p.hidden_size, queries, bias=p.qkv_bias)
        self.k_proj, self.v_proj = (nn.Linear(p.hidden_size, keys, bias=p.qkv_bias) for _ in range(2))
        self.o_proj = nn.Linear(queries, p.hidden_size, bias=False)
        if p.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(p.head_dim, p.norm_eps) for _ in range(2))
        self.qk_norm = p.qk_norm

    def forward(self, x: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (split_heads(part(x), self.head_dim) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(attend(q, self._shared(k), self._shared(v), bias))

    def _shared(self, x: Tensor) -> Tensor:
        """(B, kv heads, L, d) -> (B, heads, L, d), each repeated for the queries that it serves."""
        return x[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2)


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(p.hidden_size, p.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(p.intermediate_size, p.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block over (B, L, D); ``bias`` (B, 1, L, L) is added to the scores."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.self_attn = Attention(p)
        self.mlp = Mlp(p)
        self.input_layernorm = RMSNorm(p.hidden_size, p.norm_eps)
        self.post_attention_layernorm = RMSNorm(p.hidden_size, p.norm_eps)

    def forward(self, x: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), bias, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


# --------------------------------------------------------------------------------------------------- model


class Qwen(nn.Module):
    """Text features of ids.

    Args:
        params: the architecture.
        outputs: ``last_hidden_state``, ``penultimate_hidden_state`` or ``hidden_states_N``, in the order in which
            ``forward`` returns them; N = 0 is the embedding.
    """

    def __init__(self, params: Params, outputs: Sequence[str]) -> None:
        super().__init__()
        p = self.params = params
        self.outputs = tuple(outputs)
        self.taken = {name: _layer(name, p) for name in self.outputs}
        self.embed_tokens = nn.Embedding(p.vocab_size, p.hidden_size)
        self.layers = nn.ModuleList(Block(p) for _ in range(p.depth))
        self.norm = RMSNorm(p.hidden_size, p.norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """input_ids and attention_mask (B, L) int64, the mask 1 for text and 0 for padding -> (B, L, D) each."""
        x = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        bias = causal_bias(length, like=x) + padding_bias(attention_mask, like=x)
        cos, sin = self._angles(length, like=x)
        states = [x]
        for layer in self.layers[: max(self.taken.values())]:
            states.append(layer(states[-1], bias, cos, sin))
        if self.params.depth in self.taken.values():  # the last features are normalised
            states[-1] = self.norm(states[-1])
        return tuple(states[number] for number in self.taken.values())

    def _angles(self, length: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (L, d/2); worked out in float32 at least, because positions reach thousands."""
        p, dtype = self.params, torch.promote_types(like.dtype, torch.float32)
        k = torch.arange(0, p.head_dim, 2, dtype=dtype, device=like.device)
        position = torch.arange(length, dtype=dtype, device=like.device)
        phase = position[:, None] / p.rope_theta ** (k / p.head_dim)
        return phase.cos().to(like.dtype), phase.sin().to(like.dtype)


def _layer(name: str, p: Params) -> int:
    """The number of blocks after which an output is taken."""
    if name in (LAST, PENULTIMATE):
        return p.depth if name == LAST else p.depth - 1
    number = name.removeprefix(HIDDEN)
    if not number.isdecimal() or int(number) > p.depth:
        raise NotOurs(f"{name!r} is no output of a Qwen with {p.depth} blocks")
    return int(number)


# --------------------------------------------------------------------------------------------------- stage


def outputs_of(p: Params, output: TextOutput, layers: Sequence[int] = ()) -> tuple[str, ...]:
    """The names of what a pipeline asks for; ``layers`` are those of ``TextOutput.HIDDEN_STATES``.

    Raises:
        NotOurs: this family does not have it.
    """
    if output is TextOutput.HIDDEN_STATES:
        if not layers or not all(0 <= layer <= p.depth for layer in layers):
            raise NotOurs(f"layers {tuple(layers)} of a Qwen with {p.depth} blocks; expected numbers from 0 to it")
        return tuple(f"{HIDDEN}{layer}" for layer in layers)
    if output is TextOutput.POOLER_OUTPUT:
        raise NotOurs("Qwen has no pooled output")
    return (output.value,)


def stage_spec(name: str, p: Params, *, outputs: Sequence[str], max_length: int | None = None) -> StageSpec:
    """Inputs and outputs of a stage with this encoder; prompts are padded to ``max_length``, None for 512."""
    return text_stage(
        name,
        FAMILY,
        outputs=[(output, ("batch", "tokens", p.hidden_size)) for output in outputs],
        max_length=512 if max_length is None else max_length,
        longest=min(p.max_positions, 4096),  # of a prompt; more would only ask engines for profiles that nobody uses
        masked=True,
    )
