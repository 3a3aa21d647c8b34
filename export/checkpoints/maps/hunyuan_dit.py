"""Hunyuan-DiT: diffusers' ``HunyuanDiT2DModel`` and the authors' files, whose names are ours."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule, Transform

_ATTN1, _ATTN2 = "blocks.{i}.attn1", "blocks.{i}.attn2"
_EMBEDDER = "time_extra_emb"

DIFFUSERS = (
    Rule("x_embedder.proj.{leaf}", ("pos_embed.proj.{leaf}",)),
    Rule("mlp_t5.0.{leaf}", ("text_embedder.linear_1.{leaf}",)),
    Rule("mlp_t5.2.{leaf}", ("text_embedder.linear_2.{leaf}",)),
    Rule("pooler.{rest}", (_EMBEDDER + ".pooler.{rest}",)),
    Rule("style_embedder.{leaf}", (_EMBEDDER + ".style_embedder.{leaf}",)),
    Rule("t_embedder.mlp.0.{leaf}", (_EMBEDDER + ".timestep_embedder.linear_1.{leaf}",)),
    Rule("t_embedder.mlp.2.{leaf}", (_EMBEDDER + ".timestep_embedder.linear_2.{leaf}",)),
    Rule("extra_embedder.0.{leaf}", (_EMBEDDER + ".extra_embedder.linear_1.{leaf}",)),
    Rule("extra_embedder.2.{leaf}", (_EMBEDDER + ".extra_embedder.linear_2.{leaf}",)),
    Rule("blocks.{i}.norm1.{leaf}", ("blocks.{i}.norm1.norm.{leaf}",)),
    Rule("blocks.{i}.norm2.{leaf}", ("blocks.{i}.norm3.{leaf}",)),  # there numbered in the order of their use
    Rule("blocks.{i}.norm3.{leaf}", ("blocks.{i}.norm2.{leaf}",)),
    Rule("blocks.{i}.default_modulation.1.{leaf}", ("blocks.{i}.norm1.linear.{leaf}",)),
    Rule(_ATTN1 + ".Wqkv.{leaf}", tuple(f"{_ATTN1}.to_{part}.{{leaf}}" for part in "qkv")),
    Rule(_ATTN1 + ".q_norm.{leaf}", (_ATTN1 + ".norm_q.{leaf}",)),
    Rule(_ATTN1 + ".k_norm.{leaf}", (_ATTN1 + ".norm_k.{leaf}",)),
    Rule(_ATTN1 + ".out_proj.{leaf}", (_ATTN1 + ".to_out.0.{leaf}",)),
    Rule(_ATTN2 + ".q_proj.{leaf}", (_ATTN2 + ".to_q.{leaf}",)),
    Rule(_ATTN2 + ".kv_proj.{leaf}", (_ATTN2 + ".to_k.{leaf}", _ATTN2 + ".to_v.{leaf}")),
    Rule(_ATTN2 + ".q_norm.{leaf}", (_ATTN2 + ".norm_q.{leaf}",)),
    Rule(_ATTN2 + ".k_norm.{leaf}", (_ATTN2 + ".norm_k.{leaf}",)),
    Rule(_ATTN2 + ".out_proj.{leaf}", (_ATTN2 + ".to_out.0.{leaf}",)),
    Rule("blocks.{i}.mlp.fc1.{leaf}", ("blocks.{i}.ff.net.0.proj.{leaf}",)),
    Rule("blocks.{i}.mlp.fc2.{leaf}", ("blocks.{i}.ff.net.2.{leaf}",)),
    Rule("final_layer.adaLN_modulation.1.{leaf}", ("norm_out.linear.{leaf}",), Transform.SWAP_HALVES),
    Rule("final_layer.linear.{leaf}", ("proj_out.{leaf}",)),
)
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("mlp_t5.0.weight", "blocks.0.default_modulation.1.weight")
READS = ("`HunyuanDiT2DModel` folder", "Tencent Hunyuan-DiT file")  # beside our own layout
