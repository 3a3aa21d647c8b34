"""Where text encoders stand in checkpoints: in folders of transformers and in files that hold a whole pipeline.

As in :mod:`lehr.export.checkpoints.maps`, a layout is data: rules, and keys that an encoder does without. In a file
with a whole pipeline the parts are told apart by what stands before their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from lehr.engines.graph.weights import WeightSource
from lehr.export.checkpoints.mapped import Layout, MappedSource
from lehr.export.checkpoints.rules import Origin, Rule, Transform
from lehr.export.encoders import bert, clip_text, qwen, t5

# ----------------------------------------------------------------------------------------------- transformers

_HEADS = ("lm_head.weight", "cls.{rest}", "model.visual.{rest}", "visual.{rest}")  # what a whole model has besides
_POSITIONS = ("text_model.embeddings.position_ids", "embeddings.position_ids", "logit_scale")

FOLDERS: Mapping[str, tuple[Layout, ...]] = {
    clip_text.FAMILY: (
        Layout("transformers", (), _POSITIONS),
        # Since version 5 an encoder without a projection is stored without the prefix.
        Layout("transformers 5", (Rule("text_model.{rest}", ("{rest}",)),), _POSITIONS),
    ),
    t5.FAMILY: (
        Layout("transformers", (), ("encoder.embed_tokens.weight", "decoder.{rest}", *_HEADS)),
        Layout("tied", (Rule("shared.weight", ("encoder.embed_tokens.weight",)),), ("decoder.{rest}", *_HEADS)),
    ),
    bert.FAMILY: (
        Layout("transformers", (), (*_POSITIONS, "pooler.{rest}", *_HEADS)),
        Layout(
            "bert.",
            (Rule("{rest}", ("bert.{rest}",)),),
            ("bert.embeddings.position_ids", "bert.pooler.{rest}", *_HEADS),
        ),
    ),
    qwen.FAMILY: (
        Layout("transformers", (), _HEADS),
        Layout("model.", (Rule("{rest}", ("model.{rest}",)),), _HEADS),
        Layout("model.language_model.", (Rule("{rest}", ("model.language_model.{rest}",)),), _HEADS),
    ),
}

# --------------------------------------------------------------------------------------------------- OpenCLIP

_OURS, _OPEN = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
_PARTS = {"q": Transform.FIRST_THIRD, "k": Transform.SECOND_THIRD, "v": Transform.LAST_THIRD}

OPENCLIP = (
    Rule("text_model.embeddings.token_embedding.weight", ("token_embedding.weight",)),
    Rule("text_model.embeddings.position_embedding.weight", ("positional_embedding",)),
    Rule("text_model.final_layer_norm.{leaf}", ("ln_final.{leaf}",)),
    Rule("text_projection.weight", ("text_projection",), Transform.TRANSPOSE),
    *(
        Rule(f"{_OURS}.self_attn.{part}_proj.{leaf}", (f"{_OPEN}.attn.in_proj_{leaf}",), third)
        for part, third in _PARTS.items()
        for leaf in ("weight", "bias")
    ),
    Rule(_OURS + ".self_attn.out_proj.{leaf}", (_OPEN + ".attn.out_proj.{leaf}",)),
    Rule(_OURS + ".layer_norm1.{leaf}", (_OPEN + ".ln_1.{leaf}",)),
    Rule(_OURS + ".layer_norm2.{leaf}", (_OPEN + ".ln_2.{leaf}",)),
    Rule(_OURS + ".mlp.fc1.{leaf}", (_OPEN + ".mlp.c_fc.{leaf}",)),
    Rule(_OURS + ".mlp.fc2.{leaf}", (_OPEN + ".mlp.c_proj.{leaf}",)),
)
_OPENCLIP_IGNORED = ("logit_scale", "attn_mask")
# Stable Diffusion 2 reads the features before the last block, so that its encoder ends there.
_SECOND_LAST = (*_OPENCLIP_IGNORED, "transformer.resblocks.23.{rest}", "text_projection")

# ------------------------------------------------------------------------------------------------ single files


class Known(str, Enum):
    """Text encoders that files with a whole pipeline hold, whose architecture the file does not say."""

    CLIP_L = "clip-l"
    CLIP_L_PROJECTED = "clip-l with projection"  # SD3
    OPENCLIP_H = "openclip-h"  # Stable Diffusion 2, one block less
    OPENCLIP_G = "openclip-g"  # SDXL, SD3
    T5_XXL = "t5-v1.1-xxl"


PARAMS: Mapping[Known, Any] = {
    Known.CLIP_L: clip_text.Params(),
    Known.CLIP_L_PROJECTED: clip_text.Params(projection_dim=768),
    Known.OPENCLIP_H: clip_text.Params(
        hidden_size=1024, intermediate_size=4096, depth=23, num_heads=16, hidden_act="gelu"
    ),
    Known.OPENCLIP_G: clip_text.Params(
        hidden_size=1280, intermediate_size=5120, depth=32, num_heads=20, hidden_act="gelu", projection_dim=1280
    ),
    Known.T5_XXL: t5.Params(),
}

_UNPROJECTED = tuple(  # some files of CLIP-L alone keep the projection, which pipelines with this encoder do not use
    Layout(layout.name, layout.rules, (*layout.ignored, "text_projection.weight"))
    for layout in FOLDERS[clip_text.FAMILY]
)

LAYOUTS: Mapping[Known, tuple[Layout, ...]] = {
    Known.CLIP_L: _UNPROJECTED,
    Known.CLIP_L_PROJECTED: FOLDERS[clip_text.FAMILY],
    Known.OPENCLIP_H: (Layout("OpenCLIP", OPENCLIP, _SECOND_LAST), FOLDERS[clip_text.FAMILY][0]),
    Known.OPENCLIP_G: (Layout("OpenCLIP", OPENCLIP, _OPENCLIP_IGNORED), FOLDERS[clip_text.FAMILY][0]),
    Known.T5_XXL: FOLDERS[t5.FAMILY],
}

PREFIXES: Mapping[Known, tuple[str, ...]] = {  # the empty one is a file with nothing but the encoder
    Known.CLIP_L: ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", ""),
    Known.CLIP_L_PROJECTED: ("text_encoders.clip_l.transformer.", ""),
    Known.OPENCLIP_H: ("cond_stage_model.model.", ""),
    Known.OPENCLIP_G: (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.0.model.",  # SDXL's refiner has no other
        "text_encoders.clip_g.transformer.",
        "",
    ),
    Known.T5_XXL: ("text_encoders.t5xxl.transformer.", ""),
}


def part_of(source: WeightSource, prefix: str) -> WeightSource | None:
    """What stands in ``source`` under names that begin with ``prefix``, without it; None if nothing does."""
    inside = {name.removeprefix(prefix): Origin(parts=((name,),)) for name in source.names() if name.startswith(prefix)}
    return MappedSource(source, inside) if inside else None
