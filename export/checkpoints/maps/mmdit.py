"""SD3 and SD3.5: diffusers' ``SD3Transformer2DModel`` and the authors' single files."""

from __future__ import annotations

from lehr.export.checkpoints.rules import Rule, Transform

_BLOCK, _OURS = "transformer_blocks.{i}", "joint_blocks.{i}"
_LAST = _OURS + ".context_block.pre_only.1.{leaf}"

DIFFUSERS = (
    Rule("x_embedder.proj.{leaf}", ("pos_embed.proj.{leaf}",)),
    Rule("pos_embed.rows", ("pos_embed.pos_embed",), Transform.GRID_ROWS),
    Rule("pos_embed.columns", ("pos_embed.pos_embed",), Transform.GRID_COLUMNS),
    Rule("t_embedder.mlp.0.{leaf}", ("time_text_embed.timestep_embedder.linear_1.{leaf}",)),
    Rule("t_embedder.mlp.2.{leaf}", ("time_text_embed.timestep_embedder.linear_2.{leaf}",)),
    Rule("y_embedder.mlp.0.{leaf}", ("time_text_embed.text_embedder.linear_1.{leaf}",)),
    Rule("y_embedder.mlp.2.{leaf}", ("time_text_embed.text_embedder.linear_2.{leaf}",)),
    Rule(_OURS + ".x_block.adaLN_modulation.1.{leaf}", (_BLOCK + ".norm1.linear.{leaf}",)),
    Rule(_OURS + ".x_block.attn.qkv.{leaf}", tuple(f"{_BLOCK}.attn.to_{part}.{{leaf}}" for part in "qkv")),
    Rule(_OURS + ".x_block.attn.ln_q.{leaf}", (_BLOCK + ".attn.norm_q.{leaf}",)),
    Rule(_OURS + ".x_block.attn.ln_k.{leaf}", (_BLOCK + ".attn.norm_k.{leaf}",)),
    Rule(_OURS + ".x_block.attn.proj.{leaf}", (_BLOCK + ".attn.to_out.0.{leaf}",)),
    Rule(_OURS + ".x_block.attn2.qkv.{leaf}", tuple(f"{_BLOCK}.attn2.to_{part}.{{leaf}}" for part in "qkv")),
    Rule(_OURS + ".x_block.attn2.ln_q.{leaf}", (_BLOCK + ".attn2.norm_q.{leaf}",)),
    Rule(_OURS + ".x_block.attn2.ln_k.{leaf}", (_BLOCK + ".attn2.norm_k.{leaf}",)),
    Rule(_OURS + ".x_block.attn2.proj.{leaf}", (_BLOCK + ".attn2.to_out.0.{leaf}",)),
    Rule(_OURS + ".x_block.mlp.fc1.{leaf}", (_BLOCK + ".ff.net.0.proj.{leaf}",)),
    Rule(_OURS + ".x_block.mlp.fc2.{leaf}", (_BLOCK + ".ff.net.2.{leaf}",)),
    Rule(_OURS + ".context_block.adaLN_modulation.1.{leaf}", (_BLOCK + ".norm1_context.linear.{leaf}",)),
    Rule(_LAST, (_BLOCK + ".norm1_context.linear.{leaf}",), Transform.SWAP_HALVES),  # there: scale, then shift
    Rule(_OURS + ".context_block.attn.qkv.{leaf}", tuple(f"{_BLOCK}.attn.add_{part}_proj.{{leaf}}" for part in "qkv")),
    Rule(_OURS + ".context_block.attn.ln_q.{leaf}", (_BLOCK + ".attn.norm_added_q.{leaf}",)),
    Rule(_OURS + ".context_block.attn.ln_k.{leaf}", (_BLOCK + ".attn.norm_added_k.{leaf}",)),
    Rule(_OURS + ".context_block.attn.proj.{leaf}", (_BLOCK + ".attn.to_add_out.{leaf}",)),
    Rule(_OURS + ".context_block.mlp.fc1.{leaf}", (_BLOCK + ".ff_context.net.0.proj.{leaf}",)),
    Rule(_OURS + ".context_block.mlp.fc2.{leaf}", (_BLOCK + ".ff_context.net.2.{leaf}",)),
    Rule("final_layer.adaLN_modulation.1.{leaf}", ("norm_out.linear.{leaf}",), Transform.SWAP_HALVES),
    Rule("final_layer.linear.{leaf}", ("proj_out.{leaf}",)),
)
DIFFUSERS_IGNORED: tuple[str, ...] = ()

_FILE = "model.diffusion_model."  # the single files hold text encoders and autoencoder, too

ORIGINAL = (
    Rule("pos_embed.rows", (_FILE + "pos_embed",), Transform.GRID_ROWS),
    Rule("pos_embed.columns", (_FILE + "pos_embed",), Transform.GRID_COLUMNS),
    Rule(_LAST, (_FILE + _OURS + ".context_block.adaLN_modulation.1.{leaf}",)),
    Rule("{rest}", (_FILE + "{rest}",)),
)
ORIGINAL_IGNORED = (
    "first_stage_model.{rest}",
    "text_encoders.{rest}",
    "model_sampling.{rest}",  # the schedule, in some files
)

MARKER = ("joint_blocks.0.x_block.attn.qkv.weight",)
READS = ("`SD3Transformer2DModel` folder", "Stability AI file")  # beside our own layout
