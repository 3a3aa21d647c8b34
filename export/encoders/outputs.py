"""What a pipeline takes from a text encoder, and the contract of a stage that returns it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from lehr.runtime.spec import BATCH, Dim, DType, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec

LAST, PENULTIMATE, POOLED, PROJECTED = "last_hidden_state", "penultimate_hidden_state", "pooler_output", "text_embeds"
HIDDEN = "hidden_states_"  # followed by a layer's number


class TextOutput(str, Enum):
    """Which features a pipeline uses; an encoder may return two tensors for one of these.

    A stage's outputs bear transformers' names: ``last_hidden_state`` (B, L, D), ``penultimate_hidden_state``
    (B, L, D), which is ``hidden_states[-2]``, ``pooler_output`` (B, D), ``text_embeds`` (B, projection) and
    ``hidden_states_9`` (B, L, D), which is ``hidden_states[9]``.
    """

    LAST_HIDDEN_STATE = "last_hidden_state"  # after the final norm: Stable Diffusion 1 and 2, T5
    PENULTIMATE_HIDDEN_STATE = "penultimate_hidden_state"  # and text_embeds where there is a projection: SDXL, SD3
    POOLER_OUTPUT = "pooler_output"  # FLUX's CLIP
    HIDDEN_STATES = "hidden_states"  # of chosen layers: language models used as encoders, and CLIP


def text_stage(
    name: str,
    family: str,
    *,
    outputs: Sequence[tuple[str, tuple[int | str, ...]]],
    max_length: int,
    longest: int,
    masked: bool,
) -> StageSpec:
    """The contract of a text encoder: ids (B, L) in, features out.

    Args:
        name: the stage's name, such as "text_encoder_2".
        family: architecture.
        outputs: names and shapes, in the order in which the module returns them.
        max_length: tokens of a prompt, as the pipeline pads it.
        longest: tokens that the architecture can take.
        masked: whether ``attention_mask`` (B, L), 1 for text and 0 for padding, is an input beside ``input_ids``.
    """
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    return StageSpec(
        name=name,
        kind=StageKind.TEXT_ENCODER,
        family=family,
        inputs=tuple(
            TensorSpec(name=n, dtype=DType.INT64, shape=("batch", "tokens"), varies=Varies.PROMPT) for n in names
        ),
        outputs=tuple(TensorSpec(name=n, shape=shape, varies=Varies.PROMPT) for n, shape in outputs),
        dims=(BATCH, Dim(name="tokens", default=max_length, max=max(longest, max_length))),
    )
