"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020), in OpenAI's and in OpenCLIP's sizes.

A GPT-like transformer: learned positions, pre-norm blocks, a causal mask, and the features of the end-of-text token as
the features of the whole. Stable Diffusion reads the features of all tokens; later families take them one layer
before the last. Module and parameter names are those of transformers' ``CLIPTextModelWithProjection``.

Shape legend: B batch, L tokens, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lehr.export.checkpoints.config import NotOurs, Options
from lehr.export.encoders._layers import ACTIVATIONS, attend, causal_bias, check_activation, split_heads
from lehr.export.encoders.outputs import HIDDEN, LAST, PENULTIMATE, POOLED, PROJECTED, TextOutput, text_stage
from lehr.runtime.stage import StageSpec

FAMILY = "clip_text"
LEGACY_EOS = 2  # what configurations said before transformers 4.32; there the highest id of a prompt ends it

# ---------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Architecture of one CLIP text encoder; the defaults are CLIP ViT-L/14's, Stable Diffusion 1's encoder.

    Attributes:
        projection_dim: size of ``text_embeds``; None without a projection.
        eos_token_id: the token whose features are pooled; ``LEGACY_EOS`` stands for the highest id of each prompt.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    depth: int = 12
    num_heads: int = 12
    max_positions: int = 77
    hidden_act: str = "quick_gelu"
    norm_eps: float = 1e-5
    projection_dim: int | None = None
    eos_token_id: int = LEGACY_EOS

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}, expected at least one block")
        check_activation(self.hidden_act)


def from_config(config: Mapping[str, Any]) -> Params:
    """transformers' ``config.json`` of a ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.

    Raises:
        NotOurs: another architecture.
    """
    o = Options(config)
    kinds = o.raw("architectures", None) or ["CLIPTextModel"]
    if kinds[0] not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise NotOurs(f"{kinds[0]} is no CLIP text encoder")
    if o.raw("use_attention_mask", None):
        raise NotOurs("use_attention_mask is set, and prompts are not masked here")
    try:
        return Params(
            vocab_size=o.take("vocab_size", 49408),
            hidden_size=o.take("hidden_size", 512),
            intermediate_size=o.take("intermediate_size", 2048),
            depth=o.take("num_hidden_layers", 12),
            num_heads=o.take("num_attention_heads", 8),
            max_positions=o.take("max_position_embeddings", 77),
            hidden_act=o.take("hidden_act", "quick_gelu"),
            norm_eps=o.take("layer_norm_eps", 1e-5),
            projection_dim=o.take("projection_dim", 512) if kinds[0].endswith("WithProjection") else None,
            eos_token_id=o.take("eos_token_id", 49407),
        )
    except ValueError as e:
        raise NotOurs(str(e)) from e


# -------------------------------------------------------------------------------------------------- layers


class Embeddings(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(p.vocab_size, p.hidden_size)
        self.position_embedding = nn.Embedding(p.max_positions, p.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class Attention(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.head_dim = p.hidden_size // p.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(p.hidden_size, p.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(part(x), self.head_dim) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, bias))


class Mlp(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[p.hidden_act]
        self.fc1 = nn.Linear(p.hidden_size, p.intermediate_size)
        self.fc2 = nn.Linear(p.intermediate_size, p.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block over (B, L, D); ``bias`` (1, 1, L, L) is added to the scores."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.self_attn = Attention(p)
        self.layer_norm1 = nn.LayerNorm(p.hidden_size, eps=p.norm_eps)
        self.mlp = Mlp(p)
        self.layer_norm2 = nn.LayerNorm(p.hidden_size, eps=p.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), bias)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(p) for _ in range(p.depth))


class Transformer(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.embeddings = Embeddings(p)
        self.encoder = Encoder(p)
        self.final_layer_norm = nn.LayerNorm(p.hidden_size, eps=p.norm_eps)


# --------------------------------------------------------------------------------------------------- model


class ClipText(nn.Module):
    """Text features of ids.

    Args:
        params: the architecture.
        outputs: names out of :mod:`lehr.export.encoders.outputs`, in the order in which ``forward`` returns them;
            what none of them needs is not computed.
    """

    def __init__(self, params: Params, outputs: Sequence[str]) -> None:
        super().__init__()
        self.params, self.outputs = params, tuple(outputs)
        self.text_model = Transformer(params)
        if params.projection_dim is not None:
            self.text_projection = nn.Linear(params.hidden_size, params.projection_dim, bias=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """input_ids (B, L) int64, L up to the number of positions -> the chosen outputs."""
        model = self.text_model
        x = model.embeddings(input_ids)  # (B, L, D)
        bias = causal_bias(input_ids.shape[1], like=x)
        needs_last = not all(name == PENULTIMATE or name.startswith(HIDDEN) for name in self.outputs)
        states = [x]
        for layer in model.encoder.layers if needs_last else model.encoder.layers[:-1]:
            states.append(layer(states[-1], bias))
        depth = self.params.depth
        found = {PENULTIMATE: states[depth - 1], **{f"{HIDDEN}{k}": states[k] for k in range(depth)}}
        if needs_last:
            found[LAST] = model.final_layer_norm(states[depth])
            found[POOLED] = self._pooled(found[LAST], input_ids)  # (B, D)
        if PROJECTED in self.outputs:
            found[PROJECTED] = self.text_projection(found[POOLED])
        return tuple(found[name] for name in self.outputs)

    def _pooled(self, features: Tensor, input_ids: Tensor) -> Tensor:
        """The features of the first token that ends the prompt; of the first token where none does."""
        eos = self.params.eos_token_id
        # The legacy rule is argmax of the ids; not every engine has that for int64, and of 0 and 1 it does as well.
        mark = input_ids.amax(dim=1, keepdim=True) if eos == LEGACY_EOS else eos
        place = (input_ids == mark).to(torch.int32).argmax(dim=1)
        rows = place[:, None, None].expand(-1, 1, features.shape[2])
        return features.gather(1, rows).squeeze(1)


# --------------------------------------------------------------------------------------------------- stage


def outputs_of(p: Params, output: TextOutput, layers: Sequence[int] = ()) -> tuple[str, ...]:
    """The names of what a pipeline asks for; ``layers`` are those of ``TextOutput.HIDDEN_STATES``.

    Raises:
        NotOurs: this family does not have it.
    """
    if output is TextOutput.PENULTIMATE_HIDDEN_STATE:
        return (PENULTIMATE,) if p.projection_dim is None else (PENULTIMATE, PROJECTED)
    if output is TextOutput.HIDDEN_STATES:
        if not layers or not all(0 <= layer < p.depth for layer in layers):
            raise NotOurs(f"layers {tuple(layers)} of a CLIP with {p.depth} blocks; expected numbers from 0, below it")
        return tuple(f"{HIDDEN}{layer}" for layer in layers)
    return (output.value,)


def stage_spec(name: str, p: Params, *, outputs: Sequence[str], max_length: int | None = None) -> StageSpec:
    """Inputs and outputs of a stage with this encoder; prompts are padded to ``max_length``, None for all positions."""
    tokens = ("batch", "tokens", p.hidden_size)
    sizes: dict[str, tuple[int | str, ...]] = {LAST: tokens, PENULTIMATE: tokens, POOLED: ("batch", p.hidden_size)}
    if p.projection_dim is not None:
        sizes[PROJECTED] = ("batch", p.projection_dim)
    return text_stage(
        name,
        FAMILY,
        outputs=[(output, tokens if output.startswith(HIDDEN) else sizes[output]) for output in outputs],
        max_length=p.max_positions if max_length is None else max_length,
        longest=p.max_positions,
        masked=False,  # the mask is causal, and no pipeline reads what stands after the end
    )
