"""Space-time DiT: diffusers' ``LatteTransformer3DModel``. The class-conditional model's names are those of DiT."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

_SPATIAL, _TEMPORAL = "transformer_blocks.{i}", "temporal_transformer_blocks.{i}"


def _block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(ours + ".scale_shift_table", (theirs + ".scale_shift_table",)),
        Rule(ours + ".attn.qkv.{leaf}", tuple(f"{theirs}.attn1.to_{part}.{{leaf}}" for part in "qkv")),
        Rule(ours + ".attn.proj.{leaf}", (theirs + ".attn1.to_out.0.{leaf}",)),
        Rule(ours + ".mlp.fc1.{leaf}", (theirs + ".ff.net.0.proj.{leaf}",)),
        Rule(ours + ".mlp.fc2.{leaf}", (theirs + ".ff.net.2.{leaf}",)),
    )


DIFFUSERS = (
    Rule("x_embedder.proj.{leaf}", ("pos_embed.proj.{leaf}",)),
    Rule("t_embedder.mlp.0.{leaf}", ("adaln_single.emb.timestep_embedder.linear_1.{leaf}",)),
    Rule("t_embedder.mlp.2.{leaf}", ("adaln_single.emb.timestep_embedder.linear_2.{leaf}",)),
    Rule("t_block.1.{leaf}", ("adaln_single.linear.{leaf}",)),
    Rule("y_embedder.y_proj.fc1.{leaf}", ("caption_projection.linear_1.{leaf}",)),
    Rule("y_embedder.y_proj.fc2.{leaf}", ("caption_projection.linear_2.{leaf}",)),
    *_block("blocks.{i}", _SPATIAL),
    Rule("blocks.{i}.cross_attn.q_linear.{leaf}", (_SPATIAL + ".attn2.to_q.{leaf}",)),
    Rule("blocks.{i}.cross_attn.kv_linear.{leaf}", (_SPATIAL + ".attn2.to_k.{leaf}", _SPATIAL + ".attn2.to_v.{leaf}")),
    Rule("blocks.{i}.cross_attn.proj.{leaf}", (_SPATIAL + ".attn2.to_out.0.{leaf}",)),
    *_block("temporal_blocks.{i}", _TEMPORAL),
    Rule("final_layer.scale_shift_table", ("scale_shift_table",)),
    Rule("final_layer.linear.{leaf}", ("proj_out.{leaf}",)),
)
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("temporal_blocks.0.attn.qkv.weight",)
READS = ("`LatteTransformer3DModel` folder",)  # beside our own layout
