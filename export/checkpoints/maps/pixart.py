"""PixArt-α: diffusers' ``PixArtTransformer2DModel`` and the authors' files, whose names are ours."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

_ATTN = "transformer_blocks.{i}.attn"

DIFFUSERS = (
    Rule("x_embedder.proj.{leaf}", ("pos_embed.proj.{leaf}",)),
    Rule("t_embedder.mlp.0.{leaf}", ("adaln_single.emb.timestep_embedder.linear_1.{leaf}",)),
    Rule("t_embedder.mlp.2.{leaf}", ("adaln_single.emb.timestep_embedder.linear_2.{leaf}",)),
    Rule("csize_embedder.mlp.0.{leaf}", ("adaln_single.emb.resolution_embedder.linear_1.{leaf}",)),
    Rule("csize_embedder.mlp.2.{leaf}", ("adaln_single.emb.resolution_embedder.linear_2.{leaf}",)),
    Rule("ar_embedder.mlp.0.{leaf}", ("adaln_single.emb.aspect_ratio_embedder.linear_1.{leaf}",)),
    Rule("ar_embedder.mlp.2.{leaf}", ("adaln_single.emb.aspect_ratio_embedder.linear_2.{leaf}",)),
    Rule("t_block.1.{leaf}", ("adaln_single.linear.{leaf}",)),
    Rule("y_embedder.y_proj.fc1.{leaf}", ("caption_projection.linear_1.{leaf}",)),
    Rule("y_embedder.y_proj.fc2.{leaf}", ("caption_projection.linear_2.{leaf}",)),
    Rule("blocks.{i}.scale_shift_table", ("transformer_blocks.{i}.scale_shift_table",)),
    Rule("blocks.{i}.attn.qkv.{leaf}", tuple(f"{_ATTN}1.to_{part}.{{leaf}}" for part in "qkv")),
    Rule("blocks.{i}.attn.proj.{leaf}", (_ATTN + "1.to_out.0.{leaf}",)),
    Rule("blocks.{i}.cross_attn.q_linear.{leaf}", (_ATTN + "2.to_q.{leaf}",)),
    Rule("blocks.{i}.cross_attn.kv_linear.{leaf}", (_ATTN + "2.to_k.{leaf}", _ATTN + "2.to_v.{leaf}")),
    Rule("blocks.{i}.cross_attn.proj.{leaf}", (_ATTN + "2.to_out.0.{leaf}",)),
    Rule("blocks.{i}.mlp.fc1.{leaf}", ("transformer_blocks.{i}.ff.net.0.proj.{leaf}",)),
    Rule("blocks.{i}.mlp.fc2.{leaf}", ("transformer_blocks.{i}.ff.net.2.{leaf}",)),
    Rule("final_layer.scale_shift_table", ("scale_shift_table",)),
    Rule("final_layer.linear.{leaf}", ("proj_out.{leaf}",)),
)
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED = (
    "pos_embed",  # sin-cos, computed
    "y_embedder.y_embedding",  # features of the empty prompt: an input of ours
)

MARKER = ("t_block.1.weight", "blocks.0.scale_shift_table")
READS = ("`PixArtTransformer2DModel` folder", "PixArt file")  # beside our own layout
