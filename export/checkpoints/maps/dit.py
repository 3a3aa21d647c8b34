"""DiT: diffusers' ``DiTTransformer2DModel`` and the authors' files, whose names are ours."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule

_BLOCK = "transformer_blocks.{i}"
_EMBEDDERS = "transformer_blocks.{any}.norm1.emb"  # one copy a block there

DIFFUSERS = (
    Rule("x_embedder.proj.{leaf}", ("pos_embed.proj.{leaf}",)),
    Rule("t_embedder.mlp.0.{leaf}", (_EMBEDDERS + ".timestep_embedder.linear_1.{leaf}",)),
    Rule("t_embedder.mlp.2.{leaf}", (_EMBEDDERS + ".timestep_embedder.linear_2.{leaf}",)),
    Rule("y_embedder.embedding_table.{leaf}", (_EMBEDDERS + ".class_embedder.embedding_table.{leaf}",)),
    Rule("blocks.{i}.adaLN_modulation.1.{leaf}", (_BLOCK + ".norm1.linear.{leaf}",)),
    Rule("blocks.{i}.attn.qkv.{leaf}", tuple(f"{_BLOCK}.attn1.to_{part}.{{leaf}}" for part in "qkv")),
    Rule("blocks.{i}.attn.proj.{leaf}", (_BLOCK + ".attn1.to_out.0.{leaf}",)),
    Rule("blocks.{i}.mlp.fc1.{leaf}", (_BLOCK + ".ff.net.0.proj.{leaf}",)),
    Rule("blocks.{i}.mlp.fc2.{leaf}", (_BLOCK + ".ff.net.2.{leaf}",)),
    Rule("final_layer.adaLN_modulation.1.{leaf}", ("proj_out_1.{leaf}",)),
    Rule("final_layer.linear.{leaf}", ("proj_out_2.{leaf}",)),
)
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED = ("pos_embed",)  # sin-cos, computed

MARKER = ("t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight")
READS = ("`DiTTransformer2DModel` folder", "facebook DiT file")  # beside our own layout
