"""FLUX.1: diffusers' ``FluxTransformer2DModel`` and the authors' files, whose names are ours."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule, Transform

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_OURS = "double_blocks.{i}"

DIFFUSERS = (
    Rule("img_in.{leaf}", ("x_embedder.{leaf}",)),
    Rule("txt_in.{leaf}", ("context_embedder.{leaf}",)),
    Rule("time_in.in_layer.{leaf}", ("time_text_embed.timestep_embedder.linear_1.{leaf}",)),
    Rule("time_in.out_layer.{leaf}", ("time_text_embed.timestep_embedder.linear_2.{leaf}",)),
    Rule("vector_in.in_layer.{leaf}", ("time_text_embed.text_embedder.linear_1.{leaf}",)),
    Rule("vector_in.out_layer.{leaf}", ("time_text_embed.text_embedder.linear_2.{leaf}",)),
    Rule("guidance_in.in_layer.{leaf}", ("time_text_embed.guidance_embedder.linear_1.{leaf}",)),
    Rule("guidance_in.out_layer.{leaf}", ("time_text_embed.guidance_embedder.linear_2.{leaf}",)),
    Rule(_OURS + ".img_mod.lin.{leaf}", (_DOUBLE + ".norm1.linear.{leaf}",)),
    Rule(_OURS + ".txt_mod.lin.{leaf}", (_DOUBLE + ".norm1_context.linear.{leaf}",)),
    Rule(_OURS + ".img_attn.qkv.{leaf}", tuple(f"{_DOUBLE}.attn.to_{part}.{{leaf}}" for part in "qkv")),
    Rule(_OURS + ".txt_attn.qkv.{leaf}", tuple(f"{_DOUBLE}.attn.add_{part}_proj.{{leaf}}" for part in "qkv")),
    Rule(_OURS + ".img_attn.norm.query_norm.scale", (_DOUBLE + ".attn.norm_q.weight",)),
    Rule(_OURS + ".img_attn.norm.key_norm.scale", (_DOUBLE + ".attn.norm_k.weight",)),
    Rule(_OURS + ".txt_attn.norm.query_norm.scale", (_DOUBLE + ".attn.norm_added_q.weight",)),
    Rule(_OURS + ".txt_attn.norm.key_norm.scale", (_DOUBLE + ".attn.norm_added_k.weight",)),
    Rule(_OURS + ".img_attn.proj.{leaf}", (_DOUBLE + ".attn.to_out.0.{leaf}",)),
    Rule(_OURS + ".txt_attn.proj.{leaf}", (_DOUBLE + ".attn.to_add_out.{leaf}",)),
    Rule(_OURS + ".img_mlp.0.{leaf}", (_DOUBLE + ".ff.net.0.proj.{leaf}",)),
    Rule(_OURS + ".img_mlp.2.{leaf}", (_DOUBLE + ".ff.net.2.{leaf}",)),
    Rule(_OURS + ".txt_mlp.0.{leaf}", (_DOUBLE + ".ff_context.net.0.proj.{leaf}",)),
    Rule(_OURS + ".txt_mlp.2.{leaf}", (_DOUBLE + ".ff_context.net.2.{leaf}",)),
    Rule("single_blocks.{i}.modulation.lin.{leaf}", (_SINGLE + ".norm.linear.{leaf}",)),
    Rule(
        "single_blocks.{i}.linear1.{leaf}",
        (*(f"{_SINGLE}.attn.to_{part}.{{leaf}}" for part in "qkv"), _SINGLE + ".proj_mlp.{leaf}"),
    ),
    Rule("single_blocks.{i}.norm.query_norm.scale", (_SINGLE + ".attn.norm_q.weight",)),
    Rule("single_blocks.{i}.norm.key_norm.scale", (_SINGLE + ".attn.norm_k.weight",)),
    Rule("single_blocks.{i}.linear2.{leaf}", (_SINGLE + ".proj_out.{leaf}",)),
    Rule("final_layer.adaLN_modulation.1.{leaf}", ("norm_out.linear.{leaf}",), Transform.SWAP_HALVES),
    Rule("final_layer.linear.{leaf}", ("proj_out.{leaf}",)),
)
DIFFUSERS_IGNORED: tuple[str, ...] = ()

ORIGINAL: tuple[Rule, ...] = ()
ORIGINAL_IGNORED: tuple[str, ...] = ()

MARKER = ("double_blocks.0.img_attn.qkv.weight",)
READS = ("`FluxTransformer2DModel` folder", "Black Forest Labs file")  # beside our own layout
